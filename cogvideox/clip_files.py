"""Read clips and their sound (through PyAV) as phones, cameras and programs make them, and bring them to what the
model reads."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .events import Events
from .files import open_regular
from .frame_pixels import MOST_FRAME_PIXELS, FramePixels
from .media import Tell, from_library, said
from .pictures import nearest_length
from .words import short

_AUDIO_RATES = (44_100, 48_000)
_CLIP_ADVICE = "Check the path, or convert it to mp4."
#: Bytes of address space that a clip is given at first: 340 frames of 1360x768.
_ROOM = 1 << 30


def read_video(
    path: Path | str,
    limit: int | None = None,
    *,
    fps: Fraction | float | None = None,
    size: tuple[int, int] | None = None,
    step: int | None = None,
    in_pairs: bool = False,
    dtype: torch.dtype = torch.float32,
    fit: Callable[[torch.Tensor], torch.Tensor] | None = None,
    events: Events | None = None,
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
        step, in_pairs: cut the clip, or repeat its last frame, to the nearest length that ``check_frames`` takes with
            them.
        dtype: float32 gives 0..1; uint8 gives 0..255, in a quarter of the memory.
        fit: makes of a frame, uint8 ``[H, W, 3]``, what is given of it, in the place of ``size`` and ``dtype``.
        events: told what was changed, cut or guessed.

    Returns:
        ``[F, H, W, 3]``.

    Raises:
        ValueError: if it is not there, no video, or holds no frame that can be decoded.
    """
    path, tell = Path(path), (events or Events()).note
    with _open_clip(path) as container:
        stream = _video_stream(container, path, tell)
        # Each thread holds frames of its own.
        stream.codec_context.thread_count, stream.codec_context.thread_type = 4, "AUTO"
        stream.codec_context.options = {"max_pixels": str(2 * MOST_FRAME_PIXELS)}
        frames, picture = _Frames(container, stream), FramePixels(stream, path, size)
        clip: torch.Tensor | None = None
        count, more = 0, False
        with from_library(path, "as a video", _CLIP_ADVICE):
            for frame, times in _chosen(frames, None if fps is None else Fraction(fps).limit_denominator(1001)):
                picture.check(frame)
                room = times if limit is None else min(times, limit - count)
                if room:
                    pixels = torch.from_numpy(picture.pixels(frame))
                    pixels = pixels if fit is None else fit(pixels)
                    clip = _with_room(clip, count + room, limit, pixels)
                    clip[count : count + room] = pixels
                    count += room
                more = room < times
                if more:
                    break
        duration = _duration(container, stream)
    if clip is None:
        raise _undecoded(path, frames)
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
        seconds = f" ({count / rate:.1f} s)" if rate else ""
        whole = f"{seconds} of {duration:.1f} s" if duration else seconds
        tell(f"Only the first {count} frames{whole} of {short(path)} are used.")
    length, change = (count, None) if step is None else nearest_length(count, step, in_pairs)
    if change:
        tell(change)
    clip = _with_room(clip, length, length, clip[0])[:length]
    clip[count:] = clip[min(count, length) - 1]
    return clip if dtype == torch.uint8 or fit is not None else clip.to(dtype).div_(255)


def read_rate(path: Path | str) -> Fraction:
    """Read how many frames a second a clip has on average, as its file says; 25 where it does not say.

    Raises:
        ValueError: if it is not there, or no video.
    """
    with _open_clip(Path(path)) as container:
        rate = 1 / _Frames(container, _video_stream(container, Path(path), lambda _: None)).usual
    return min(max(rate, Fraction(1)), Fraction(240)).limit_denominator(1001)


def read_shape(path: Path | str) -> tuple[int, int]:
    """Read the width and height in pixels of a clip's frames as ``read_video`` gives them.

    Raises:
        ValueError: if it is not there, no video, or holds no frame that can be decoded.
    """
    path = Path(path)
    with _open_clip(path) as container, from_library(path, "as a video", _CLIP_ADVICE):
        stream = _video_stream(container, path, lambda _: None)
        frames, picture = _Frames(container, stream), FramePixels(stream, path, None)
        for _, frame in frames:
            picture.check(frame)
            height, width, _ = picture.pixels(frame).shape
            return width, height
    raise _undecoded(path, frames)


