"""Read pictures (through Pillow) as phones, cameras and programs make them, and bring them to what the model
reads."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .events import Events
from .files import open_regular
from .media import Tell, from_library, joined_sentence, turned
from .words import reason, short

#: Pixels of a picture, as it is decoded: phones make 200 million. And those of a JPEG, which is decoded at up to an
#: eighth of its sides.
_MOST_PIXELS, _MOST_JPEG_PIXELS = 210_000_000, 1_000_000_000
#: Pixels of a picture that is kept: one of 8K. Larger ones are shrunk by a whole number while they are read.
_KEPT_PIXELS = 7680 * 4320
#: What Pillow is let try: its other readers start programs (EPS) or are no pictures (FITS, WMF).
_FORMATS = """PNG JPEG MPO JPEG2000 TIFF GIF WEBP AVIF HEIF BMP DIB TGA PPM ICO QOI DDS PCX SGI PSD""".split()
#: What HEIC pictures say that they are.
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
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


def read_image(path: Path | str, events: Events | None = None) -> torch.Tensor:
    """Read an image file: turned as its EXIF data says, in sRGB, transparency joined with white; float32 ``[1, H, W,
    3]`` in 0..1.

    16 bits and floating point keep their precision where they are grey. One of more pixels than an 8K screen is read
    smaller.

    Args:
        events: told what was changed or guessed.

    Raises:
        ValueError: if it is not there, no image that Pillow reads, cut off, too large, or of values whose white is not
            known.
    """
    from PIL import Image

    path, tell = Path(path), (events or Events()).note
    with open_regular(path, " as an image") as raw, io.BufferedReader(raw) as file:
        head = file.read(4096)
        file.seek(0)
        if path.suffix.lower() in _RAW:
            raise ValueError(
                f"{short(path, 400)} is a camera's raw file, which has to be developed first. Export it as PNG or JPEG."
            )
        advice = _image_advice(head)
        with from_library(path, "as an image", advice), _large_pictures():
            Image.init()
            if _is_heic(head) and "HEIF" not in Image.OPEN:
                # Of itself this package tells Pillow nothing.
                with suppress(ImportError):
                    import_module("pillow_heif").register_heif_opener()
            image = Image.open(file, formats=[name for name in _FORMATS if name in Image.OPEN])
            width, height = image.size
            if image.format in ("JPEG", "MPO") and width * height > _KEPT_PIXELS:
                # A JPEG can be decoded at a half, a quarter or an eighth.
                share = (_KEPT_PIXELS / width / height) ** 0.5
                image.draft(None, (int(width * share), int(height * share)))
        # Those of 32 bits a pixel are copied once more.
        most = _MOST_PIXELS // 4 if image.mode in ("F", "I") else _MOST_PIXELS
        if image.size[0] * image.size[1] > most or width * height > _MOST_JPEG_PIXELS:
            raise ValueError(
                f"{short(path, 400)} is {width}x{height} pixels ({width * height / 1e6:,.0f} million), more than is "
                f"read ({most / 1e6:.0f} million): a video shows about one million. Scale it down first."
            )
        with from_library(path, "as an image", advice), _large_pictures():
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
            with from_library(path, "as an image", advice), _large_pictures():
                pixels = _colours(image, path, tell, factor)
    if moving:
        tell(f"{short(path)} holds several pictures: the first is used.")
    if pixels.shape[0] * pixels.shape[1] < height * width:
        tell(
            f"{short(path)} is {width}x{height} pixels, more than a video can show: it was read as "
            f"{pixels.shape[1]}x{pixels.shape[0]}."
        )
    tensor = torch.from_numpy(np.ascontiguousarray(turned(pixels, *turn)))[None]
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


def _orientation(image: Any, path: Path, tell: Tell) -> int:
    """Read EXIF's orientation of a loaded picture, unless Pillow has turned it already, as it does with TIFF."""
    try:
        return 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    except Exception as error:
        # Pillow's reader of EXIF raises what it likes where that is damaged; the picture itself is well.
        tell(f"The EXIF data of {short(path)} is damaged ({reason(error)}), so the picture is taken as it lies.")
        return 1


