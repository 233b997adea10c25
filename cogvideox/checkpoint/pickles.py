"""Torch checkpoints (SAT's ``.pt`` files): where each tensor lies in the file, without running a line of what a pickle may hold."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .headers import StoredTensor

#: Where in such a file the weights are: DeepSpeed writes ``module``, Lightning ``state_dict``; the others are trainers' of LoRAs.
_LEVELS = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "lora",
    "lora_state_dict",
    "lora_weights",
    "transformer",
    "weights",
    "network",
    "adapter",
)
#: Levels that are looked through.
_DEPTH = 4


def read_pickle_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint: ``read_pickle`` without what lies beside them."""
    return read_pickle(path)[0]


def read_pickle(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of a torch checkpoint, as places in the file, and what else is in it beside them (numbers, settings): its weights are not read.

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
    tensors, beside = _weights(state)
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
    return found, beside


def _is_tensor(value: Any) -> bool:
    return torch.is_tensor(value)


def _weights(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a state by name, wherever trainers put them, and what lies beside them on the way there."""
    beside: dict[str, Any] = {}
    for _ in range(_DEPTH):
        inner = _level_below(state) if isinstance(state, dict) else None
        if inner is None:
            break
        beside |= {key: value for key, value in state.items() if isinstance(key, str) and value is not inner and not _is_tensor(value)}
        state = inner
    if not isinstance(state, dict):
        return {}, beside
    beside |= {key: value for key, value in state.items() if isinstance(key, str) and not _is_tensor(value)}
    return {name: value for name, value in state.items() if isinstance(name, str) and _is_tensor(value)}, beside


def _level_below(state: dict) -> dict | None:
    """Where the weights are that are not on this level: under one of the usual names, or under the only one that holds tensors."""
    for level in _LEVELS:
        if isinstance(state.get(level), dict):
            return state[level]
    if any(isinstance(name, str) and _is_tensor(value) for name, value in state.items()):
        return None
    below = [value for name, value in state.items() if isinstance(name, str) and _holds_tensors(value)]
    return below[0] if len(below) == 1 else None


def _holds_tensors(value: Any) -> bool:
    """Whether a level, or one below it, has tensors with names. Each is looked at once: they may hold each other."""
    level, seen = [value], {id(value)}
    for _ in range(_DEPTH - 1):
        named = [inner for outer in level if isinstance(outer, dict) for name, inner in outer.items() if isinstance(name, str)]
        if any(map(_is_tensor, named)):
            return True
        level = list({id(inner): inner for inner in named if isinstance(inner, dict) and id(inner) not in seen}.values())
        seen |= set(map(id, level))
    return False


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
