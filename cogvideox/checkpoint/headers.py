"""Safetensors headers: every tensor's name, dtype, shape and place, from the first bytes of a file.

Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header length, a JSON header, then the data).
The header is read by hand because the library maps the whole file to answer the same question, and does not tell a
truncated download from a damaged one.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from ..precision.packed import FP8_DTYPES

#: The library's own limit on a header's size.
_MAX_HEADER = 100_000_000

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


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: where its bytes lie (``offset`` from the start of the file) and how they are to be read.

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
        """The shape of what lies in the file: of its bytes, where it is quantized."""
        if self.quantization is None:
            return self.shape
        return (self.shape[0], self.nbytes // self.shape[0]) if self.shape else (self.nbytes,)

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
                f"A tensor of shape {list(self.shape)} in {self.file} cannot be split into {of} equal pieces, so it is not what its name says."
            )
        size = self.nbytes // of
        (offset, nbytes), *more = _joined([(self.offset + number * size, size) for number in numbers])
        shape = (self.shape[0] // of * len(numbers), *self.shape[1:])
        return StoredTensor(self.file, self.dtype, shape, offset, nbytes + sum(count for _, count in more), tuple(more), self.quantization)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: kilobytes, whatever the size of the file.

    Raises:
        ValueError: if the file is not safetensors, is damaged, or is shorter than its header says.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
            raise _not_safetensors(path, size, "it does not start with a header")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + length, value) for name, value in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_safetensors(path, size, f"its header cannot be read ({error})") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(
            f"{path} is truncated: it has {size:,} bytes and its header promises {end:,}, so some weights are missing. "
            "The download was interrupted or the disk was full: delete this file and download it again."
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer of a safetensors file noted in its header: texts by name, none if nothing.

    Raises:
        ValueError: if it is not JSON.
    """
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__") or {}


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """One tensor of a file, on the host, as it is stored.

    Raises:
        ValueError: if the file ends before.
        OSError: if it cannot be read.
    """
    data, done = torch.empty(stored.nbytes, dtype=torch.uint8), 0
    with stored.file.open("rb", buffering=0) as file:
        for offset, nbytes in stored.ranges:
            file.seek(offset)
            fill(file, memoryview(data.numpy())[done : done + nbytes], stored.file)
            done += nbytes
    return data.view(stored.dtype).view(stored.raw_shape)


def fill(file: BinaryIO, view: memoryview, path: Path) -> None:
    """Read from ``file``, unbuffered, until ``view`` is full.

    Raises:
        ValueError: if the file ends before.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{path} ended while a tensor was read: it is truncated or being written. Download it again.")
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


def _entry(path: Path, data_start: int, value: dict) -> StoredTensor:
    begin, end = value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {value['dtype']}")
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    if end - begin != prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"a tensor of shape {list(shape)} in {value['dtype']} cannot take {end - begin} bytes")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _not_safetensors(path: Path, size: int, why: str) -> ValueError:
    return ValueError(
        f"{path} ({size:,} bytes) is not a readable safetensors file: {why}. Weights cannot be taken from it. If it is a Git LFS "
        "pointer or an interrupted download, download the file itself again."
    )
