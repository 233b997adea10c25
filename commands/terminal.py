"""What ``generate.py`` prints and reads in a terminal: lines in its language, bars, errors as sentences, paths."""

import argparse
import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.dependencies import import_failure
from cogvideox.languages import preferred, translate
from cogvideox.words import reason, short

if TYPE_CHECKING:
    from cogvideox.events import Events

#: Settings that nodes, and the engine as they do, call otherwise than an option is called.
OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in ("on_mismatch", "on_nan", "references", "reference_frames", "reference_guidance")
    },
    **{"denoise": "--strength", "action": "--on-black"},
    **{"cfg_start": "--cfg-range START", "cfg_end": "--cfg-range END"},
}
#: What was printed already, where no line is to be printed twice.
_said: set[str] | None = None
#: Whether this is not the first of several processes: it prints errors alone.
_quiet = False


def keep_quiet(quiet: bool) -> None:
    """Have nothing printed but errors, or all."""
    global _quiet
    _quiet = quiet


def in_words(text: str) -> str:
    """Say a finished English text in the terminal's language."""
    return translate(text, preferred())


def lines_of(text: str, width: int) -> Iterator[str]:
    """Break a text into lines of at most ``width`` columns: between words, and between letters two columns wide, but
    not before signs that end something, nor after those that begin it."""
    line, columns = "", 0
    for piece in re.findall(r"[（“]*(?:[!-~]+|[^（“ ])[，。；：、）”]*| +|.", text):
        size = sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in piece)
        if line and columns + size > max(width, 20):
            yield line.rstrip()
            line, columns, piece = "", 0, piece.lstrip()
        line, columns = line + piece, columns + size
    yield line


def told(error: BaseException) -> str:
    """Say in a sentence what ended a run."""
    error = import_failure(error) or error
    if isinstance(error, ValueError | RuntimeError | argparse.ArgumentTypeError):
        return f"error: {error}" if str(error) else f"error: {type(error).__name__}"
    if isinstance(error, MemoryError):
        return (
            f"error: this machine ran out of memory ({reason(error)}). Close other programs, or make the video "
            "smaller or shorter."
        )
    if isinstance(error, OSError):
        what = (
            f"{short(error.filename, 400)} cannot be read or written"
            if error.filename
            else "Something cannot be read or written"
        )
        return f"error: {what} ({reason(error)}). Check that it is there, your rights, and that the disk is not full."
    # Whatever nobody thought of: a person sees where it is if they want to.
    return (
        f"error: something failed in a way that this program does not know ({type(error).__name__}: "
        f"{reason(error)}). Run it again with --debug to see where, and report that."
    )


def say(text: str, is_data: bool = False) -> None:
    """Print a line, in the terminal's language unless it is for a program. Where nobody reads any more (``| head``, a
    terminal that was closed) or the log's disk is full, the run goes on without.

    Raises:
        OSError: if a program would get half of its data.
    """
    if _quiet or (_said is not None and text in _said):
        return
    if _said is not None:
        _said.add(text)
    try:
        print(printable(text if is_data else in_words(text)), flush=True)
    except OSError as error:
        mute(sys.stdout)
        if is_data and not isinstance(error, BrokenPipeError):
            raise


@contextmanager
def each_once(said: set[str]) -> Iterator[None]:
    """Have lines that are in ``said``, or were printed before in a ``with`` block, not printed."""
    global _said
    before, _said = _said, said
    try:
        yield
    finally:
        _said = before


def complain(text: str, debug: bool = False) -> None:
    """Print an error in the terminal's language, with a traceback before it where ``debug`` asks for one."""
    with suppress(OSError):
        if debug:
            traceback.print_exc()
        print(printable(in_words(text)), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A text whose names of files are no UTF-8, with those bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def mute(stream) -> None:
    """Let a closed pipe's stream end nowhere, so that nothing fails on it again, at exit neither."""
    with open(os.devnull, "w", encoding="utf-8") as null, suppress(OSError, ValueError):
        os.dup2(null.fileno(), stream.fileno())


def path_of(text: str) -> Path:
    """A path as people give it: quotes that the shell left around it are taken off, ``~`` is the home folder."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and not os.path.lexists(text):
        text = text[1:-1]
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"'{short(text)}' is no path: it is empty, or holds a letter that no path may have"
        )
    if text.lower().startswith(("http://", "https://", "ftp://", "s3://", "hf://")):
        raise argparse.ArgumentTypeError(
            f"{short(text, 200)} is an address on the web, and only files on this machine are read: download it first"
        )
    with suppress(RuntimeError):  # A user that is not there: the name as it is, which is then not found.
        return Path(text).expanduser()
    return Path(text)


def terminal_events() -> "Events":
    """What a run tells, in a terminal: a bar for each kind of work, and sentences."""
    from tqdm import tqdm

    from cogvideox.events import Events

    class Terminal(Events):
        def __init__(self) -> None:
            self._bars: dict[str, Any] = {}

        def note(self, text: str, level: int = logging.WARNING) -> None:
            say(text)

        def progress(self, what: str, done: int, total: int, unit: str) -> None:
            if _quiet:
                return
            try:
                if what not in self._bars:
                    self._bars[what] = tqdm(total=total, desc=in_words(what), unit=unit, unit_scale=unit == "B")
                bar = self._bars[what]
                bar.total = total
                bar.update(done - bar.n)
                if done == total:
                    # The next of its kind has a bar of its own.
                    self._bars.pop(what).close()
            except OSError:
                mute(sys.stderr)

    return Terminal()
