"""The workflow that ComfyUI writes into the pictures and videos it saves, read out of their metadata: no pixel is
decoded, and of a PNG or WebP no library is asked."""

import logging
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Literal

from cogvideox.files import MAX_TEXT, open_regular
from cogvideox.words import reason

logger = logging.getLogger(__name__)

#: Endings of what ComfyUI and its packs save and share, and of which workflows are asked for.
_VIDEOS = (".mp4", ".webm", ".mkv", ".mov")
PICTURES = (".png", ".apng", ".webp", ".jpg", ".jpeg", ".gif", ".avif", *_VIDEOS)
#: Under what a workflow stands, as the page saves it before as the API takes it; the last as ComfyUI-VideoHelperSuite
#: has it, with both in one.
_KEYS = ("workflow", "prompt", "comment")
#: Pieces of a file that are gone through: a picture of 100 MB has 13,000.
_MOST_CHUNKS = 200_000


def texts_in(file: Path) -> list[str]:
    """The texts in a picture's or video's metadata that may be workflows, the best first; none, if there are none or
    its kind is not known.

    Raises:
        ValueError: if it cannot be read.
    """
    with open_regular(file) as opened:
        head = opened.read(12)
        size = os.fstat(opened.fileno()).st_size
        read = None
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            read = _png
        elif head[:4] == b"RIFF" and head[8:] == b"WEBP":
            read = _webp
        elif file.suffix.lower() in _VIDEOS:
            read = _video
        found: dict[str, str] = {}
        try:
            for key, text in read(opened, size) if read else ():
                found.setdefault(key.lower(), text)
        except OSError as error:
            logger.info("%s: %s", file, reason(error))
    return [found[key] for key in _KEYS if key in found]


def _chunks(file: FileIO, size: int, begin: int, order: Literal["little", "big"]) -> Iterator[tuple[bytes, int]]:
    """The pieces of a PNG or RIFF file, by their kinds, with the file at their beginning: (kind, bytes)."""
    for _ in range(_MOST_CHUNKS):
        file.seek(begin)
        head = file.read(8)
        if len(head) < 8:
            return
        is_png = order == "big"
        length = int.from_bytes(head[:4] if is_png else head[4:], order)
        if begin + 8 + length > size:
            return
        yield (head[4:] if is_png else head[:4]), length
        # A checksum follows in a PNG, and a zero where a length is odd in RIFF.
        begin += 8 + length + (4 if is_png else length % 2)


def _png(file: FileIO, size: int) -> Iterator[tuple[str, str]]:
    left = MAX_TEXT
    for kind, length in _chunks(file, size, 8, "big"):
        # The last is what SaveAnimatedPNG of ComfyUI writes, as a tEXt.
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"comf") or length > left:
            continue
        left -= length
        key, _, data = file.read(length).partition(b"\0")
        if key.lower().decode("latin-1") not in _KEYS:
            continue
        if kind == b"iTXt":
            # Whether it is packed, how, its language and its key in that.
            packed, data = data[:1] == b"\1", data[2:].split(b"\0", 2)[-1]
        else:
            packed, data = kind == b"zTXt", data[1:] if kind == b"zTXt" else data
        with suppress(zlib.error):
            text = zlib.decompressobj().decompress(data, MAX_TEXT) if packed else data
            yield key.decode("latin-1"), _decoded(text)


def _decoded(text: bytes) -> str:
    """A text of a PNG: UTF-8, as ComfyUI's page reads and ComfyUI-Custom-Scripts writes all of them, or latin-1."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _webp(file: FileIO, size: int) -> Iterator[tuple[str, str]]:
    """ComfyUI keeps ``workflow:{…}`` and ``prompt:{…}`` in texts of EXIF, which end in a zero."""
    for kind, length in _chunks(file, size, 12, "little"):
        if kind == b"EXIF" and length <= MAX_TEXT:
            for match in re.finditer(rb"(?i)(workflow|prompt):(\{[^\0]*)", file.read(length)):
                yield match[1].decode(), match[2].decode("utf-8", "replace")


def _video(file: FileIO, size: int) -> Iterator[tuple[str, str]]:
    """Through FFmpeg, which knows the containers."""
    try:
        import av
    except ImportError as error:
        logger.info("The metadata of a video cannot be read: %s", reason(error))
        return
    file.seek(0)
    try:
        with av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="ignore") as container:
            found = dict(container.metadata)
    except (OSError, ValueError, av.FFmpegError) as error:
        logger.info("The metadata of a video cannot be read: %s", reason(error))
        return
    yield from ((key, text) for key, text in found.items() if len(text) <= MAX_TEXT)
