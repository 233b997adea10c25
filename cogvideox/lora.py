"""LoRAs (https://arxiv.org/abs/2106.09685): read in the formats in use, run beside the weights, never merged into them.

A LoRA adds ``strength * alpha / rank * up(down(x))`` to what a layer gives. Here it is added while the transformer runs, by hooks that are
gone afterwards. So the weights, which other branches of a graph share, stay what they are bit for bit, and may be stored in any way.

Formats, all with the names of diffusers' modules: diffusers and peft (``transformer.<module>.lora_A.weight``), finetrainers, which writes the
same, kohya's (``lora_unet_<module_with_underscores>.lora_down.weight``, ``.alpha``), CogVideoX-Fun's, which doubles an underscore, the older
``<module>.lora.down.weight``, and any of them with the names that ComfyUI's core has.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint.headers import StoredTensor, read_metadata, read_tensor
from .checkpoint.layout import Part, read_any_header
from .checkpoint.naming import comfy_name
from .precision.policy import Precision
from .precision.range_safe import RangeSafeLinear
from .precision.sentinel import check_finite

#: What a LoRA in a folder of its own is called, by peft and by diffusers.
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_HALF = re.compile(r"(?P<path>.+?)[._](?:(?P<down>lora_A|lora_down|lora\.down|down)|(?P<up>lora_B|lora_up|lora\.up|up))(?:\.\w+)?\.weight")
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_TEXT_ENCODER = ("text_encoder.", "lora_te_", "lora_te1_")
#: What a name of a LoRA's relatives holds -> what they are called.
_RELATIVES = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT", ".diff": "full weights"}


@dataclass(frozen=True)
class Pair:
    """The two halves of one layer's change: ``down [rank, in]`` and ``up [out, rank]`` (of a convolution ``[rank, in, k, k]`` and
    ``[out, rank, 1, 1]``), and ``scale``, alpha / rank."""

    down: StoredTensor
    up: StoredTensor
    scale: float


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
    def nbytes(self) -> int:
        return sum(pair.down.nbytes + pair.up.nbytes for pair in self.pairs.values())

    @property
    def text(self) -> str:
        ranks = sorted({pair.down.shape[0] for pair in self.pairs.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return "\n".join([f"LoRA {self.path.name}: strength {self.strength:g}, {rank}, {len(self.pairs)} layers", *self.notes])


def open_lora(path: Path | str, part: Part, strength: float = 1.0) -> Lora:
    """Open a LoRA for a transformer: header and alphas only.

    Args:
        path: a safetensors file or a torch pickle (no code in it is run), or the folder that peft or diffusers wrote it to.
        part: the transformer's, on disk.

    Raises:
        ValueError: if it is not a LoRA, is one of another model, or its tensors do not fit together.
    """
    path = Path(path).expanduser()
    if not math.isfinite(strength):
        raise ValueError(f"The strength of {path.name} is {strength}, which would make every frame black. Set it to a number; 1 is usual.")
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).is_file()), path / _FILES[0])
    if not path.is_file():
        raise ValueError(f"There is no LoRA {path}. Check the path.")
    halves, alphas, text_encoder = _sort(read_any_header(path), path, _modules(part))
    if not halves:
        raise ValueError(f"{path} holds no change of the transformer: all its {text_encoder} tensors are for the text encoder. Choose another LoRA.")
    settings = _settings(path)
    pairs = {}
    for module, found in sorted(halves.items()):
        if set(found) != {"down", "up"}:
            (there,) = found
            missing = "up" if there == "down" else "down"
            raise ValueError(
                f"{path} holds the {there} half of {module} and not its {missing} half, so the change it was trained for is not whole. Download it "
                "again."
            )
        _check_shapes(path, module, found["down"].shape, found["up"].shape, part.tensors[f"{module}.weight"].shape)
        pairs[module] = Pair(found["down"], found["up"], _scale(module, found["down"].shape[0], alphas.get(module), settings))
    notes = () if not text_encoder else (f"{path.name} trains the text encoder too ({text_encoder} tensors), which is left as it is.",)
    return Lora(path, float(strength), pairs, notes)


@contextmanager
def applied(loras: Sequence[Lora], module: nn.Module, precision: Precision, device: torch.device | None = None) -> Iterator[None]:
    """Have the transformer ``module`` run with ``loras`` for the length of a ``with`` block; its weights are not touched.

    Args:
        device: where it runs, if its weights are not there all the time.

    Raises:
        ValueError: if a LoRA's weights hold NaN or Inf, or its file changed.
    """
    changes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for lora in loras:
        if lora.strength == 0:
            continue
        for name, pair in lora.pairs.items():
            down, up = (_read(lora, tensor) for tensor in (pair.down, pair.up))
            changes.setdefault(name, []).append((down, up.mul_(lora.strength * pair.scale)))
    hooks = []
    try:
        for name, pairs in changes.items():
            layer = module.get_submodule(name)
            # Several LoRAs are one of the sum of their ranks.
            down, up = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1)
            hooks.append(layer.register_forward_hook(_hook(layer, down, up, precision, device or _device(layer))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(layer: nn.Module, down: torch.Tensor, up: torch.Tensor, precision: Precision, device: torch.device) -> Callable:
    if isinstance(layer, RangeSafeLinear):
        return partial(_add_range_safe, _range_safe(down, device), _range_safe(up, device))
    # What a range-safe model leaves as it was (a convolution) runs in fp32.
    dtype = torch.float32 if precision.range_safe else precision.activations
    down, up = down.to(device, dtype), up.to(device, dtype)
    return partial(_add_convolved if down.ndim == 4 else _add, down, up)


def _add(down: torch.Tensor, up: torch.Tensor, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    output.flatten(0, -2).addmm_(F.linear(inputs[0], down).flatten(0, -2), up.t())
    return output


def _add_convolved(down: torch.Tensor, up: torch.Tensor, layer: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output.add_(F.conv2d(F.conv2d(inputs[0], down, None, layer.stride, layer.padding, layer.dilation), up))


def _add_range_safe(down: RangeSafeLinear, up: RangeSafeLinear, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    if len(inputs) == 2 and down.column_scale is not None:
        # Scaled per token already, which leaves no room for the scales of columns.
        inputs = (inputs[0].float().mul_(inputs[1]),)
    return output.add_(up(down(*inputs)))


def _range_safe(weight: torch.Tensor, device: torch.device) -> RangeSafeLinear:
    linear = RangeSafeLinear(weight.shape[1], weight.shape[0], bias=False, device=device)
    linear.load_weight(weight, device)
    return linear


def _device(layer: nn.Module) -> torch.device:
    return next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))


def _read(lora: Lora, stored: StoredTensor) -> torch.Tensor:
    """A tensor of a LoRA in fp32, on the host."""
    tensor = read_tensor(stored).float()
    check_finite(tensor, f"The LoRA {lora.path}", "Its file is damaged, or its training failed: download it again, or choose another.")
    return tensor


def _modules(part: Part) -> dict[str, str]:
    """Every name that a file can have for a layer of the transformer -> its own."""
    modules = [name.removesuffix(".weight") for name, stored in part.tensors.items() if name.endswith(".weight") and len(stored.shape) in (2, 4)]
    names = {name: name for name in modules}
    for name in modules:
        for alias in (name, comfy_name(name)):
            names.setdefault(alias, name)
            names.setdefault(alias.replace(".", "_"), name)
    return names


def _sort(tensors: Mapping[str, StoredTensor], path: Path, modules: Mapping[str, str]) -> tuple[dict, dict[str, float], int]:
    """The halves by module, the alphas by module, and the number of tensors for the text encoder.

    Raises:
        ValueError: for names that are not a LoRA's, or not of this model's.
    """
    halves: dict[str, dict[str, StoredTensor]] = {}
    alphas: dict[str, float] = {}
    text_encoder, unmatched, strange = 0, [], []
    for name, stored in tensors.items():
        half = _HALF.fullmatch(name)
        if name.startswith(_TEXT_ENCODER):
            text_encoder += 1
        elif half is None and not name.endswith(".alpha"):
            strange.append(name)
        else:
            module = modules.get(_module_name(half["path"] if half else name.removesuffix(".alpha")))
            if module is None:
                unmatched.append(name)
            elif half:
                halves.setdefault(module, {})["down" if half["down"] else "up"] = stored
            else:
                alphas[module] = _number(path, stored)
    if strange:
        kinds = sorted({kind for mark, kind in _RELATIVES.items() if any(mark in name for name in strange)})
        what = f"it is a {' and '.join(kinds)}, and only LoRAs are known here" if kinds else "it is not a LoRA"
        raise ValueError(
            f"{path} cannot be applied: {what}. {len(strange)} of its {len(tensors)} tensors are not a LoRA's ({_few(strange)}). A model is "
            "loaded with CogVideoX-1.5 Model Loader; of other kinds, ask their maker for a LoRA."
        )
    if unmatched:
        raise ValueError(
            f"{path} does not fit: {len(unmatched)} of its {len(tensors)} tensors ({_few(unmatched)}) match no layer of this CogVideoX transformer. "
            "It was made for another model, or another size of this one. Choose a LoRA trained on this checkpoint."
        )
    return halves, alphas, text_encoder


def _module_name(path: str) -> str:
    """A layer's name without what formats put around it: kohya's are with underscores throughout, and stay so."""
    for prefix in _FLAT_PREFIXES:
        if path.startswith(prefix):
            return path.removeprefix(prefix).lstrip("_")
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    # diffusers' first format named the attention's processor.
    return path.replace(".processor.", ".").removesuffix("_lora")


def _check_shapes(path: Path, module: str, down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> None:
    expected = len(down) == len(up) == len(weight) and down[1:] == weight[1:] and up[0] == weight[0] and all(size == 1 for size in up[2:])
    if expected and down[0] != up[1]:
        raise ValueError(
            f"{path} is damaged: the halves of {module} have the ranks {down[0]} and {up[1]} (shapes {list(down)} and {list(up)}), and must have "
            "one. Download it again."
        )
    if not expected:
        raise ValueError(
            f"{path} does not fit: for {module} it holds {list(down)} and {list(up)}, but the layer of this model is {list(weight)}. It was trained "
            "on another model (2b is 1920 wide, 5b and 1.5 are 3072). Choose a LoRA trained on this checkpoint."
        )


def _settings(path: Path) -> Mapping:
    """The numbers a file's maker wrote beside the weights: diffusers' metadata, or peft's ``adapter_config.json``."""
    beside = path.with_name("adapter_config.json")
    try:
        if path.name == _FILES[0] and beside.is_file():
            return json.loads(beside.read_text(encoding="utf-8"))
        written = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}")) if path.suffix == ".safetensors" else {}
    except ValueError as error:
        raise ValueError(f"The settings of the LoRA {path} cannot be read ({error}), so its strength is not known. Download it again.") from error
    return {name.removeprefix("transformer."): value for name, value in written.items()}


def _scale(module: str, rank: int, alpha: float | None, settings: Mapping) -> float:
    """alpha / rank; 1 where no alpha is given, as diffusers has it."""
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        found = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)), settings.get("lora_alpha"))
        alpha = rank if found is None else found
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _number(path: Path, stored: StoredTensor) -> float:
    if stored.nbytes != stored.dtype.itemsize:
        raise ValueError(f"{path} is damaged: an alpha has the shape {list(stored.shape)} and should be one number. Download it again.")
    return read_tensor(stored).item()


def _few(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
