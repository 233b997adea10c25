"""GGUF: every tensor's name, quantization and place in a file of it, and its blocks in safetensors files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read by hand because the package's
reader maps the file, makes
arrays of all that is in it, and believes every count: a damaged file takes hours or all memory. Its table of
quantizations is used.
"""

import re
import struct
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..dependencies import DependencyError
from ..modules.packed import check_quantization
from ..words import reason, short
from .headers import MOST_ELEMENTS, StoredTensor, opened, what_it_is
from .weight_sets import piece_of

#: GGUF's unquantized types, by their numbers.
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
#: How values of these types are packed; strings and arrays have the numbers after.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: Bytes of a header that are read, and what it may claim: a language model's, with its vocabulary of 260,000 words, has
#: 15 MB.
_MAX_HEADER, _MOST, _NESTING, _DIMENSIONS = 32 << 20, 1 << 16, 4, 8
_PIECE = 1 << 18
_ALIGNMENT = "general.alignment"
#: GGUF counts dimensions backwards, and has at most four of them: tools note the shape of what had more, or rows of no
#: whole number of blocks.
_ORIGINAL = "comfy.gguf.orig_shape."


def read_gguf_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file, as places in it; quantized ones with their logical shape and the number of their
    quantization.

    Raises:
        ValueError: if the file is not GGUF, damaged, one piece of several, or quantized in a way that cannot be undone
            here.
        DependencyError: if the package ``gguf`` is not installed.
    """
    path = Path(path)
    piece = piece_of(path)
    if piece is not None:
        raise ValueError(
            f"{short(path, 400)} is piece {piece[0]} of {piece[1]} of a GGUF file, and one piece alone "
            "cannot run. Join them with llama.cpp: llama-gguf-split --merge FIRST-PIECE.gguf WHOLE.gguf, and choose "
            "the whole file."
        )
    _sizes(path)
    with opened(path) as (file, size):
        try:
            return _tensors(path, _Header(file, size))
        except _Damaged as error:
            file.seek(0)
            start = file.read(512)
            what = (
                f"it is damaged: {error}"
                if start.startswith(b"GGUF")
                else what_it_is(start) or "it does not begin with GGUF"
            )
            raise ValueError(
                f"{short(path, 400)} ({size:,} bytes) is not a readable GGUF file: {what}. No weights can be taken "
                "from it. If the download was interrupted, delete it and download it again."
            ) from error


def read_blocks(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, with those of GGUF's blocks under the names of the weights that they stand
    for.

    ComfyUI-CogVideoX-MZ writes them: ``X.Q4_0_qweight``, in bytes ``[rows, bytes]``, for ``X.weight``; biases and other
    layers are plain.

    Raises:
        ValueError: if the bytes are no whole blocks, or a weight is there twice.
        DependencyError: if the package ``gguf`` is not installed.
    """
    if not any(name.endswith("_qweight") for name in tensors):
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.([A-Z0-9_]+)_qweight", name)
        number = _numbers(path).get(match[2]) if match else None
        if match and number is not None:
            name, tensor = f"{match[1]}.weight", _unpacked(path, name, number, tensor)
            if name in tensors:
                raise ValueError(
                    f"{short(path, 400)} holds {short(name)} twice, plain and in blocks of GGUF, and which is meant "
                    "is not known. Choose another file."
                )
        if name in found:
            raise ValueError(
                f"{short(path, 400)} holds {short(name)} in two quantizations, and which is meant is not known. "
                "Choose another file."
            )
        found[name] = tensor
    return found


