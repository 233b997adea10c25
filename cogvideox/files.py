"""Read files that people hand over, within bounds, and write files whole or not at all."""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from .words import reason, short, size_text

#: Bytes of a text file (config, index, workflow) that are read: the largest that is known, T5's tokenizer.json, has 2.4
#: MB.
MAX_TEXT = 64 << 20
#: Bytes that stay free on a disk: a full one stops other programs too.
SPARE = 10**9
#: Levels of brackets in brackets: configs have 3, workflows with subgraphs about 12.
MAX_NESTING = 100
#: Letters of a name to which more is added, and its bytes in UTF-8: a name has 255 at most on most disks.
_STEM, _STEM_BYTES = 100, 240


def open_regular(path: Path, as_what: str = "") -> FileIO:
    """Open a file for reading, unbuffered, if it is a regular one: a pipe or device where a file is expected would wait
    for ever, or never end.

    Args:
        as_what: what it is read as, for messages: `` as a video``.

    Raises:
        ValueError: if it is something else, a link to what is gone, or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise ValueError(unreadable(path, error, as_what)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(
                f"{short(path, 400)} is a folder, pipe or device and no regular file, so nothing is read from it. "
                "Choose the file itself."
            )
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def unreadable(path: Path, error: Exception, as_what: str = "") -> str:
    """Say that a file cannot be opened or read, and why."""
    link = (
        f"a link to {short(os.readlink(path), 200)}, which is gone"
        if os.path.islink(path) and not os.path.exists(path)
        else None
    )
    return (
        f"{short(path, 400)} cannot be read{as_what} ({link or reason(error)}). Check the path and your rights, or "
        "download the file again."
    )


def read_bytes(path: Path, limit: int = MAX_TEXT) -> bytes:
    """Read a whole regular file.

    Raises:
        ValueError: if it cannot be read, or has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(
                f"{short(path, 400)} has {size:,} bytes, and a file of its kind has at most {limit:,}: it is "
                "something else. Download it again."
            )
        try:
            return file.read(limit + 1)
        except OSError as error:
            raise ValueError(unreadable(path, error)) from error


def read_text(path: Path, limit: int = MAX_TEXT, by_hand: bool = False) -> str:
    """Read a whole text file in UTF-8, with or without a byte order mark.

    Args:
        by_hand: whether people write it, for whom ``decoded`` reads UTF-16 too, and not other programs.

    Raises:
        ValueError: if it cannot be read, is too large, or no UTF-8.
    """
    data = read_bytes(path, limit)
    try:
        return decoded(data) if by_hand else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{short(path, 400)} is not text in UTF-8 ({reason(error)}), so it cannot be used. Save it as UTF-8, or "
            "download it again."
        ) from error


def decoded(data: bytes) -> str:
    """Decode what people wrote: UTF-8, or UTF-16 with its mark, as PowerShell and Notepad save it.

    Raises:
        UnicodeDecodeError: for another encoding.
    """
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Parse JSON that may be anything.

    Args:
        hooks: of ``json.loads``.

    Raises:
        ValueError: saying what is wrong with it, if it is not JSON, or nested deeper than ``MAX_NESTING``.
    """
    try:
        data = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level, depth = [data] if type(data) in _NESTS else [], 0
    while level := [
        child
        for value in level
        for child in (value.values() if type(value) is dict else value)
        if type(child) in _NESTS
    ]:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError("it is nested too deeply")
    return data


_NESTS = {dict, list}


def read_json(path: Path, limit: int = MAX_TEXT) -> dict:
    """Read a JSON object from a file.

    Raises:
        ValueError: if it cannot be read or is no JSON object.
    """
    try:
        data = parse_json(read_text(path, limit))
    except ValueError as error:
        if str(error).startswith(short(path, 400)):
            raise
        raise ValueError(
            f"{short(path, 400)} is not valid JSON ({reason(error)}), so it cannot be used. Download this file again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{short(path, 400)} should hold a JSON object but holds a {type(data).__name__}. Download this file again."
        )
    return data


@contextmanager
def written_whole(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a path beside ``path``, with its suffix, to write to. That file is renamed to ``path`` when the ``with``
    block ends well, and removed otherwise.

    Args:
        overwrite: whether a file that has the name already is replaced.

    Raises:
        ValueError: if ``path`` exists and is not to be replaced, when entered or when it is given its name.
        OSError: if it cannot be written.
    """
    if not overwrite and os.path.lexists(path):
        raise exists(path)
    partial = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield partial
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_to_new(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def write_whole(path: Path, content: bytes, overwrite: bool = False, like: Path | None = None) -> None:
    """Write a file whole or not at all.

    Args:
        overwrite: whether a file that has the name already is replaced.
        like: the file whose rights it gets; before it has them, it is for nobody else's eyes.

    Raises:
        ValueError: if ``path`` exists and is not to be replaced.
        OSError: if it cannot be written.
    """
    with written_whole(path, overwrite) as partial:
        if like is not None:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        write_synced(partial, [content])
        if like is not None:
            shutil.copymode(like, partial)


def write_synced(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file and wait until it is on the disk: a full or failing one shows here, and not after a rename."""
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def check_space(target: Path, nbytes: int, what: str, work: str, remedy: str) -> None:
    """Refuse to write what the disk has no room for.

    Args:
        nbytes: what it takes, besides ``SPARE``.
        what: what takes it, as the beginning of a sentence, up to the number of bytes.
        work: what would be stopped, and how nothing was done: ``the download halfway, and other programs with it, so
            nothing was fetched``.
        remedy: what to do, in sentences.

    Raises:
        RuntimeError: if there is too little room, or no such disk.
    """
    place = next((path for path in (target.absolute(), *target.absolute().parents) if path.is_dir()), None)
    if place is None:
        raise RuntimeError(
            f"There is no {short(target.anchor)} for {short(target, 400)}, so nothing can be written there. Choose "
            "another folder."
        )
    free = shutil.disk_usage(place).free
    if free < nbytes + SPARE:
        raise RuntimeError(
            f"{what} and {size_text(SPARE)} to spare, but the disk with {short(place, 400)} has only "
            f"{size_text(free)} free. A full disk would stop {work}. {remedy}"
        )


@contextmanager
def disk_errors(target: Path, then: str) -> Iterator[None]:
    """Say in a sentence why something could not be written.

    Args:
        then: what became of it, and what to do, in sentences.

    Raises:
        RuntimeError: for an error of the system.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"{short(target, 400)} cannot be written: {reason(error)}. {then}") from error


def stem_of(path: Path) -> str:
    """Return a file's name without its ending, cut so that 15 bytes can be added to it."""
    stem = path.stem[:_STEM]
    while len(os.fsencode(stem)) > _STEM_BYTES:
        stem = stem[:-1]
    return stem


def exists(path: Path) -> ValueError:
    """Make the error for a file that is not replaced unasked."""
    return ValueError(
        f"{short(path, 400)} exists already and is not replaced unasked. Give another name, or say that it is to be "
        "overwritten."
    )


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename a file, unless another has that name."""
    try:
        # A link is made only where no file has the name; a rename would replace one that came meanwhile.
        os.link(partial, path)
    except FileExistsError as error:
        raise exists(path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EACCES):
            raise
        # No hard links here (FAT, some network drives).
        if os.path.lexists(path):
            raise exists(path) from error
        os.rename(partial, path)
