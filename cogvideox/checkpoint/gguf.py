"""GGUF files: every tensor's name, quantization and place. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from pathlib import Path

import torch

from ..dependencies import DependencyError
from .headers import StoredTensor

#: GGUF's unquantized types, by their numbers.
_PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def read_gguf_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file, as places in it; quantized ones with their logical shape and the number of their quantization.

    Raises:
        ValueError: if the file is not GGUF, or damaged.
        DependencyError: if the package ``gguf`` is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyError(
            f"{path} is a GGUF file, and the package gguf that reads such files is not installed. Install it in ComfyUI's Python environment with: "
            "python -m pip install gguf, then restart ComfyUI."
        ) from error
    try:
        reader = GGUFReader(path)
        return {tensor.name: _entry(path, reader, tensor) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        what = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable GGUF file ({what}), so no weights can be taken from it. If the download was "
            "interrupted, delete it and download it again."
        ) from error


def _entry(path: Path, reader, tensor) -> StoredTensor:
    number, nbytes, offset = int(tensor.tensor_type), int(tensor.n_bytes), int(tensor.data_offset)
    if offset + nbytes > path.stat().st_size:
        raise ValueError(f"truncated: {tensor.name} would end at byte {offset + nbytes:,}")
    # GGUF counts dimensions backwards, and has at most four of them: tools note the shape of what had more.
    original = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    shape = tuple(int(original.parts[part][0]) for part in original.data) if original else tuple(int(size) for size in reversed(tensor.shape))
    if number in _PLAIN:
        return StoredTensor(path, _PLAIN[number], shape, offset, nbytes)
    return StoredTensor(path, torch.uint8, shape, offset, nbytes, quantization=number)
