"""LoRAs on disk: which layers a file changes, by which halves and how strongly, whoever wrote it. Nothing of the
weights is read but the alphas.

``lora_places`` finds the file, ``lora_names`` knows its tensors by their names, and ``lora_settings`` what its maker
wrote beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..words import short
from .headers import StoredTensor, read_tensor
from .lora_names import BIASES, DOWN, UP, Names, sort_names
from .lora_places import PICKLES
from .lora_places import find_lora as find_lora
from .lora_settings import Settings, finite_number, more_than_lora, read_settings
from .parts import Part
from .pickles import read_pickle
from .reading import read_any_header


@dataclass(frozen=True)
class Pair:
    """The two halves of one layer's change: ``down [rank, in]`` and ``up [out, rank]`` (of a convolution ``[rank, in,
    k, k]`` and ``[out, rank, 1, 1]``), and ``scale``, alpha / rank."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA changes in a CogVideoX transformer, of whatever size.

    Attributes:
        path: its file.
        pairs: by the module they belong to, as diffusers calls it.
        base: the model that its settings say it was trained on, if they do.
        notes: sentences for the user.
    """

    path: Path
    pairs: Mapping[str, Pair] = field(repr=False)
    base: str | None = None
    notes: tuple[str, ...] = ()


def read_lora(path: Path) -> LoraFile:
    """Read what a LoRA changes: header, alphas and settings.

    Args:
        path: a safetensors, GGUF or torch file (no code in it is run).

    Raises:
        ValueError: if it is not a LoRA of a CogVideoX transformer, or is damaged or more than that.
    """
    tensors, beside = read_pickle(path) if path.suffix.lower() in PICKLES else (read_any_header(path), {})
    settings = read_settings(path, beside)
    if settings.biases:
        raise more_than_lora(short(path, 400), BIASES)
    return _lora_of(tensors, path, settings)


def lora_inside(part: Part) -> LoraFile:
    """The LoRA that was being trained on a transformer when it was saved, as ``read_lora`` has it.

    Raises:
        ValueError: if it is damaged, or more than a LoRA.
    """
    file = next(iter(part.lora.values())).file
    beside = read_pickle(file)[1] if file.suffix.lower() in PICKLES else {}
    return _lora_of(part.lora, file, read_settings(file, beside))


def _lora_of(tensors: Mapping[str, StoredTensor], path: Path, settings: Settings) -> LoraFile:
    """``read_lora`` of tensors that are known by name already."""
    where = short(path, 400)
    if not tensors:
        raise ValueError(f"{where} holds no tensors, so there is no LoRA in it. Download it again, or choose another.")
    names = sort_names(tensors, where)
    if not names.halves:
        raise ValueError(
            f"{where} holds no change of the transformer: all its {names.text_encoder} tensors are for the text "
            "encoder. Choose another LoRA."
        )
    alphas = _alphas(names, tensors, where, settings)
    pairs: dict[str, Pair] = {}
    for module, found in sorted(names.halves.items()):
        if set(found) != {DOWN, UP}:
            (there,) = found
            missing = UP if there == DOWN else DOWN
            raise ValueError(
                f"{where} holds the {there} half of {module} and not its {missing} half, so the change it was trained "
                "for is not whole. Download it again."
            )
        down, up = found[DOWN], found[UP]
        rank = _rank(where, module, down, up)
        pairs[module] = Pair(down, up, settings.scale(module, rank, alphas.get(module), names.sat, where))
    notes = []
    if names.text_encoder:
        notes.append(
            f"{short(path.name)} trains the text encoder too ({names.text_encoder} tensors), which is left as it is."
        )
    if names.sat:
        alpha = (
            "alpha 1, as SAT's trainer has it"
            if settings.alpha is None
            else f"alpha {settings.alpha:g}, as its training_config.yaml says"
        )
        notes.append(f"SAT's LoRA: strength 1 is {alpha}, divided by the rank.")
    if names.model:
        notes.append(
            f"{short(path.name)} holds the model it was trained on too ({names.model} tensors), of which nothing is "
            "used here."
        )
    if names.biases and settings.biases is None:
        notes.append(
            f"{short(path.name)} does not say whether the {names.biases} biases in it were trained too, and they are "
            "left out here. If they were, it is more than a LoRA: load the file itself as the model."
        )
    return LoraFile(path, pairs, settings.base, tuple(notes))


def _alphas(names: Names, tensors: Mapping[str, StoredTensor], where: str, settings: Settings) -> dict[str, float]:
    """Alphas by module."""
    alphas: dict[str, float] = {}
    for name, modules in names.alphas.items():
        alpha = finite_number(_value(where, name, tensors[name]), f"the alpha {short(name)}", where)
        for module in modules:
            if module not in names.halves:
                raise ValueError(
                    f"{where} holds an alpha of {module} and no halves of its change, so it is not whole. Download it "
                    "again."
                )
            if alphas.setdefault(module, alpha) != alpha:
                raise ValueError(
                    f"{where} gives {module} two alphas, {alphas[module]:g} and {alpha:g}, so how strongly it was "
                    "trained is not known. Download it again."
                )
    return alphas


def _rank(where: str, module: str, down: StoredTensor, up: StoredTensor) -> int:
    """The rank of a pair.

    Raises:
        ValueError: if its halves are not floating-point matrices, or convolutions, of one rank.
    """
    for half, stored in ((DOWN, down), (UP, up)):
        if stored.quantization is not None or not stored.dtype.is_floating_point:
            kind = stored.kind if stored.quantization is not None else str(stored.dtype).removeprefix("torch.")
            raise ValueError(
                f"{where} cannot be applied: the {half} half of {module} is stored as {kind}, and a LoRA is needed in "
                "floating-point numbers (fp32, bf16, fp16 or fp8). Get the original from its maker."
            )
    shapes = f"(shapes {list(down.shape)} and {list(up.shape)})"
    if len(down.shape) not in (2, 4) or len(up.shape) not in (2, 4) or any(size != 1 for size in up.shape[2:]):
        raise ValueError(
            f"{where} does not fit: the halves of {module} are neither matrices nor convolutions {shapes}. Download "
            "it again."
        )
    if down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{where} is damaged: the halves of {module} have the ranks {down.shape[0]} and {up.shape[1]} {shapes}, "
            "and must have one. Download it again."
        )
    if not down.nbytes or not up.nbytes:
        raise ValueError(
            f"{where} is empty where it should change {module}: its halves are of rank {down.shape[0]} {shapes}. "
            "Download it again."
        )
    return down.shape[0]


def _value(where: str, name: str, stored: StoredTensor) -> Any:
    if stored.nbytes != stored.dtype.itemsize or stored.quantization is not None:
        raise ValueError(
            f"{where} is damaged: an alpha has the shape {short(list(stored.shape))} and should be one number "
            f"({short(name)}). Download it again."
        )
    return read_tensor(stored).to(torch.float64 if stored.dtype.is_floating_point else stored.dtype).item()
