"""LoRAs (https://arxiv.org/abs/2106.09685): run beside the weights, never merged into them.

A LoRA adds ``strength * alpha / rank * up(down(x))`` to what a layer gives. Here it is added while the transformer
runs, by hooks that are gone afterwards. So the weights, which other branches of a graph share, stay what they are bit
for bit, and may be stored in any way.

What files of LoRAs look like is known by ``checkpoint.lora_files``.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint.headers import StoredTensor, read_tensor
from .checkpoint.lora_files import LoraFile, Pair, find_lora, lora_inside, read_lora
from .checkpoint.parts import Part
from .dtypes import Precision
from .finite import check_finite
from .modules.range_safe import RangeSafeLinear
from .variants import NOTHING, identify
from .words import listed, short

#: Tokens that a change is added to at once in range-safe fp16.
_TOKENS = 4096
#: Numbers at a tensor's ends that are not all zeros by chance.
_EDGE = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """One LoRA as it is to be applied. Nothing of its weights is read yet.

    Attributes:
        path: its file.
        strength: what its change is multiplied by; 0 does nothing, negative takes away.
        pairs: by the module they belong to.
        notes: sentences for the user.
    """

    path: Path
    strength: float
    pairs: Mapping[str, Pair] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def numbers(self) -> int:
        """How many it runs with."""
        pairs = self.pairs.values() if self.strength else ()
        return sum(prod(pair.down.shape) + prod(pair.up.shape) for pair in pairs)

    @property
    def text(self) -> str:
        ranks = sorted({pair.down.shape[0] for pair in self.pairs.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        scales = sorted({pair.scale for pair in self.pairs.values()})
        scale = (
            ""
            if scales == [1]
            else f", scale {scales[0]:.4g}{f' to {scales[-1]:.4g}' if len(scales) > 1 else ''} (alpha / rank)"
        )
        return "\n".join(
            [
                f"LoRA {short(self.path.name)}: strength {self.strength:g}, {rank}{scale}, {len(self.pairs)} layers",
                *self.notes,
            ]
        )


def open_lora(path: Path | str, part: Part, strength: float = 1.0) -> Lora:
    """Open a LoRA for a transformer: header, alphas and settings only.

    Args:
        path: a safetensors file or a torch pickle (no code in it is run), or the folder that a trainer wrote it to.
        part: the transformer's, on disk.

    Raises:
        ValueError: if it is not a LoRA, is one of another model, or its tensors do not fit together.
    """
    path = Path(os.path.expanduser(path))
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ValueError(
            f"The strength of {short(path.name)} is {short(strength)}, which would make every frame black. Set it to "
            "a number; 1 is usual."
        )
    found = read_lora(find_lora(path))
    lora = _fitted(found, part, strength)
    if part.lora and found.path in {stored.file for stored in part.lora.values()}:
        note = (
            f"{short(found.path.name)} is the checkpoint itself, which runs with its LoRA already: this one is "
            "applied on top of it."
        )
        lora = replace(lora, notes=(*lora.notes, note))
    return lora


def own_loras(part: Part) -> tuple[Lora, ...]:
    """The LoRA that was being trained on a transformer when it was saved: a part of the model, at the strength it was
    trained with.

    Raises:
        ValueError: if it is no LoRA that can be applied.
    """
    return (_fitted(lora_inside(part), part, 1.0),) if part.lora else ()


def _fitted(found: LoraFile, part: Part, strength: float) -> Lora:
    """A LoRA for this transformer.

    Raises:
        ValueError: if it has layers that this transformer has not, or of other sizes, or such a strength is beyond what
            fp32 holds.
    """
    where = short(found.path, 400)
    unmatched = sorted(module for module in found.pairs if f"{module}.weight" not in part.tensors)
    if unmatched:
        raise ValueError(
            f"{where} does not fit: {len(unmatched)} of the {len(found.pairs)} layers it changes ({listed(unmatched)}) "
            f"match no layer of this CogVideoX transformer. {_lacks(unmatched, part)} Choose a LoRA trained on this "
            "checkpoint."
        )
    pairs = {module: _shaped(where, module, pair, part) for module, pair in found.pairs.items()}
    if not all(abs(strength * pair.scale) < 1e30 for pair in pairs.values()):
        raise ValueError(
            f"The strength of {short(found.path.name)} is {strength:g}, beyond all that numbers here can hold. Set it "
            "to a number like 1."
        )
    return Lora(found.path, float(strength), pairs, (*found.notes, *_trained_elsewhere(found, part)))


def _lacks(unmatched: Sequence[str], part: Part) -> str:
    """Why a CogVideoX transformer lacks layers that another has."""
    blocks = {int(match[1]) for name in unmatched if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    if blocks:
        count = len({name.split(".")[1] for name in part.tensors if name.startswith("transformer_blocks.")})
        return (
            f"It is for a model of at least {max(blocks) + 1} blocks, and this one has {count}: 2b has 30, 5b and 1.5 "
            "have 42."
        )
    if any(name.startswith("ofs_embedding") for name in unmatched):
        return "Only CogVideoX1.5-5B-I2V has ofs_embedding, so it was trained on that."
    return "It was made for another model."


def _shaped(where: str, module: str, pair: Pair, part: Part) -> Pair:
    """The pair with the shapes of its layer: trainers write the halves of a matrix as convolutions of one pixel, or
    those of a convolution flat.

    Raises:
        ValueError: if it is for a layer of another size.
    """
    down, up, weight = pair.down.shape, pair.up.shape, part.tensors[f"{module}.weight"].shape
    rank, inside = down[0], weight[1:]
    same = len(down) == len(weight) and down[1:] == inside
    flat = (
        len(down) != len(weight)
        and prod(down[1:]) == prod(inside)
        and (len(weight) == 4 or all(size == 1 for size in down[2:]))
    )
    if len(weight) not in (2, 4) or up[0] != weight[0] or not (same or flat):
        raise ValueError(
            f"{where} does not fit: for {module} it holds {list(down)} and {list(up)}, but the layer of this model is "
            f"{list(weight)}. It was trained on another model: {_differs(module, down, up, weight)}. Choose a LoRA "
            f"trained on this checkpoint ({identify(part.config).name})."
        )
    ones = (1,) * (len(weight) - 2)
    return replace(
        pair, down=pair.down._replace(shape=(rank, *inside)), up=pair.up._replace(shape=(weight[0], rank, *ones))
    )


def _differs(module: str, down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> str:
    if module == "patch_embed.proj" and up[0] == weight[0]:
        if len(down) != len(weight):
            kinds = {
                2: "a matrix over two frames, as 1.5 has",
                4: "a convolution, as CogVideoX 1.0 (2b, 5b, 5b-I2V) has",
            }
            return f"its patch embedding is {kinds[len(down)]}, and this model's is {kinds[len(weight)]}"
        return (
            f"its patch embedding takes {down[1]} inputs and this model's {weight[1]}, and image to video takes twice "
            "as many as text to video"
        )
    if up[0] == weight[0] and down[1:] != weight[1:]:
        return f"its layer takes {down[1]} inputs, and this model's {weight[1]}"
    return f"its layer is {up[0]} wide, and this model's {weight[0]} (2b is 1920 wide, 5b and 1.5 are 3072)"


def _trained_elsewhere(found: LoraFile, part: Part) -> list[str]:
    """A note where the file says that it was trained on another CogVideoX, whose layers have the same shapes."""
    base = (found.base or "").lower()
    if "cogvideo" not in base:
        return []
    variant = identify(part.config)
    is_15, is_i2v = bool(re.search(r"1[._-]?5", base)), bool(re.search(r"i2v|inp", base))
    if (is_15, is_i2v) == (bool(part.config.get("patch_size_t")), variant.reads != NOTHING):
        return []
    return [
        f"It was trained on {short(found.base)}, and this is {variant.name}: its layers fit, but it may do less or "
        "other things here."
    ]


@contextmanager
def applied(
    loras: Sequence[Lora], module: nn.Module, precision: Precision, device: torch.device | None = None
) -> Iterator[None]:
    """Have the transformer ``module`` run with ``loras`` for the length of a ``with`` block; its weights are not
    touched.

    Args:
        device: where it runs, if its weights are not there all the time.

    Raises:
        ValueError: if a LoRA's weights hold NaN or Inf, were not written to their end, or its file changed.
    """
    layers: dict[str, list[tuple[Lora, Pair]]] = {}
    for lora in loras:
        if lora.strength == 0:
            continue
        for name, pair in lora.pairs.items():
            layers.setdefault(name, []).append((lora, pair))
    with added(_changes(layers), module, precision, device):
        yield


@contextmanager
def added(
    changes: Iterable[tuple[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]],
    module: nn.Module,
    precision: Precision,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Have the transformer ``module`` run with changes of low rank for the length of a ``with`` block: what ``applied``
    does with those that it reads.

    Args:
        changes: names of layers, each with pairs of ``down`` ``[rank, in]`` and ``up`` ``[out, rank]`` (of a
            convolution ``[rank, in, k, k]`` and ``[out, rank, 1, 1]``), fp32, on the host, scaled. None is kept.
        device: where it runs, if its weights are not there all the time.
    """
    hooks = []
    try:
        for name, pairs in changes:
            layer = module.get_submodule(name)
            hooks.append(layer.register_forward_hook(_hook(layer, pairs, precision, device or _device(layer))))
            del pairs
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(
    layer: nn.Module,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    precision: Precision,
    device: torch.device,
) -> Callable:
    # Several LoRAs are one of the sum of their ranks.
    down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
    if isinstance(layer, RangeSafeLinear):
        return partial(_add_range_safe, _range_safe(down, device), _range_safe(up, device))
    # What a range-safe model leaves as it was (a convolution) runs in fp32.
    dtype = torch.float32 if precision.range_safe else precision.activations
    down, up = down.to(device, dtype), up.to(device, dtype)
    return partial(_add_convolved if down.ndim == 4 else _add, down, up)


