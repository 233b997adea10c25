"""The files that a part's weights are written into: which tensors go into which, and the bytes of each.

The bytes go through one small buffer: every header is computed from shapes before a weight is read, and the weights
follow range by range, cast on the way if another dtype is wanted. So 31 GB take no more memory than 31 MB do.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..modules.packed import PackedWeight
from ..variants import PARTS
from ..words import reason, short
from .architecture import check_part
from .headers import DTYPES, StoredTensor, fill, read_tensor
from .parts import Part

#: Bytes of weights in one file of a folder, as diffusers and the official releases have it; a larger tensor has a file
#: of its own.
SHARD_BYTES = 5 * 10**9
#: Bytes read at a time: with the cast of them, all the memory that weights take.
_CHUNK = 16 << 20
#: What diffusers and transformers call the files of a part.
WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
#: Where a configuration says in which dtype transformers should load the weights.
_CONFIG_DTYPES = ("torch_dtype", "dtype")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file to write: its name, relative to the destination, and its tensors in the order they will lie
    in."""

    name: str
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype | None
    scales: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        end = 0
        for name, stored in self.tensors.items():
            wanted, begin = wanted_dtype(stored, self.dtype), end
            end += prod(stored.shape) * wanted.itemsize
            entries[name] = {"dtype": _NAMES[wanted], "shape": list(stored.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        # As the library writes it: the data begin at a multiple of eight bytes, so that every tensor can be mapped
        # where it lies.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        return len(self.header) + sum(bytes_as(stored, self.dtype) for stored in self.tensors.values())

    def content(self, progress: "Progress") -> Iterator[bytes | memoryview]:
        """The file's bytes, in pieces that are good until the next one is asked for."""
        yield self.header
        buffer = torch.empty(_CHUNK, dtype=torch.uint8)
        file = None
        try:
            for name, stored in self.tensors.items():
                if file is None or Path(file.name) != stored.file:
                    if file is not None:
                        file.close()
                    with source_errors(stored.file):
                        file = stored.file.open("rb", buffering=0)
                wanted = wanted_dtype(stored, self.dtype)
                if name in self.scales or stored.quantization is not None:
                    pieces = _widened(name, file, stored, self.scales.get(name), wanted)
                else:
                    pieces = (
                        (piece.view(stored.dtype).to(wanted), piece.nbytes) for piece in _pieces(file, stored, buffer)
                    )
                for values, nbytes in pieces:
                    yield _memory(values)
                    progress.add(nbytes)
        finally:
            if file is not None:
                file.close()


@dataclass(frozen=True)
class Plan:
    """What is to be written of one part."""

    part: Part
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]
    files: tuple[WeightsFile, ...]
    dtype: torch.dtype | None

    @property
    def bytes_to_copy(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    @cached_property
    def to_scan(self) -> dict[str, StoredTensor]:
        """The tensors whose cast can be counted: not those that are quantized."""
        return {
            name: stored
            for name, stored in self.tensors.items()
            if stored.dtype != wanted_dtype(stored, self.dtype) and stored.quantization is None
        }

    @property
    def bytes_to_scan(self) -> int:
        return sum(stored.nbytes for stored in self.to_scan.values())


def plan_part(part: Part, dtype: torch.dtype | None, single: bool, name: str) -> Plan:
    """Which tensors go into which file. They stay in the order they lie in, so that the source is read from front to
    back."""
    check_part(part)
    if part.lora:
        raise ValueError(
            f"The {PARTS[part.kind][0]} in {short(part.source, 400)} was saved with a LoRA inside ({len(part.lora)} "
            "tensors), which a converted copy would not have: it would be the model before the training. Convert the "
            "model it was trained on, and load this file as a LoRA of it; or run it as it is."
        )
    tensors = dict(sorted(_once(part.kind, part.tensors).items(), key=lambda item: (item[1].file, item[1].offset)))
    scales = {name: scale for name, scale in _once(part.kind, part.scales).items() if name in tensors}
    packed = len(scales) + sum(stored.quantization is not None for stored in tensors.values())
    if packed and dtype is None:
        raise ValueError(
            f"{packed} weights of the {PARTS[part.kind][0]} in {short(part.source, 400)} are packed (GGUF, or fp8 with "
            "scales beside it), and diffusers' layout has no place for that: without the scales every picture would "
            "be noise. Choose a dtype to convert to, such as bf16: that widens them."
        )
    metadata = {"format": "pt"}
    if single:
        metadata["config"] = json.dumps(part_config(part, dtype))
        return Plan(
            part, tensors, scales, (WeightsFile(name, _aligned(tensors, dtype), dtype, scales, metadata),), dtype
        )
    shards: list[dict[str, StoredTensor]] = [{}]
    room = SHARD_BYTES
    for key, stored in tensors.items():
        room -= bytes_as(stored, dtype)
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD_BYTES - bytes_as(stored, dtype)
        shards[-1][key] = stored
    stem, count = f"{part.kind}/{WEIGHTS[part.kind]}", len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )
    files = tuple(
        WeightsFile(name, _aligned(shard, dtype), dtype, scales, metadata)
        for name, shard in zip(names, shards, strict=True)
    )
    return Plan(part, tensors, scales, files, dtype)


def part_config(part: Part, dtype: torch.dtype | None) -> dict:
    """The part's configuration. transformers loads weights in the dtype that it names, so that is the one they now
    have."""
    config = dict(part.config)
    return config | {
        key: str(dtype).removeprefix("torch.") for key in _CONFIG_DTYPES if dtype is not None and key in config
    }


def _once(kind: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by name; T5's token embedding under the name that transformers writes it under, and not twice."""
    tensors = dict(tensors)
    if kind == "text_encoder" and "encoder.embed_tokens.weight" in tensors:
        table = tensors.pop("encoder.embed_tokens.weight")
        tensors.setdefault("shared.weight", table)
    return tensors


def _aligned(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """Wide dtypes first, as the library has it: then each tensor begins at a multiple of its element's size. Otherwise
    the order is kept."""
    return dict(sorted(tensors.items(), key=lambda item: -wanted_dtype(item[1], dtype).itemsize))


def wanted_dtype(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a tensor is written in: ``dtype`` if it holds numbers that can be cast, else what it is stored in."""
    return (
        dtype
        if dtype is not None and (stored.dtype.is_floating_point or stored.quantization is not None)
        else stored.dtype
    )


def bytes_as(stored: StoredTensor, dtype: torch.dtype | None) -> int:
    """Return the bytes that a tensor has as it is written."""
    return prod(stored.shape) * wanted_dtype(stored, dtype).itemsize


def _pieces(file: FileIO, stored: StoredTensor, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, each piece at the start of ``buffer``."""
    for offset, nbytes in stored.ranges:
        with source_errors(stored.file):
            file.seek(offset)
        while nbytes:
            piece = buffer[: min(nbytes, len(buffer))]
            with source_errors(stored.file):
                fill(file, _memory(piece), stored.file)
            nbytes -= piece.nbytes
            yield piece


def _widened(
    name: str, file: FileIO, stored: StoredTensor, scale: StoredTensor | None, wanted: torch.dtype
) -> Iterator[tuple[torch.Tensor, int]]:
    """A packed tensor in ``wanted``, some rows at a time, each with the bytes it was read from.

    Raises:
        ValueError: if a weight is NaN or Inf then. The scan cannot foresee that: it sees the weights without their
            scales.
    """
    rows, done = stored.raw_shape[0], 0
    row = stored.nbytes // rows
    scales = None
    if scale is not None:
        with source_errors(scale.file):
            scales = read_tensor(scale).flatten()
    # Widening takes many times the memory of what is packed.
    for piece in _pieces(file, stored, torch.empty(row * max(1, _CHUNK // 16 // row), dtype=torch.uint8)):
        data = piece.view(stored.dtype).reshape(piece.nbytes // row, -1)
        some = scales if scales is None or len(scales) == 1 else scales[done : done + len(data)]
        values = PackedWeight(data, some, stored.quantization).scaled(torch.float32).to(wanted).flatten()
        if not values.isfinite().all():
            raise ValueError(
                f"{name} in {short(stored.file, 400)} has weights that are NaN or Inf once they are widened to "
                f"{dtype_name(wanted)}. Every frame made with such a file is black, so it was not written. Convert to "
                "bf16, which has the range of fp32, or download the file again."
            )
        done += len(data)
        yield values, piece.nbytes


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


@contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Say in a sentence why a source could not be read.

    Raises:
        RuntimeError: for an error of the system.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{short(path, 400)} cannot be read: {reason(error)}. The conversion stopped and left nothing behind. "
            "Check the disk and the permissions, or download it again."
        ) from error


class Progress:
    """Bytes read so far, of all that are to be read."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None):
        self.done, self._total, self._on_progress = 0, total, on_progress

    def add(self, count: int) -> None:
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        if done > self.done:
            self.done = done
            if self._on_progress is not None:
                self._on_progress(done, self._total)
