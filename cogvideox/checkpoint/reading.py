"""The header of a file of weights, whatever its format."""

from pathlib import Path

from .gguf import read_blocks, read_gguf_header
from .headers import StoredTensor, read_header
from .pickles import read_pickle_header


def read_any_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors, GGUF or torch file.

    Raises:
        ValueError: if it cannot be read.
    """
    ending = file.suffix.lower()
    if ending == ".gguf":
        return read_gguf_header(file)
    return (
        read_pickle_header(file) if ending in (".pt", ".pth", ".ckpt", ".bin") else read_blocks(read_header(file), file)
    )