def _unpacked(path: Path, name: str, number: int, tensor: StoredTensor) -> StoredTensor:
    block, size = _sizes(path)[number]
    if tensor.dtype != torch.uint8 or not tensor.shape or tensor.shape[-1] % size:
        raise ValueError(
            f"{short(path, 400)}: {short(name)} should hold blocks of {size} bytes, and is {tensor.dtype} of shape "
            f"{list(tensor.shape)}, so the weight cannot be told from it. The file is damaged: download it again."
        )
    shape = (*tensor.shape[:-1], tensor.shape[-1] // size * block)
    return _stored(path, name, number, shape, tensor.offset, tensor.nbytes)


def _stored(path: Path, name: str, number: int, shape: tuple[int, ...], offset: int, nbytes: int) -> StoredTensor:
    if number in _PLAIN:
        return StoredTensor(path, _PLAIN[number], shape, offset, nbytes)
    check_quantization(number, name, path)
    return StoredTensor(path, torch.uint8, shape, offset, nbytes, quantization=number)


@cache
def _table() -> dict[int, tuple[int, int]]:
    from gguf import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _sizes(path: Path) -> dict[int, tuple[int, int]]:
    """Numbers and bytes of a block, by the number of the quantization."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"{short(path, 400)} is a GGUF file, and the package gguf that knows such files is not installed. Install "
            "it in ComfyUI's Python environment with: python -m pip install gguf, then restart ComfyUI."
        ) from error
    return _table()


def _numbers(path: Path) -> dict[str, int]:
    from gguf import GGMLQuantizationType

    return {GGMLQuantizationType(number).name: number for number in _sizes(path)}


class _Damaged(Exception):
    """What is wrong with a header."""


class _Header:
    """The bytes of a header, read as far as they are asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self.size, self.at = size, 0
        self._file, self._data = file, b""

    def take(self, count: int) -> int:
        """Go on by ``count`` bytes, and say where they begin."""
        start, end = self.at, self.at + count
        if end > len(self._data):
            if end > self.size:
                raise _Damaged(
                    f"truncated: its header goes on for {count:,} bytes after byte {start:,}, and there are "
                    f"{self.size - start:,}"
                )
            if end > _MAX_HEADER:
                raise _Damaged(f"its header is larger than {_MAX_HEADER:,} bytes, which no model's is")
            # Doubled: in pieces of one size, what was read would be copied again and again.
            self._data += self._file.read(max(end - len(self._data), _PIECE, len(self._data)))
            if end > len(self._data):
                raise _Damaged("truncated: it ended while it was read")
        self.at = end
        return start

    def numbers(self, code: str) -> tuple[Any, ...]:
        start = self.take(struct.calcsize(code))
        return struct.unpack_from(code, self._data, start)

    def text(self, what: str) -> str:
        (length,) = self.numbers("<Q")
        start = self.take(length)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damaged(f"{what} is not text ({reason(error)})") from None

    def skip(self, kind: int, nesting: int = 0) -> None:
        """Go past a value."""
        if kind in _SCALARS:
            self.take(struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self.take(self.numbers("<Q")[0])
        elif kind == _ARRAY and nesting < _NESTING:
            inner, count = self.numbers("<IQ")
            if inner in _SCALARS:
                self.take(count * struct.calcsize(_SCALARS[inner]))
                return
            # Each has its length before it, and arrays their type, too.
            if count * 8 > self.size - self.at:
                raise _Damaged(
                    f"truncated: it has an array of {count:,} values, and {self.size - self.at:,} bytes are left"
                )
            for _ in range(count):
                self.skip(inner, nesting + 1)
        else:
            raise _Damaged(
                "it has arrays in arrays in arrays" if kind == _ARRAY else f"it has a value of the unknown type {kind}"
            )

    def shape(self, kind: int, name: str) -> tuple[int, ...]:
        """An array of whole numbers, the shape of a tensor."""
        inner, count = self.numbers("<IQ") if kind == _ARRAY else (None, 0)
        if _SCALARS.get(inner, "f") in "fd?" or count > _DIMENSIONS:
            raise _Damaged(f"the noted shape of {short(name)} is no list of up to {_DIMENSIONS} whole numbers")
        sizes = self.numbers(f"<{count}{_SCALARS[inner]}")
        if any(size < 0 for size in sizes):
            raise _Damaged(f"the noted shape of {short(name)} is {list(sizes)}")
        return sizes


def _tensors(path: Path, header: _Header) -> dict[str, StoredTensor]:
    magic, version = header.numbers("<4sI")
    if magic != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    if version and not version & 0xFFFF:
        raise _Damaged(
            "it is written in big-endian order, for machines that this does not run on; choose the little-endian file"
        )
    if version not in (2, 3):
        raise _Damaged(f"it is of version {version} of GGUF, and versions 2 and 3 can be read")
    count, keys = header.numbers("<QQ")
    if max(count, keys) > _MOST:
        raise _Damaged(f"it claims {count:,} tensors and {keys:,} notes, and no model has more than {_MOST:,}")
    alignment, originals = _notes(header, keys)
    places = [_place(header) for _ in range(count)]
    if len({name for name, *_ in places}) < count:
        raise _Damaged("two of its tensors have one name")
    begin = _aligned(header.at, alignment)
    known, found, end = _sizes(path), {}, 0
    for name, sizes, number, offset in places:
        block, size = known.get(number, (0, 0))
        elements = prod(sizes)
        if not block or prod(filter(None, sizes)) > MOST_ELEMENTS or (sizes[0] if sizes else 1) % block:
            raise _Damaged(f"{short(name)} cannot be of shape {list(reversed(sizes))} and of type {number}")
        nbytes, shape = elements // block * size, originals.get(name, tuple(reversed(sizes)))
        if prod(shape) != elements:
            raise _Damaged(f"{short(name)} has {elements:,} numbers, and its noted shape is {list(shape)}")
        # As ggml wants them: one behind the other, each at the next aligned byte.
        if offset != end:
            what = "overlap" if offset < end else "leave a gap"
            raise _Damaged(
                f"the tensors {what}: {short(name)} begins at byte {offset:,} of the data, and should at {end:,}"
            )
        if begin + offset + nbytes > header.size:
            raise _Damaged(f"truncated: {short(name)} would end at byte {begin + offset + nbytes:,}")
        found[name] = _stored(path, name, number, shape, begin + offset, nbytes)
        end = _aligned(offset + nbytes, alignment)
    return found


def _notes(header: _Header, count: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The alignment of the data, and shapes that tensors had before, from what is noted beside them."""
    alignment, originals, seen = 32, {}, set()
    for _ in range(count):
        key = header.text("the name of a note")
        (kind,) = header.numbers("<I")
        if key in seen:
            raise _Damaged(f"it has {short(key)} twice")
        seen.add(key)
        if key == _ALIGNMENT:
            alignment = header.numbers("<I")[0] if _SCALARS.get(kind) == "I" else 0
            if not alignment or alignment & (alignment - 1):
                raise _Damaged(f"its {_ALIGNMENT} is no power of two")
        elif key.startswith(_ORIGINAL):
            originals[key.removeprefix(_ORIGINAL)] = header.shape(kind, key)
        else:
            header.skip(kind)
    return alignment, originals


def _place(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, sizes (the last dimension first), type and offset in the data."""
    name = header.text("the name of a tensor")
    (dimensions,) = header.numbers("<I")
    if dimensions > _DIMENSIONS:
        raise _Damaged(f"{short(name)} has {dimensions:,} dimensions")
    *sizes, number, offset = header.numbers(f"<{dimensions}QIQ")
    return name, tuple(sizes), number, offset


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
