"""Pictures (through Pillow) and clips (through PyAV) as phones, cameras and programs make them, brought to what the
model reads."""

import errno
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import open_regular
from .pictures import crop_box, nearest_length
from .words import reason, short

logger = logging.getLogger(__name__)

#: Pixels of a picture, as it is decoded: phones make 200 million. And those of a JPEG, which is decoded at up to an
#: eighth of its sides.
_MOST_PIXELS, _MOST_JPEG_PIXELS = 210_000_000, 1_000_000_000
#: Pixels of a picture that is kept: one of 8K. Larger ones are shrunk by a whole number while they are read.
_KEPT_PIXELS = 7680 * 4320
#: Pixels of a clip's frame: twice those of 8K.
_MOST_FRAME_PIXELS = 1 << 26
#: What Pillow is let try: its other readers start programs (EPS) or are no pictures (FITS, WMF).
_FORMATS = """PNG JPEG MPO JPEG2000 TIFF GIF WEBP AVIF HEIF BMP DIB TGA PPM ICO QOI DDS PCX SGI PSD""".split()
_RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw"}
#: EXIF's orientations as (rows and columns swapped, then mirrored left to right, mirrored top to bottom).
_ORIENTATIONS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
#: swscale's name of a colour matrix, by ffmpeg's number (ISO/IEC 23091-2): BT.709, FCC, BT.601 (625 and 525 lines),
#: SMPTE 240M, BT.2020.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
#: Transfer functions of high dynamic range, by ffmpeg's number.
_HDR = {16: "PQ", 18: "HLG"}
_AUDIO_RATES = (44_100, 48_000)

Tell = Callable[[str], None]


