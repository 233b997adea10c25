"""Torch checkpoints (SAT's ``.pt`` files): where each tensor lies in the file, without running a line of what a pickle may hold."""

import pickle
import zipfile
from pathlib import Path

import torch

from .headers import StoredTensor

#: Where in such a file the weights are: DeepSpeed writes ``module``, Lightning ``state_dict``.
_LEVELS = ("model", "module", "state_dict")


def read_pickle_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint, as places in the file: its weights are not read.

    Opened with ``weights_only=True``, which refuses anything but tensors and plain containers, and mapped into memory.

    Raises:
        ValueError: if it is not a torch checkpoint, is damaged, or would run code.
    """
    try:
        records = _records(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors ({_short(error)}), and opening that could run code on your computer, so it was not opened. Get "
            "the weights from the authors, or as safetensors."
        ) from error
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a readable torch checkpoint ({_short(error)}), so no weights can be taken from it. If "
            "the download was interrupted, delete it and download it again."
        ) from error
    for level in _LEVELS:
        if isinstance(state, dict) and isinstance(state.get(level), dict):
            state = state[level]
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)} if isinstance(state, dict) else {}
    # All storages are slices of one mapping of the file; which byte that begins at shows by the record that lies first.
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    for first in sorted(records):
        base = min(storages, default=0) - first
        if all(records.get(start - base) == nbytes for start, nbytes in storages.items()):
            break
    else:
        raise ValueError(f"{path}: where its tensors lie cannot be told. Save it again with torch.save, or use safetensors.")
    found = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr() - base
        if not value.is_contiguous():
            raise ValueError(f"{path}: {name} does not lie in one piece, so it cannot be read in place. Save it again, or use safetensors.")
        offset = place + value.storage_offset() * value.element_size()
        found[name] = StoredTensor(path, value.dtype, tuple(value.shape), offset, value.numel() * value.element_size())
    return found


def _records(path: Path) -> dict[int, int]:
    """Where the storages lie in the archive: offset -> bytes. torch stores them uncompressed."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if "/data/" in info.filename:
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
                skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                records[info.header_offset + 30 + skip] = info.file_size
    return records


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
