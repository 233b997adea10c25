"""Safetensors headers: every tensor's name, dtype, shape and place, from the first bytes of a file.

Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON header, then the
data). The header is read by hand because the library maps the whole file to answer the same question, and does not tell
a truncated download from a damaged one. What the library refuses is refused here, too.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..dtypes import FP8_DTYPES
from ..files import open_regular, parse_json, unreadable
from ..words import reason, short
from .entries import CONTROL
from .foreign import PACKED_DTYPES, packed_error

#: Bytes of a header that are read: those of CogVideoX's largest file have 130,000, and the library's own limit is 100
#: million. Parsed, they take up to 25 times as much memory.
MAX_HEADER = 16 << 20
#: Beyond any tensor's size, and within what torch can count.
MOST_ELEMENTS = 2**62
#: Bytes that tell most tensors from zeros, and those that are read at a time where they do not.
_PAGE, _PIECE = 1 << 12, 1 << 20
#: torch's own limit.
MOST_DIMENSIONS = 64

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """One tensor in a file: where its bytes lie (``offset`` from the start of the file) and how they are to be read.

    A tuple, because a checkpoint has a thousand of them and opening it takes milliseconds.

    Attributes:
        more: where the bytes go on, as (offset, bytes), for a tensor that is put together from rows of another.
        quantization: GGUF's number of the quantization, for bytes (``uint8``) that stand for numbers of this shape.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    more: tuple[tuple[int, int], ...] = ()
    quantization: int | None = None

    @property
    def kind(self) -> torch.dtype | str:
        """How it is stored: its dtype, or ``GGUF Q4_K``."""
        if self.quantization is None:
            return self.dtype
        from gguf import GGMLQuantizationType

        return f"GGUF {GGMLQuantizationType(self.quantization).name}"

    @property
    def is_packed(self) -> bool:
        """Whether it is in fp8 or quantized, and so stays as it is in memory."""
        return self.dtype in FP8_DTYPES or self.quantization is not None

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of what lies in the file: where it is quantized, ``[rows, bytes]``; ``[blocks, bytes]`` where no
        row is whole blocks."""
        if self.quantization is None:
            return self.shape
        from gguf import GGML_QUANT_SIZES

        (_, size), rows = GGML_QUANT_SIZES[self.quantization], self.shape[0] if self.shape else 1
        if not rows or self.nbytes % (rows * size):
            rows = self.nbytes // size
        return (rows, self.nbytes // rows if rows else size)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Where its bytes lie, in their order: (offset, bytes)."""
        return ((self.offset, self.nbytes - sum(size for _, size in self.more)), *self.more)

    def rows(self, *numbers: int, of: int) -> "StoredTensor":
        """A view of some of ``of`` equal pieces of the first dimension: a tensor of its own, and no byte is read.

        Raises:
            ValueError: if the first dimension cannot be divided so.
        """
        if not self.shape or self.shape[0] % of or self.more:
            raise ValueError(
                f"A tensor of shape {list(self.shape)} in {short(self.file, 400)} cannot be split into {of} equal "
                "pieces, so it is not what its name says."
            )
        size = self.nbytes // of
        (offset, nbytes), *more = _joined([(self.offset + number * size, size) for number in numbers])
        shape = (self.shape[0] // of * len(numbers), *self.shape[1:])
        return StoredTensor(
            self.file,
            self.dtype,
            shape,
            offset,
            nbytes + sum(count for _, count in more),
            tuple(more),
            self.quantization,
        )


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """A regular file, open for reading, and its size.

    Raises:
        ValueError: if it is no regular file, its download is not finished, or it cannot be read, then or in the
            ``with`` block.
    """
    control = f"{path}{CONTROL}"
    if os.path.lexists(control):
        raise ValueError(
            f"{short(path, 400)} is not whole: its download is not finished, says {short(os.path.basename(control))} "
            "beside it, and until then some of its weights are zeros. Resume the download with aria2 (aria2c -c), or "
            "delete both files and download it again."
        )
    with open_regular(path) as file:
        try:
            yield file, os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ValueError(unreadable(path, error)) from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: kilobytes, whatever the size of the file.

    Raises:
        ValueError: if the file is not safetensors, is damaged, or is shorter or longer than its header says.
        ForeignError: if its weights are packed in a way that is not read here.
    """
    path = Path(path)
    entries, start, size = _json_header(path)
    entries.pop("__metadata__", None)
    try:
        tensors = {name: _entry(path, start, name, value) for name, value in entries.items()}
        end = _end_of_tiles(tensors, start)
    except _Damaged as error:
        raise _not_safetensors(path, size, f"in its header, {error}") from error
    if end > size:
        raise _truncated(path, size, end)
    if end < size:
        raise _not_safetensors(path, size, f"it goes on for {size - end:,} bytes after the last tensor of its header")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a safetensors file noted in its header: texts by name, none if nothing.

    Raises:
        ValueError: if its header cannot be read.
    """
    return _json_header(Path(path))[0].get("__metadata__") or {}


def what_it_is(head: bytes) -> str | None:
    """What a file is by its first bytes, for the sentence that says that it is not what was expected; None for what is
    not known."""
    if not head:
        return "it is empty, as a download that never began leaves it"
    if not head.strip(b"\0"):
        return "it begins with nothing but zeros, as a download that was interrupted leaves it"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "it is a web page, which a site sent in the place of the file, as it does where one has to log in or "
            "accept a licence"
        )
    for start, what in _STARTS.items():
        if head.startswith(start):
            return what
    if head[0] == 0x80 and 2 <= int.from_bytes(head[1:2], "little") <= 5:
        return (
            "it is a Python pickle, as torch wrote before version 1.6: open it with the program that made it, and save "
            "it as safetensors"
        )
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    if text.startswith(b"{") or text.startswith(b"["):
        return "it is text in JSON, as a config or an error message of a site"
    return "it is a safetensors file, whatever its name says" if head[8:10] == b'{"' else None


_STARTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, a few lines of text that stand for the file",
    b"GGUF": "it is a GGUF file: give it a name that ends in .gguf",
    b"PK\x03\x04": (
        "it is a zip archive, as torch.save writes: unpack it if it was packed for the download, or give it a name "
        "that ends in .pt"
    ),
    b"PK\x05\x06": "it is an empty zip archive",
    b"\x1f\x8b": "it is packed with gzip: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "it is packed with 7-Zip: unpack it first",
    b"Rar!": "it is packed with RAR: unpack it first",
    b"\xfd7zXZ": "it is packed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "it is packed with zstd: unpack it first",
    b"\x89HDF": "it is an HDF5 file, as Keras writes",
}


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """One tensor of a file, on the host, as it is stored.

    Raises:
        ValueError: if the file ends before.
        OSError: if it cannot be read.
    """
    data, done = torch.empty(stored.nbytes, dtype=torch.uint8), 0
    with open_regular(stored.file) as file:
        for offset, nbytes in stored.ranges:
            file.seek(offset)
            fill(file, data.numpy().data[done : done + nbytes], stored.file)
            done += nbytes
    return data.view(stored.dtype).view(stored.raw_shape)


def is_blank(stored: StoredTensor) -> bool:
    """Return whether there is nothing but zero bytes where a tensor lies. Of one that has others, its beginning is
    read.

    Raises:
        OSError: if it cannot be read.
    """
    size = _PAGE
    with open_regular(stored.file) as file:
        for start, nbytes in stored.ranges:
            file.seek(start)
            while nbytes > 0:
                read = file.read(min(size, nbytes))
                if not read or read != bytes(len(read)):
                    return False
                nbytes, size = nbytes - len(read), _PIECE
    return stored.nbytes > 0


def fill(file: FileIO, view: memoryview, path: Path) -> None:
    """Read from ``file``, unbuffered, until ``view`` is full.

    Raises:
        ValueError: if the file ends before.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(
                f"{short(path, 400)} ended while a tensor was read: it is truncated or being written. Download it "
                "again."
            )
        done += count


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of which none follows right on the one before."""
    joined: list[tuple[int, int]] = []
    for offset, nbytes in ranges:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + nbytes)
        else:
            joined.append((offset, nbytes))
    return joined