def _deep(image: Any, path: Path, tell: Tell, factor: int) -> np.ndarray:
    """Read a grey picture of more than 8 bits: float32 ``[H, W]`` in 0..1.

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
        tell(joined_sentence(path))
    height, width = (max(1, side // factor) for side in values.shape)
    blocks = values[: height * factor, : width * factor].reshape(height, min(factor, values.shape[0]), width, -1)
    grey = (blocks.mean((1, 3), dtype=np.float32) / np.float32(white)).clip(0, 1)
    if tags.get(262) == 0 and white != 1:
        grey = 1 - grey  # TIFF's WhiteIsZero, which Pillow heeds for 8 bits only.
    return grey


def _colours(image: Any, path: Path, tell: Tell, factor: int) -> np.ndarray:
    """Bring a picture of 8 bits to sRGB without transparency: uint8 ``[H, W, 3]``, shrunk by ``factor``. In strips, as
    it may be large."""
    width, height = image.size
    rows = max(1, (1 << 22) // width // factor) * factor
    to_srgb = _profile(image, path, tell)
    strips, joined = [], False
    for top in range(0, height, rows):
        strip, clear = _opaque(image.crop((0, top, width, min(height, top + rows))))
        strip, joined = to_srgb(strip), joined or clear
        strips.append(np.asarray(strip.reduce(factor) if factor > 1 else strip))
    if joined:
        tell(joined_sentence(path))
    return np.concatenate(strips)


def _opaque(image: Any) -> tuple[Any, bool]:
    """Take palette and transparency from a Pillow image, joining it with white; and say whether any was transparent.

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


def _profile(image: Any, path: Path, tell: Tell) -> Callable[[Any], Any]:
    """Return what brings a picture without transparency to sRGB: by its colour profile (ICC) where it has one."""
    icc, mode = image.info.get("icc_profile"), image.mode

    def plain(picture: Any) -> Any:
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    # Any, as its type hints leave out what littlecms itself gives.
    cms: Any = None
    with suppress(ImportError):
        from PIL import ImageCms

        cms = ImageCms
    space = None
    if cms is not None and (icc or mode == "LAB"):
        try:
            profile = cms.ImageCmsProfile(io.BytesIO(icc)) if icc and mode != "LAB" else cms.createProfile("LAB")
            space = "LAB" if mode == "LAB" else profile.profile.xcolor_space.strip()
            name = (
                short(" ".join((profile.profile.profile_description or "without a name").split()), 60)
                if space != "LAB"
                else "CIELAB"
            )
            wanted: Any = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}.get(space)
            flat = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB", "1": "L", "LA": "L", "La": "L"}.get(
                mode, mode
            )
            transform = None
            if wanted == flat or (wanted == "RGB" and flat == "L"):
                transform = cms.buildTransform(profile, cms.createProfile("sRGB"), wanted, "RGB")
        except Exception as error:
            # littlecms' errors have types of their own, and a damaged profile raises others too; the picture itself is
            # well.
            tell(f"The colour profile of {short(path)} is damaged ({reason(error)}): its colours are taken as sRGB.")
            return plain
        if transform is not None:
            if "srgb" in name.lower() and _keeps_grey(cms, transform, wanted):
                return plain
            tell(f"The colours of {short(path)} were brought from its profile ({name}) to sRGB, which the model knows.")
            return lambda picture: cms.applyTransform(
                picture if picture.mode == wanted else picture.convert(wanted), transform
            )
        tell(
            f"The colour profile of {short(path)} ({name}) is for another kind of picture than {mode}: its colours "
            "are taken as sRGB."
        )
    elif icc and cms is None:
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


def _keeps_grey(cms: Any, transform: Any, mode: str) -> bool:
    """Return whether a profile that is called sRGB is: linear ones, as of GIMP, have it in their names too."""
    from PIL import Image

    moved = cms.applyTransform(Image.new(mode, (1, 1), "gray"), transform).getpixel((0, 0))
    return all(abs(value - 128) < 8 for value in moved)


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Run Pillow without its own limit of pixels, whose error names no size, and without its warnings."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _is_heic(head: bytes) -> bool:
    """Return whether a file that begins so is an HEIC picture."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC


def _image_advice(head: bytes) -> str:
    """Say what to do about a file that Pillow cannot read, by its first bytes."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    start = head.lstrip().lower()
    if not head:
        return "The file is empty: copy or download it again."
    if _is_heic(head):
        return (
            "It is an HEIC picture, as iPhones make them, which Pillow knows with the package pillow-heif alone: "
            "install that, or save the picture as JPEG or PNG (on the phone: Settings, Camera, Formats, Most "
            "Compatible)."
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
