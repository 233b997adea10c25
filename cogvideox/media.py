"""Do what reading pictures (``image_files``) and clips (``clip_files``) has in common: say in sentences what libraries
raise and what was changed, and turn pixels upright."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .words import reason, short

#: What is called with a sentence for the user.
Tell = Callable[[str], None]


class Refused(ValueError):
    """A sentence of the pack's own, raised while a library is at work: ``from_library`` lets it through."""


@contextmanager
def from_library(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a file of the user's into a sentence.

    Raises:
        ValueError: with what the library said, and ``advice``.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        # Damaged files make Pillow, littlecms and ffmpeg raise anything: struct.error, SyntaxError, KeyError,
        # zlib.error, MemoryError …
        raise ValueError(f"{short(path, 400)} cannot be read {what} ({said(error)}). {advice}") from error


def said(error: Exception) -> str:
    """Quote what a library said, without the names it has for the file."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is in no format that Pillow knows"
    if getattr(error, "errno", None) == errno.ENOMEM:
        # ffmpeg takes a number of a file for a size, and refuses it.
        return "it claims more than any memory holds, as a damaged file does"
    return getattr(error, "strerror", None) or reason(error)


def joined_sentence(path: Path) -> str:
    """Say that transparency was joined with white."""
    return (
        f"{short(path)} is transparent in places: it was joined with a white background. Join it with another first "
        "if white is not wanted."
    )


def turned(pixels: np.ndarray, swap: bool, mirror: bool, flip: bool) -> np.ndarray:
    """Turn ``[H, W, C]``: rows and columns swapped, then mirrored left to right, then top to bottom."""
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    pixels = pixels[:, ::-1] if mirror else pixels
    return pixels[::-1] if flip else pixels