def _json_header(path: Path) -> tuple[dict, int, int]:
    """The JSON of a file's header, where the data begins, and the file's size."""
    with opened(path) as (file, size):
        head = file.read(512)
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= MAX_HEADER or head[8:9] != b"{":
            what = (
                f"its header would take {length:,} bytes"
                if head[8:9] == b"{"
                else what_it_is(head) or "it does not start with a header"
            )
            raise _not_safetensors(path, size, what)
        if 8 + length > size:
            raise _truncated(path, size, 8 + length)
        text = head[8 : 8 + length] + file.read(max(0, 8 + length - len(head)))
    try:
        entries = parse_json(
            text.decode("utf-8"),
            object_pairs_hook=_once_each,
            parse_int=_integer if b"-0" in text else None,
            parse_constant=_constant,
        )
        if b"\\ud" in text.lower():
            # Half of a letter that takes two: nothing that is written elsewhere could have it.
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise _not_safetensors(path, size, f"its header cannot be read ({reason(error)})") from error
    noted = entries.get("__metadata__")
    if noted is not None and not (isinstance(noted, dict) and all(isinstance(value, str) for value in noted.values())):
        raise _not_safetensors(path, size, "what its header notes under __metadata__ are not texts by name")
    return entries, 8 + length, size


def _once_each(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{short(name)} stands in it twice")
            seen.add(name)
    return found


def _integer(text: str) -> int | float:
    # To the library -0 is no whole number.
    return float(text) if text == "-0" else int(text)


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


class _Damaged(Exception):
    """What is wrong with a header."""


def _entry(path: Path, data_start: int, name: str, value: Any) -> StoredTensor:
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = begin, end, *shape
    except (KeyError, TypeError, ValueError):
        raise _Damaged(f"{short(name)} is not a tensor with dtype, shape and two data_offsets") from None
    if type(shape) is not list or len(shape) > MOST_DIMENSIONS or set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise _Damaged(
            f"the shape and data_offsets of {short(name)} are not whole numbers: {short(shape)}, {short([begin, end])}"
        )
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None and isinstance(kind, str) and kind in PACKED_DTYPES:
        raise packed_error(PACKED_DTYPES[kind], path, f"{short(name)} is stored as {kind}")
    if dtype is None:
        raise _Damaged(
            f"{short(name)} is stored as {short(kind)}, which is unknown here; known are {', '.join(DTYPES)}"
        )
    if (
        end - begin != prod(shape) * dtype.itemsize
        or prod(filter(None, shape) if 0 in shape else shape) > MOST_ELEMENTS
    ):
        raise _Damaged(
            f"a tensor of shape {short(shape)} in {kind} cannot take {short(end - begin)} bytes, as {short(name)} would"
        )
    return StoredTensor(path, dtype, tuple(shape), data_start + begin, end - begin)


def _end_of_tiles(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """Where the data ends, of which tensors must leave nothing out, and share nothing."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            what = "overlap" if tensor.offset < end else "leave a gap"
            raise _Damaged(
                f"the tensors {what}: {short(name)} begins at byte {tensor.offset - start:,}, and those before it end "
                f"at {end - start:,}"
            )
        end = tensor.offset + tensor.nbytes
    return end


def _truncated(path: Path, size: int, promised: int) -> ValueError:
    return ValueError(
        f"{short(path, 400)} is truncated: it has {size:,} bytes and its header promises {promised:,}, so some "
        "weights are missing. The download was interrupted or the disk was full: delete this file and download it "
        "again."
    )


def _not_safetensors(path: Path, size: int, why: str) -> ValueError:
    return ValueError(
        f"{short(path, 400)} ({size:,} bytes) is not a readable safetensors file: {why}. Weights cannot be taken from "
        "it. If it is a Git LFS pointer or an interrupted download, download the file itself again."
    )