def read_sound(path: Path | str, seconds: float, events: Events | None = None) -> tuple[np.ndarray, int] | None:
    """Read the sound that goes with the first ``seconds`` of a clip's picture, as stereo.

    Returns:
        float32 ``[2, samples]`` in -1..1, and samples per second; None, with a note, where the clip has none.

    Raises:
        ValueError: if the file or its sound cannot be read.
    """
    import av

    path, tell = Path(path), (events or Events()).note
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
        with from_library(path, "for its sound", "Leave its sound out, or convert the clip to mp4."):
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


def _undecoded(path: Path, frames: "_Frames") -> ValueError:
    """Say that a clip has no frame that can be decoded."""
    return ValueError(
        f"{short(path, 400)} holds no frames that can be decoded{frames.trouble}. Choose another video, or convert it "
        "to mp4."
    )


def _with_room(clip: torch.Tensor | None, frames: int, limit: int | None, like: torch.Tensor) -> torch.Tensor:
    """Return the clip, or one that begins with it, with room for so many frames like ``like``, ``[H, W, 3]``.

    Memory that no frame was written to is not taken from the system.
    """
    if clip is not None and len(clip) >= frames:
        return clip
    usual = max(2 * frames, _ROOM // like.numel())
    larger = torch.empty(max(frames, min(usual, limit or usual)), *like.shape, dtype=like.dtype)
    if clip is not None:
        larger[: len(clip)] = clip
    return larger


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
        with from_library(path, "as a video", advice):
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


def _video_stream(container: Any, path: Path, tell: Tell) -> Any:
    """Choose the stream to read: the largest that is no cover picture.

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


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is the cover picture of a file of sound."""
    # Older PyAV has no dispositions; covers are JPEG or PNG in a file of sound.
    disposition = getattr(stream, "disposition", None)
    if disposition is not None:
        return bool(int(getattr(disposition, "value", disposition)) & 0x400)
    return bool(stream.container.streams.audio) and stream.name in ("mjpeg", "png", "bmp")


def _duration(container: Any, stream: Any) -> float:
    """Return the seconds that the file says it lasts, or 0."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(container.duration or 0) / 1e6


class _Frames:
    """The frames of a stream with their times in seconds from the first, as far as they can be decoded."""

    def __init__(self, container: Any, stream: Any):
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
        """Decode frame by frame, leaving out damaged parts."""
        import av

        try:
            for packet in self._container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError as error:
                    # One packet is damaged; ffmpeg itself goes on with the next.
                    if isinstance(error, av.error.EOFError):
                        return
                    self._broken, self._error = self._broken + 1, said(error)
                    if self._broken > 1000 and not self._seen:
                        return
                    continue
                yield from frames
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, OSError) as error:
            self._error = said(error)

    @property
    def trouble(self) -> str:
        """What ffmpeg said last of damage, in brackets; "" where there was none."""
        return f" ({self._error})" if self._error else ""

    def notes(self, path: Path, duration: float, stopped: bool) -> Iterator[str]:
        """Yield sentences about what could not be read.

        Args:
            duration: seconds that the file says it lasts, or 0.
            stopped: no more was asked for.
        """
        if self._broken:
            yield f"{self._broken} parts of {short(path)} are damaged{self.trouble} and were left out."
        elif self._error:
            yield (
                f"{short(path)} is damaged after {float(self.end):.1f} s{self.trouble}: the {self._seen} frames until "
                "there are used."
            )
        if not stopped and not self._error and duration - float(self.end) > max(0.5, 0.02 * duration):
            yield (
                f"{short(path)} ends after {float(self.end):.1f} s, though it says that it lasts {duration:.1f} s: it "
                "may be cut off."
            )


def _chosen(frames: _Frames, fps: Fraction | None) -> Iterator[tuple[Any, int]]:
    """Choose the frames to show and how many times each: at ``fps``, the nearest to each moment, the earlier of two
    that are as near."""
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
