"""Torch checkpoints (SAT's ``.pt`` files): where each tensor lies in the file, told without unpickling anything.

``torch.save`` writes a zip archive of storages (``archive``), and a pickle, which ``pickle_program`` follows on paper.
"""

from math import prod
from pathlib import Path
from typing import Any

from ..words import listed, short
from .archive import Archive, Damaged, open_archive
from .headers import DTYPES, StoredTensor, opened
from .pickle_program import Foreign, Tensor, Unreadable, follow

#: Where in such a file the weights are: DeepSpeed writes ``module``, Lightning ``state_dict``, trainers of few steps
#: ``generator``; those between are trainers' of LoRAs.
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
    "model_state",
    "generator",
)
#: Levels that are looked through.
_DEPTH = 4


def read_pickle_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a torch checkpoint: ``read_pickle`` without what lies beside them."""
    return read_pickle(path)[0]


def read_pickle(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors of a torch checkpoint, as places in the file, and what else is in it beside them (numbers, settings):
    its weights are not read, and nothing in it is run.

    Raises:
        ValueError: if it is not a torch checkpoint, is damaged, or would run code.
    """
    path = Path(path)
    archive, tensors, beside = _tensors(path)
    return {name: _placed(path, archive, name, value) for name, value in tensors.items()}, beside


def read_pickle_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a torch checkpoint, wherever their numbers lie.

    Raises:
        ValueError: if it is not a torch checkpoint, is damaged, or would run code.
    """
    found = {name: value.size for name, value in _tensors(Path(path))[1].items() if isinstance(value, Tensor)}
    return {
        name: size
        for name, size in found.items()
        if isinstance(size, tuple) and all(type(length) is int for length in size)
    }


def _tensors(path: Path) -> "tuple[Archive, dict[str, Tensor | Unreadable], dict[str, Any]]":
    """An archive, the tensors of its pickle that are the weights, by their names, and what lies beside them."""
    with opened(path) as (file, size):
        try:
            archive = open_archive(file, size)
            state = follow(archive.pickle)
        except Foreign as error:
            raise ValueError(
                f"{short(path, 400)} holds more than tensors ({error}), and opening that could run code on your "
                "computer, so it was not opened. Get the weights from the authors, or as safetensors."
            ) from error
        except Damaged as error:
            raise ValueError(
                f"{short(path, 400)} ({size:,} bytes) is not a readable torch checkpoint: {error}. No weights can be "
                "taken from it. If the download was interrupted, delete it and download it again."
            ) from error
    try:
        tensors, beside = _weights(state)
    except _Several as error:
        raise ValueError(
            f"{short(path, 400)} holds several sets of weights ({error}), and which is meant is not known. Save the "
            "one you want by itself, with torch.save or as safetensors."
        ) from error
    if "zero_pp_rank" in path.name or ("param_shapes" in beside and any(map(_is_empty, tensors.values()))):
        raise ValueError(
            f"{short(path, 400)} is a piece of a training on several cards (DeepSpeed ZeRO), and one piece alone "
            "cannot run. Join the pieces with the zero_to_fp32.py beside them, and choose what it writes."
        )
    unnamed = [name for name in tensors if not isinstance(name, str)]
    if unnamed:
        raise ValueError(
            f"{short(path, 400)} has tensors under {listed(unnamed)}, and weights have names, so it is not known what "
            "they are. Save them under the names of the model they belong to."
        )
    return archive, tensors, beside


class _Several(Exception):
    """The names of several sets of weights."""


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.size == (0,)


def _weights(state: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The tensors of a state by name, wherever trainers put them, and what lies beside them on the way there.

    Raises:
        _Several: if it holds several sets of them.
    """
    beside: dict[str, Any] = {}
    for _ in range(_DEPTH):
        inner = _level_below(state) if isinstance(state, dict) else None
        if inner is None:
            break
        beside |= {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and value is not inner and not _is_tensor(value)
        }
        state = inner
    if not isinstance(state, dict):
        return {}, beside
    beside |= {key: value for key, value in state.items() if isinstance(key, str) and not _is_tensor(value)}
    return {name: value for name, value in state.items() if _is_tensor(value)}, beside


def _level_below(state: dict) -> dict | None:
    """Where the weights are that are not on this level: under one of the usual names, or under the only one that holds
    tensors.

    Raises:
        _Several: if they may be under several.
    """
    for level in _LEVELS:
        if isinstance(state.get(level), dict):
            # Which of the two a trainer of few steps means nobody can tell.
            if level == "generator" and _holds_tensors(state.get(f"{level}_ema")):
                raise _Several(listed((level, f"{level}_ema")))
            return state[level]
    if any(map(_is_tensor, state.values())):
        return None
    below = [
        name
        for name, value in state.items()
        if isinstance(name, str) and not name.startswith("optimizer") and _holds_tensors(value)
    ]
    if len(below) > 1:
        raise _Several(listed(below))
    return state[below[0]] if below else None


def _holds_tensors(value: Any) -> bool:
    """Whether a level, or one below it, has tensors with names. Each is looked at once: they may hold each other."""
    level, seen = [value], {id(value)}
    for _ in range(_DEPTH - 1):
        named = [
            inner
            for outer in level
            if isinstance(outer, dict)
            for name, inner in outer.items()
            if isinstance(name, str)
        ]
        if any(map(_is_tensor, named)):
            return True
        level = list(
            {id(inner): inner for inner in named if isinstance(inner, dict) and id(inner) not in seen}.values()
        )
        seen |= set(map(id, level))
    return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | Unreadable)


def _placed(path: Path, archive: Archive, name: str, value: Tensor | Unreadable) -> StoredTensor:
    """The place in the file of a tensor, which must lie there in one piece.

    Raises:
        ValueError: if it does not, or what is said of it does not fit its storage.
    """
    if isinstance(value, Unreadable):
        raise _unreadable(path, name, f"is {value.what} and does not lie in the file as plain numbers")
    storage, offset, size, stride, kind = value
    dtype, stored = _DTYPES.get(kind), _DTYPES.get(storage.dtype)
    if dtype is None or stored is None:
        raise _unreadable(path, name, f"is stored as {short(kind)}, which no weight of CogVideoX is")
    begin, nbytes = archive.storages.get(storage.key, (0, -1)) if isinstance(storage.key, str) else (0, -1)
    if nbytes < 0:
        raise _unreadable(path, name, f"should lie in the record data/{short(storage.key)}, which is not there")
    sizes = tuple(size) if isinstance(size, tuple) else (None,)
    numbers = (offset, storage.count, *sizes)
    if (
        any(type(number) is not int or number < 0 for number in numbers)
        or len(sizes) > 64
        or not isinstance(stride, tuple)
        or len(stride) != len(sizes)
    ):
        raise _unreadable(
            path,
            name,
            f"cannot have the shape {short(size)} and the strides {short(stride)} in {short(storage.count)} numbers",
        )
    count = prod(sizes)
    if storage.count * stored.itemsize != nbytes or (offset + count) * dtype.itemsize > nbytes:
        raise _unreadable(path, name, f"of shape {short(list(sizes))} cannot lie in {nbytes:,} bytes")
    step = 1
    for length, jump in zip(reversed(sizes), reversed(stride), strict=True):
        if count and length != 1 and jump != step:
            raise _unreadable(path, name, "does not lie in one piece")
        step *= length
    return StoredTensor(path, dtype, sizes, begin + offset * dtype.itemsize, count * dtype.itemsize)


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def _unreadable(path: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{short(path, 400)}: {short(name)} {why}, so it cannot be read in place. Save it again with torch.save, or "
        "use safetensors."
    )