def read_image(path: Path | str, on_note: Tell | None = None) -> torch.Tensor:
    """Read an image file: turned as its EXIF data says, in sRGB, transparency joined with white; float32 ``[1, H, W,
    3]`` in 0..1.

    16 bits and floating point keep their precision where they are grey. One of more pixels than an 8K screen is read
    smaller.

    Args:
        on_note: called with a sentence about what was changed or guessed; by default it is logged.

    Raises:
        ValueError: if it is not there, no image that Pillow reads, cut off, too large, or of values whose white is not
            known.
    """
    from PIL import Image

    path, tell = Path(path), _teller(on_note)
    with open_regular(path, " as an image") as raw, io.BufferedReader(raw) as file:
        head = file.read(4096)
        file.seek(0)
        if path.suffix.lower() in _RAW:
            raise ValueError(
                f"{short(path, 400)} is a camera's raw file, which has to be developed first. Export it as PNG or JPEG."
            )
        advice = _image_advice(head)
        with _from_library(path, "as an image", advice), _large_pictures():
            Image.init()
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
            width, height = image.size
            if image.format in ("JPEG", "MPO") and width * height > _KEPT_PIXELS:
                # A JPEG can be decoded at a half, a quarter or an eighth.
                sides = (int(side * (_KEPT_PIXELS / width / height) ** 0.5) for side in (width, height))
                image.draft(None, tuple(sides))
        # Those of 32 bits a pixel are copied once more.
        most = _MOST_PIXELS // 4 if image.mode in ("F", "I") else _MOST_PIXELS
        if image.size[0] * image.size[1] > most or width * height > _MOST_JPEG_PIXELS:
            raise ValueError(
                f"{short(path, 400)} is {width}x{height} pixels ({width * height / 1e6:,.0f} million), more than is "
                f"read ({most / 1e6:.0f} million): a video shows about one million. Scale it down first."
            )
        with _from_library(path, "as an image", advice), _large_pictures():
            image.load()
            moving = getattr(image, "is_animated", False) and image.format != "MPO"
            turn = _ORIENTATIONS.get(_orientation(image, path, tell), (False, False, False))
        factor = 1
        while -(-image.size[0] // factor) * -(-image.size[1] // factor) > _KEPT_PIXELS:
            factor += 1
        if image.mode == "F" or image.mode.startswith("I"):
            grey = _deep(image, path, tell, factor)
            pixels = np.repeat(grey[..., None], 3, axis=2)
        else:
            with _from_library(path, "as an image", advice), _large_pictures():
                pixels = _colours(image, path, tell, factor)
    if moving:
        tell(f"{short(path)} holds several pictures: the first is used.")
    if pixels.shape[0] * pixels.shape[1] < height * width:
        tell(
            f"{short(path)} is {width}x{height} pixels, more than a video can show: it was read as "
            f"{pixels.shape[1]}x{pixels.shape[0]}."
        )
    tensor = torch.from_numpy(np.ascontiguousarray(_turned(pixels, *turn)))[None]
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


def _orientation(image, path: Path, tell: Tell) -> int:
    """EXIF's orientation of a loaded picture, where Pillow has not turned it already, as it does with TIFF."""
    try:
        return 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    except Exception as error:
        # Pillow's reader of EXIF raises what it likes where that is damaged; the picture itself is well.
        tell(f"The EXIF data of {short(path)} is damaged ({reason(error)}), so the picture is taken as it lies.")
        return 1


def _turned(pixels: np.ndarray, swap: bool, mirror: bool, flip: bool) -> np.ndarray:
    """``[H, W, C]`` with rows and columns swapped, then mirrored left to right, then top to bottom."""
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    pixels = pixels[:, ::-1] if mirror else pixels
    return pixels[::-1] if flip else pixels


def _deep(image, path: Path, tell: Tell, factor: int) -> np.ndarray:
    """A grey picture of more than 8 bits: float32 ``[H, W]`` in 0..1.

    Raises:
        ValueError: if what is white in it is not known, or its values go beyond.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"{short(path, 400)} has floating-point values from {low:.3g} to {high:.3g}, but black is 0 and white "
                "is 1: it is of high dynamic range, or scaled otherwise. Bring it to 0..1, or export it as PNG."
            )
        white = 1
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        bits = tags.get(258, (16,))
        bits = bits[0] if isinstance(bits, tuple) else bits
        white = 4095 if bits == 12 else 65535
    else:
        raise ValueError(
            f"{short(path, 400)} has whole numbers of 32 bits, and which of them is white is not known. Save it with "
            "8 or 16 bits, as PNG."
        )
    clear = image.info.get("transparency")
    if isinstance(clear, int) and (values == clear).any():
        values = np.where(values == clear, white, values)
        tell(_joined(path))
    height, width = (max(1, side // factor) for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, min(factor, values.shape[0]), width, -1)
    grey = (blocks.mean((1, 3), dtype=np.float32) / np.float32(white)).clip(0, 1)
    if tags.get(262) == 0 and white != 1:
        grey = 1 - grey  # TIFF's WhiteIsZero, which Pillow heeds for 8 bits only.
    return grey


def _colours(image, path: Path, tell: Tell, factor: int) -> np.ndarray:
    """A picture of 8 bits as sRGB without transparency: uint8 ``[H, W, 3]``, shrunk by ``factor``. In strips, as it may
    be large."""
    width, height = image.size
    rows = max(1, (1 << 22) // width // factor) * factor
    to_srgb = _profile(image, path, tell)
    strips, joined = [], False
    for top in range(0, height, rows):
        strip, clear = _opaque(image.crop((0, top, width, min(height, top + rows))))
        strip, joined = to_srgb(strip), joined or clear
        strips.append(np.asarray(strip.reduce(factor) if factor > 1 else strip))
    if joined:
        tell(_joined(path))
    return np.concatenate(strips)


def _joined(path: Path) -> str:
    return (
        f"{short(path)} is transparent in places: it was joined with a white background. Join it with another first "
        "if white is not wanted."
    )


def _opaque(image) -> tuple[Any, bool]:
    """A Pillow image without palette and transparency, joined with white; and whether anything was transparent.

    Hidden colours, under what is fully transparent, are never seen.
    """
    from PIL import Image

    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        clear = seen.getchannel("A").getextrema()[0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), seen).convert("L" if grey else "RGB")
        return image, clear
    if image.mode in ("1", "P"):
        image = image.convert("L" if grey else "RGB")
    return image, False


def _profile(image, path: Path, tell: Tell) -> Callable[[Any], Any]:
    """What brings a picture without transparency to sRGB: by its colour profile (ICC) where it has one."""
    icc, mode = image.info.get("icc_profile"), image.mode

    def plain(picture):
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    try:
        from PIL import ImageCms
    except ImportError:
        ImageCms = None
    space = None
    if ImageCms is not None and (icc or mode == "LAB"):
        try:
            profile = (
                ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc and mode != "LAB" else ImageCms.createProfile("LAB")
            )
            space = "LAB" if mode == "LAB" else profile.profile.xcolor_space.strip()
            name = (
                short(" ".join((profile.profile.profile_description or "without a name").split()), 60)
                if space != "LAB"
                else "CIELAB"
            )
        except Exception as error:
            # littlecms' errors have types of their own, and a damaged profile raises others too; the picture itself is
            # well.
            tell(f"The colour profile of {short(path)} is damaged ({reason(error)}): its colours are taken as sRGB.")
            return plain
        wanted = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}.get(space)
        flat = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB", "1": "L", "LA": "L", "La": "L"}.get(mode, mode)
        if "srgb" in name.lower() and flat in ("RGB", "L"):
            return plain
        if wanted == flat or (wanted == "RGB" and flat == "L"):
            target = ImageCms.createProfile("sRGB")
            transform = ImageCms.buildTransform(profile, target, wanted, "RGB")
            tell(f"The colours of {short(path)} were brought from its profile ({name}) to sRGB, which the model knows.")
            return lambda picture: ImageCms.applyTransform(
                picture if picture.mode == wanted else picture.convert(wanted), transform
            )
        tell(
            f"The colour profile of {short(path)} ({name}) is for another kind of picture than {mode}: its colours "
            "are taken as sRGB."
        )
    elif icc and ImageCms is None:
        tell(
            f"{short(path)} has a colour profile, and this Pillow cannot apply it: its colours are taken as sRGB, and "
            "may be paler."
        )
    if mode == "CMYK":
        tell(
            f"{short(path)} has printing colours (CMYK) and no profile that says which: its colours are an "
            "approximation."
        )
    return plain


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Pillow without its own limit of pixels, whose error names no size, and without its warnings."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class _Refused(ValueError):
    """A sentence of this module's own, raised while a library is at work."""


@contextmanager
def _from_library(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file of the user's into a sentence.

    Raises:
        ValueError: with what the library said, and ``advice``.
    """
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        # Damaged files make Pillow, littlecms and ffmpeg raise anything: struct.error, SyntaxError, KeyError,
        # zlib.error, MemoryError …
        raise ValueError(f"{short(path, 400)} cannot be read {what} ({_said(error)}). {advice}") from error


def _said(error: Exception) -> str:
    """What a library said, without the names it has for the file."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is in no format that Pillow knows"
    if getattr(error, "errno", None) == errno.ENOMEM:
        # ffmpeg takes a number of a file for a size, and refuses it.
        return "it claims more than any memory holds, as a damaged file does"
    return getattr(error, "strerror", None) or reason(error)


def _image_advice(head: bytes) -> str:
    """What to do about a file that Pillow cannot read, by its first bytes."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    start = head.lstrip().lower()
    if not head:
        return "The file is empty: copy or download it again."
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return (
            "It is an HEIC picture, as iPhones make them, which Pillow does not know: save it as JPEG or PNG (on the "
            "phone: Settings, Camera, Formats, Most Compatible)."
        )
    if brand in (b"avif", b"avis"):
        return "It is an AVIF picture, which needs Pillow 11.3 or newer: save it as JPEG or PNG."
    if brand or head[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS") or head[8:12] == b"AVI ":
        return "It is a video or sound: give it as the video, or save one of its frames as PNG."
    if start.startswith((b"<!doctype", b"<html")):
        return "It is a web page, such as of a login or an error: download the picture itself."
    if start.startswith((b"<svg", b"<?xml", b"%pdf", b"%!ps")):
        return "It is a drawing and not made of pixels: export it as PNG."
    if head[:4] == b"\x76\x2f\x31\x01" or head.startswith(b"#?RADIANCE"):
        return "It is a picture of high dynamic range: export it as PNG."
    if head.startswith(b"version https://git-lfs"):
        return "It is a pointer of Git LFS and not the picture: fetch it with git lfs pull."
    return "Check the path, or convert it to PNG."


# --- Clips --------------------------------------------------------------------


def read_video(
    path: Path | str,
    limit: int | None = None,
    *,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    on_note: Tell | None = None,
) -> torch.Tensor:
    """Read the frames of a video file, one by one: turned as the camera says, with square pixels, at the size and rate
    that are needed.

    Colours follow the file's matrix and range; where it names none, BT.709 from 720 lines on and BT.601 below, as
    players do.

    Args:
        limit: frames to give at most; no more of the file is read than they need.
        fps: frames per second to give. Each is the nearest by its time, so that a second stays a second. None gives
            all, as they come.
        size: width and height to scale and centre-crop them to, with Lanczos' filter in 8 bits.
        step: cut the clip, or repeat its last frame, to the nearest ``step * N + 1`` frames.
        dtype: float32 gives 0..1; uint8 gives 0..255, in a quarter of the memory.
        on_note: called with a sentence about what was changed, cut or guessed; by default it is logged.

    Returns:
        ``[F, H, W, 3]``.

    Raises:
        ValueError: if it is not there, no video, or holds no frame that can be decoded.
    """
    path, tell = Path(path), _teller(on_note)
    with _open_clip(path) as container:
        stream = _video_stream(container, path, tell)
        # Each thread holds frames of its own.
        stream.codec_context.thread_count, stream.codec_context.thread_type = 4, "AUTO"
        stream.codec_context.options = {"max_pixels": str(2 * _MOST_FRAME_PIXELS)}
        frames, picture = _Frames(container, stream), _Picture(stream, path, size)
        clip, count, more = None, 0, False
        with _from_library(path, "as a video", _CLIP_ADVICE):
            for frame, times in _chosen(frames, None if fps is None else Fraction(fps).limit_denominator(1001)):
                picture.check(frame)
                room = times if limit is None else min(times, limit - count)
                if room:
                    pixels = torch.from_numpy(picture.pixels(frame))
                    clip = _with_room(clip, count + room, limit, pixels)
                    clip[count : count + room] = pixels
                    count += room
                more = room < times
                if more:
                    break
        duration = _duration(container, stream)
    if clip is None:
        raise ValueError(
            f"{short(path, 400)} holds no frames that can be decoded{frames.trouble}. Choose another video, or "
            "convert it to mp4."
        )
    for note in (*picture.notes, *frames.notes(path, duration, more)):
        tell(note)
    rate = float(fps or stream.average_rate or 0)
    if fps is not None and stream.average_rate and abs(float(stream.average_rate) / rate - 1) > 0.01:
        source = float(stream.average_rate)
        tell(
            f"{short(path)} has {source:.4g} frames a second and {rate:.4g} are made of them, each the nearest in "
            "time: a second stays a second."
        )
    if more:
        whole = f" of {duration:.1f} s" if duration else ""
        tell(
            f"Only the first {count} frames{f' ({count / rate:.1f} s)' if rate else ''}{whole} of {short(path)} are "
            "used."
        )
    length, note = (count, None) if step is None else nearest_length(count, step)
    if note:
        tell(note)
    clip = _with_room(clip, length, length, clip[0])[:length]
    clip[count:] = clip[min(count, length) - 1]
    return clip if dtype == torch.uint8 else clip.to(dtype).div_(255)


#: Bytes of address space that a clip is given at first: 340 frames of 1360x768.
_ROOM = 1 << 30


def _with_room(clip: torch.Tensor | None, frames: int, limit: int | None, like: torch.Tensor) -> torch.Tensor:
    """The clip, or one that begins with it, with room for so many frames. Memory that no frame was written to is not
    taken from the system."""
    if clip is not None and len(clip) >= frames:
        return clip
    usual = max(2 * frames, _ROOM // like.numel())
    larger = torch.empty(max(frames, min(usual, limit or usual)), *like.shape, dtype=torch.uint8)
    if clip is not None:
        larger[: len(clip)] = clip
    return larger


def read_sound(path: Path | str, seconds: float, on_note: Tell | None = None) -> tuple[np.ndarray, int] | None:
    """Read the sound that goes with the first ``seconds`` of a clip's picture, as stereo.

    Returns:
        float32 ``[2, samples]`` in -1..1, and samples per second; None, with a note, where the clip has none.

    Raises:
        ValueError: if the file or its sound cannot be read.
    """
    import av

    path, tell = Path(path), _teller(on_note)
    with _open_clip(path) as container:
        streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
        if not streams:
            tell(f"{short(path)} has no sound that can be read, so the video will have none.")
            return None
        video = next(iter(container.streams.video), None)
        start = video.start_time * video.time_base if video is not None and video.start_time is not None else 0
        rate = streams[0].rate if streams[0].rate in _AUDIO_RATES else _AUDIO_RATES[-1]
        sound = np.zeros((2, round(seconds * rate)), np.float32)
        place, frames = None, _Frames(container, streams[0])
        with _from_library(path, "for its sound", "Leave its sound out, or convert the clip to mp4."):
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
            for frame in chain((frame for _, frame in frames), [None]):
                if place is None:
                    if frame is None:
                        break
                    place = 0 if frame.pts is None else round((frame.pts * frame.time_base - start) * rate)
                if frame is not None:
                    frame.pts = None
                for piece in resampler.resample(frame):
                    samples = piece.to_ndarray()
                    # What comes before the first picture is left out; where it comes after, silence stays in front.
                    left, right = max(0, -place), max(0, sound.shape[1] - place)
                    kept = samples[:, left:right]
                    sound[:, place + left : place + left + kept.shape[1]] = kept
                    place += samples.shape[1]
                if place >= sound.shape[1]:
                    break
        if place is None:
            tell(f"The sound of {short(path)} cannot be decoded{frames.trouble}, so the video will have none.")
            return None
    return np.nan_to_num(sound).clip(-1, 1), rate


_CLIP_ADVICE = "Check the path, or convert it to mp4."


@contextmanager
def _open_clip(path: Path) -> Iterator[Any]:
    """Open a clip with PyAV, by its content and nothing but it: a playlist that names other files or addresses opens
    none of them."""
    import av

    with open_regular(path, " as a video") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(
                f"{short(path, 400)} cannot be read as a video: it is empty, 0 bytes. Copy or download it again."
            )
        head = file.read(64)
        file.seek(0)
        advice = _CLIP_ADVICE
        if head[8:12] == b"WEBP":
            advice = "It is a WebP picture: convert it to mp4 or GIF if it moves, and else give it as the image."
        with _from_library(path, "as a video", advice):
            container = av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="ignore")
        try:
            still = container.format.name.endswith("_pipe") or container.format.name == "image2"
            if still or (head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif")):
                raise ValueError(
                    f"{short(path, 400)} is a picture and no video, so there is nothing that moves. Give it as the "
                    "image, with an image-to-video checkpoint, or choose a video."
                )
            yield container
        finally:
            container.close()


def _video_stream(container, path: Path, tell: Tell):
    """The stream to read: the largest that is no cover picture.

    Raises:
        ValueError: if there is none, or no decoder for it.
    """
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        cover = " but a cover picture" if container.streams.video else ""
        what = "sound and no video" if container.streams.audio else "no video"
        raise ValueError(f"{short(path, 400)} holds {what}{cover}. Choose a video.")
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        raise ValueError(
            f"{short(path, 400)} is in a video format that this PyAV has no decoder for, or was cut off, so its "
            "frames cannot be read. Convert it to mp4 with H.264, or copy it again."
        )
    chosen = max(usable, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
    if len(streams) > 1:
        tell(f"{short(path)} holds {len(streams)} video streams: stream {chosen.index}, the largest, is used.")
    return chosen


def _is_cover(stream) -> bool:
    # Older PyAV has no dispositions; covers are JPEG or PNG in a file of sound.
    attached = getattr(stream, "disposition", None)
    if attached is not None:
        return bool(int(getattr(attached, "value", attached)) & 0x400)
    return bool(stream.container.streams.audio) and stream.name in ("mjpeg", "png", "bmp")


def _duration(container, stream) -> float:
    """Seconds that the file says it lasts, or 0."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / 1e6


class _Frames:
    """The frames of a stream with their times in seconds from the first, as far as they can be decoded."""

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        self._broken, self._error, self._seen = 0, "", 0
        self.end = Fraction(0)
        rate = getattr(stream, "average_rate", None) or getattr(stream, "guessed_rate", None)
        #: Seconds of a frame that names none.
        self.usual = 1 / Fraction(rate) if rate and 1 / 1000 <= rate <= 1000 else Fraction(1, 25)

    def __iter__(self) -> Iterator[tuple[Fraction, Any]]:
        last, shift, before = None, Fraction(0), self.usual
        for frame in self._decoded():
            raw = None if frame.pts is None or not frame.time_base else frame.pts * frame.time_base
            if last is None:
                time = Fraction(0)
                shift = -raw if raw is not None else Fraction(0)
            else:
                time = raw + shift if raw is not None else last + before
                # No time at all, one that goes back, or hours further: the clock was set anew, so what follows counts
                # from here.
                if not last < time < last + 3600:
                    time = last + before
                    shift = time - raw if raw is not None else shift
            duration = getattr(frame, "duration", 0) or 0
            before = duration * frame.time_base if duration > 0 and frame.time_base else self.usual
            last, self.end, self._seen = time, time + before, self._seen + 1
            yield time, frame

    def _decoded(self) -> Iterator[Any]:
        import av

        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    # One packet is damaged; ffmpeg itself goes on with the next.
                    if isinstance(error, av.error.EOFError):
                        return
                    self._broken, self._error = self._broken + 1, _said(error)
                    if self._broken > 1000 and not self._seen:
                        return
                    continue
                yield from frames
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, OSError) as error:
            self._error = _said(error)

    @property
    def trouble(self) -> str:
        return f" ({self._error})" if self._error else ""

    def notes(self, path: Path, duration: float, stopped: bool) -> Iterator[str]:
        """Sentences about what could not be read; ``stopped``: no more was asked for."""
        if self._broken:
            yield f"{self._broken} parts of {short(path)} are damaged{self.trouble} and were left out."
        elif self._error:
            yield f"{short(path)} is damaged after {float(self.end):.1f} s{self.trouble}: the {self._seen} frames until there are used."
        if not stopped and not self._error and duration - float(self.end) > max(0.5, 0.02 * duration):
            yield f"{short(path)} ends after {float(self.end):.1f} s, though it says that it lasts {duration:.1f} s: it may be cut off."


def _chosen(frames: _Frames, fps: Fraction | None) -> Iterator[tuple[Any, int]]:
    """The frames to show and how many times each: at ``fps``, that nearest to each moment, the earlier of two as
    near."""
    if fps is None:
        for _, frame in frames:
            yield frame, 1
        return
    shown, previous, since = 0, None, Fraction(0)
    for time, frame in frames:
        if previous is not None:
            until = int((since + time) / 2 * fps) + 1
            if until > shown:
                yield previous, until - shown
                shown = until
        previous, since = frame, time
    if previous is not None:
        # The last stays until its own end.
        until = max(1, int(frames.end * fps + Fraction(1, 2)))
        if until > shown:
            yield previous, until - shown


class _Picture:
    """Turns a clip's frames into RGB of the size that is asked for."""

    def __init__(self, stream, path: Path, size: tuple[int, int] | None):
        self._path, self._size = path, size
        aspect = stream.sample_aspect_ratio
        # Beyond that it is damage: anamorphic film has 2.
        self._aspect = Fraction(aspect) if aspect and Fraction(1, 4) <= aspect <= 4 else Fraction(1)
        self._graphs: dict[tuple, tuple] = {}
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def check(self, frame) -> None:
        """Refuse a frame that is larger than any camera's.

        Raises:
            ValueError: with its size.
        """
        if frame.width * frame.height > _MOST_FRAME_PIXELS:
            raise _Refused(
                f"{short(self._path, 400)} has frames of {frame.width}x{frame.height} pixels, more than is read "
                f"({_MOST_FRAME_PIXELS / 1e6:.0f} million): scale it down first."
            )

    def pixels(self, frame) -> np.ndarray:
        """uint8 ``[H, W, 3]``."""
        from PIL import Image

        trc = int(getattr(frame, "color_trc", 0) or 0)
        if trc in _HDR:
            self._notes[
                f"{short(self._path)} is of high dynamic range ({_HDR[trc]}), and its colours are taken as they are: "
                "they may look pale. Convert it to SDR first for right ones."
            ] = None
        pixels = self._rgb(frame)
        swap, mirror, flip = _display(frame)
        pixels = _turned(pixels, swap, mirror, flip)
        aspect = 1 / self._aspect if swap else self._aspect
        height, width = pixels.shape[:2]
        size = self._size or (max(1, round(width * aspect)), height)
        if (width, height) == size and aspect == 1:
            return np.ascontiguousarray(pixels)
        if self._size:
            # Before it is scaled, whose filter would else see what is cut off.
            left, top, right, bottom = crop_box(width, height, *size, float(aspect))
            pixels = pixels[top:bottom, left:right]
        return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS))

    def _rgb(self, frame) -> np.ndarray:
        clear = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
        tagged = _MATRICES.get(
            int(frame.colorspace), "bt709" if frame.height >= 720 or frame.width >= 1280 else "bt601"
        )
        full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
        key = (frame.width, frame.height, frame.format.name, tagged, full, clear)
        if key not in self._graphs:
            # A stream that changes from frame to frame keeps one.
            self._graphs = {key: _to_rgb(*key)}
        source, sink = self._graphs[key][1:]
        frame.pts = None
        source.push(frame)
        pixels = sink.pull().to_ndarray()
        if not clear:
            return pixels
        alpha = pixels[..., 3:].astype(np.uint16)
        if alpha.min() < 255:
            self._notes[_joined(self._path)] = None
        return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _to_rgb(width: int, height: int, pix_fmt: str, matrix: str, full: bool, clear: bool) -> tuple[Any, Any, Any]:
    """A graph of filters that turns frames into rgb24 (rgba where they are clear in places), with its two ends.

    swscale's reformatting as PyAV calls it heeds matrix and range in some versions only, and is off by up to 2 of 255
    for 10 bits.
    """
    from av.filter import Graph

    graph = Graph()
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt={pix_fmt}:time_base=1/1000:pixel_aspect=1/1")
    how = f"flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:in_color_matrix={matrix}:in_range={'pc' if full else 'tv'}"
    middle, colours, sink = (
        graph.add("scale", how),
        graph.add("format", "rgba" if clear else "rgb24"),
        graph.add("buffersink"),
    )
    source.link_to(middle)
    middle.link_to(colours)
    colours.link_to(sink)
    graph.configure()
    return graph, source, sink


def _display(frame) -> tuple[bool, bool, bool]:
    """How a camera says that a frame is to be turned, in the quarters that ``_turned`` knows: from its display matrix
    (ISO/IEC 14496-12, 6.2.2)."""
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return False, False, False
    if len(matrix) < 9:
        return False, False, False
    a, b, _, c, d = matrix[:5].tolist()
    # x' = a x + c y and y' = b x + d y: the larger of a row says which side it comes from, its sign in which direction.
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _teller(on_note: Tell | None) -> Tell:
    return on_note or (lambda note: logger.warning("%s", note))