def _add(down: torch.Tensor, up: torch.Tensor, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    output.flatten(0, -2).addmm_(F.linear(inputs[0], down).flatten(0, -2), up.t())
    return output


def _add_convolved(
    down: torch.Tensor, up: torch.Tensor, layer: nn.Conv2d, inputs: tuple, output: torch.Tensor
) -> torch.Tensor:
    return output.add_(F.conv2d(F.conv2d(inputs[0], down, None, layer.stride, layer.padding, layer.dilation), up))


def _add_range_safe(
    down: RangeSafeLinear, up: RangeSafeLinear, layer: nn.Module, inputs: tuple, output: torch.Tensor
) -> torch.Tensor:
    # A few tokens at a time, as what is added to them comes in fp32. A compiler makes one pass of all: what counts them
    # is compiled for their number alone.
    pieces = [slice(None)]
    if not torch.compiler.is_compiling():
        pieces = [slice(start, start + _TOKENS) for start in range(0, output.shape[-2], _TOKENS)]
    for piece in pieces:
        given = tuple(x[..., piece, :] for x in inputs)
        if len(given) == 2 and down.column_scale is not None:
            # Scaled per token already, which leaves no room for the scales of columns.
            given = (given[0].float().mul_(given[1]),)
        output[..., piece, :].add_(up(down(*given)))
    return output


def _range_safe(weight: torch.Tensor, device: torch.device) -> RangeSafeLinear:
    linear = RangeSafeLinear(weight.shape[1], weight.shape[0], bias=False, device=device)
    linear.load_weight(weight, device)
    return linear


def _changes(
    layers: Mapping[str, Sequence[tuple[Lora, Pair]]],
) -> Iterator[tuple[str, Sequence[tuple[torch.Tensor, torch.Tensor]]]]:
    """Read the changes of LoRAs, a layer's at a time: in fp32 those of a large LoRA are gigabytes.

    Raises:
        ValueError: if a LoRA's weights hold NaN or Inf, were not written to their end, or its file changed.
    """
    # Files of LoRAs: with a layer of zeros, with one that is more, and with a tensor that was not written to its end.
    empty, filled, broken_off = dict[Path, str](), set[Path](), set[Path]()

    def change(name: str, lora: Lora, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = (_read(lora, tensor) for tensor in (pair.down, pair.up))
        # One of the two begins as zeros, and stays so where nothing was trained.
        if down.any() or up.any():
            filled.add(lora.path)
        else:
            empty.setdefault(lora.path, name)
        if _breaks_off(down) or _breaks_off(up):
            broken_off.add(lora.path)
        return down, _scaled(up, lora, pair)

    for name, pairs in layers.items():
        yield name, [change(name, lora, pair) for lora, pair in pairs]
    for path, name in empty.items():
        # Whoever takes a LoRA out of layers scales both to nothing, and all else is whole.
        if path in broken_off or path not in filled:
            raise ValueError(
                f"{short(path, 400)} is not whole: its weights for {name} are zeros throughout, as where a download "
                "or a copy was not finished, so it would do nothing there. Delete the file and download it again."
            )
        logger.info("%s does nothing in layers such as %s, where its weights are zeros", path, name)


def _breaks_off(tensor: torch.Tensor) -> bool:
    """Say whether a tensor begins or ends as zeros, and is more than that."""
    flat = tensor.flatten()
    return bool(flat.any()) and not (flat[:_EDGE].any() and flat[-_EDGE:].any())


def _scaled(up: torch.Tensor, lora: Lora, pair: Pair) -> torch.Tensor:
    up.mul_(lora.strength * pair.scale)
    remedy = f"Its strength is {lora.strength:g}, times alpha / rank, {pair.scale:g}: set it to a number like 1."
    check_finite(up, f"The LoRA {lora.path} at that strength", remedy)
    return up


def _device(layer: nn.Module) -> torch.device:
    return next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))


def _read(lora: Lora, stored: StoredTensor) -> torch.Tensor:
    """A tensor of a LoRA in fp32, on the host."""
    tensor = read_tensor(stored).float()
    check_finite(
        tensor,
        f"The LoRA {lora.path}",
        "Its file is damaged, or its training failed: download it again, or choose another.",
    )
    return tensor
