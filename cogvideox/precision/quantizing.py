"""Decide from headers whether and how a part can be quantized on a device, and say what it cost."""

from collections.abc import Mapping

from ..checkpoint.parts import Part
from ..choices import QUANTIZE, check_choice
from ..dtypes import dtype_name
from ..modules.quantize import LAYERS, METHODS, Loss, Method
from ..variants import PARTS
from ..words import short
from .hardware import ABSENT, Hardware


def choose_method(name: str, part: Part, hardware: Hardware) -> Method:
    """Choose the method that ``part`` is to be quantized by on ``hardware``, from its header alone.

    Raises:
        ValueError: if the name is not known, the device has no such products, or the file is a quantized copy already.
    """
    if part.kind != "transformer" and name in METHODS:
        name = METHODS[name].weight_only.name
    method = check_method(name, hardware)
    packed = sorted(
        {
            dtype_name(t.kind)
            for tensor, t in part.tensors.items()
            if t.is_packed and LAYERS[part.kind].fullmatch(tensor)
        }
    )
    if packed:
        raise ValueError(
            f"The {PARTS[part.kind][0]} ({short(part.source.name)}) is a quantized copy already "
            f"({', '.join(packed)}), which stays as small in memory as it is on disk: rounding it again would only "
            "lose more. Take CogVideoX-1.5 Quantize (--quantize) away, or load the original weights."
        )
    return method


def check_method(name: str, hardware: Hardware) -> Method:
    """Return the method of that name, if the device can run it.

    Raises:
        ValueError: if it is not known, or the device cannot; naming what to choose instead.
    """
    check_choice("The method", name, QUANTIZE)
    method = METHODS[name]
    eight, instead = (
        dtype_name(method.dtype).split(" ")[0],
        "Choose int8_weight_only, which runs everywhere and takes as little memory.",
    )
    if method.dynamic and getattr(hardware, eight) == ABSENT:
        needs = {
            "int8": "NVIDIA RTX 20xx and newer, AMD MI200 and MI300, CPUs",
            "fp8": "NVIDIA RTX 40xx, H100 and newer, AMD MI300, RX 9000",
        }
        raise ValueError(
            f"{method.name} multiplies in {eight}, and {hardware.name} has no matrix products of {eight} "
            f"({needs[eight]} do). {instead}"
        )
    if eight == "fp8" and hardware.device.type in ("mps", "privateuseone"):
        raise ValueError(f"{method.name} keeps weights in fp8, and {hardware.name} has no such dtype. {instead}")
    return method


def losses_text(losses: Mapping[str, Loss]) -> str:
    """Say how many layers were quantized and what that cost."""
    name, worst = max(losses.items(), key=lambda item: item[1].relative)
    layer = name.removesuffix(".weight")
    whole = Loss(sum(loss.error for loss in losses.values()), sum(loss.total for loss in losses.values()))
    return (
        f"{len(losses)} layers; relative error of their weights {whole.relative:.2%} "
        f"(largest {worst.relative:.2%}: {layer})"
    )
