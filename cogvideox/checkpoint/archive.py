"""The zip archive that ``torch.save`` writes: its pickle, and where its storages lie in the file. Only its directory
and the pickle are read."""

import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from ..words import reason, short
from .headers import what_it_is

#: Bytes of the archive's directory and of its pickle: SAT's file of CogVideoX-5B has 0.1 and 0.2 million.
_MAX_DIRECTORY, _MAX_PICKLE = 4 << 20, 16 << 20


class Damaged(Exception):
    """What is wrong with a file."""


@dataclass(frozen=True)
class Archive:
    """Its pickle, and where the storages lie in the file: (offset, bytes) by their names."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]


class _Bounded:
    """A file as zipfile reads it, which would read a directory of any size."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int = -1) -> bytes:
        if count > _MAX_DIRECTORY:
            raise Damaged(f"the directory of the archive would take {count:,} bytes, which no checkpoint's does")
        return self._read(_MAX_DIRECTORY if count < 0 else count)


def open_archive(file: BinaryIO, size: int) -> Archive:
    """Open an archive of ``size`` bytes as ``torch.save`` writes it: its directory alone is read.

    Raises:
        Damaged: if it is something else, cut off or damaged.
    """
    head = file.read(512)
    if not head.startswith(b"PK\x03\x04"):
        raise Damaged(what_it_is(head) or "it is no archive as torch.save has written them since version 1.6")
    try:
        with zipfile.ZipFile(_Bounded(file)) as directory:
            infos = directory.infolist()
    except (Damaged, OSError):
        raise
    except Exception as error:
        # zipfile knows BadZipFile; damaged numbers bring struct.error, NotImplementedError, UnicodeDecodeError and
        # others out of it.
        raise Damaged(f"the archive is truncated or damaged ({reason(error)})") from error
    names = {info.filename: info for info in infos}
    if len(names) < len(infos):
        raise Damaged("two records of the archive have one name")
    pickles = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Damaged(f"the archive holds {len(pickles) or 'no'} data.pkl, and one that torch.save has written has one")
    root = pickles[0].removesuffix("data.pkl")
    wanted = [name for name in names if name.startswith(f"{root}data/") or name in (pickles[0], f"{root}byteorder")]
    places = {name: _place(file, size, names[name]) for name in wanted}
    end = 0
    for name, (offset, count) in sorted(places.items(), key=lambda item: item[1]):
        if offset < end:
            raise Damaged(f"{short(name)} and the record before it share bytes")
        end = offset + count
    if _read(file, names.get(f"{root}byteorder"), places) not in (b"", b"little"):
        raise Damaged("it was written on a machine of another byte order (big-endian)")
    content = _read(file, names[pickles[0]], places)
    return Archive(
        content,
        {name.removeprefix(f"{root}data/"): place for name, place in places.items() if name.startswith(f"{root}data/")},
    )


def _place(file: BinaryIO, size: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes lie: (offset, bytes). torch stores them as they are."""
    if info.flag_bits & 1:
        raise Damaged("the archive is locked with a password: unpack it, and pack nothing")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Damaged(
            "the archive was packed again, with compression, and torch.save uses none: unpack it, and load and save "
            "it with torch"
        )
    file.seek(info.header_offset)
    local = file.read(30)
    begin = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if local[:4] != b"PK\x03\x04" or begin + info.file_size > size:
        raise Damaged(f"the archive is truncated or damaged: {short(info.filename)} is not where its directory says")
    return begin, info.file_size


def _read(file: BinaryIO, info: zipfile.ZipInfo | None, places: dict[str, tuple[int, int]]) -> bytes:
    """A small record; nothing, if there is none."""
    if info is None:
        return b""
    offset, count = places[info.filename]
    if count > _MAX_PICKLE:
        raise Damaged(
            f"{short(info.filename)} would take {count:,} bytes, and what it says of weights takes at most "
            f"{_MAX_PICKLE:,}"
        )
    file.seek(offset)
    content = file.read(count)
    if zlib.crc32(content) != info.CRC:
        raise Damaged(f"{short(info.filename)} is damaged: its checksum is another")
    return content
