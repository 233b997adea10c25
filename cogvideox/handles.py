"""What flows between nodes: small frozen handles that say what is to be run and how. Weights load when they are first
used."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from .checkpoint.layout import Checkpoint, open_checkpoint
from .choices import MEMORY, check_choice
from .combinations import check_combination, check_second
from .lora import Lora, open_lora, own_loras
from .modules.attention import check_attention
from .modules.cache import Cache
from .modules.compiled import Compiled
from .precision.hardware import Hardware
from .precision.policy import DtypePlan, plan_dtypes
from .precision.quantizing import check_method
from .variants import Variant, full_config
from .weights import Weights
from .windows import Windows, check_pairs
from .words import short

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """COGVIDEOX_MODEL: the transformer, its noise schedule, the scales of the latents it works on, and what it runs
    with.

    Attributes:
        latent_scale: what a VAE latent is multiplied by.
        image_latent_scale: what the model reads beside the noise is multiplied by, the latent of a start image or what
            CogVideoX-Fun and VOID take: the inverse for CogVideoX1.5-5B-I2V, which was trained so
            (``invert_scale_latents`` of the VAE's config).
        loras: applied in this order whenever the transformer runs; the weights are never changed.
        cache: what is reused from step to step, if anything.
        compiled: how the blocks are compiled, if they are.
        attention: the kernel of the attention, one of ``choices.BACKENDS``.
        windows: how clips longer than one are made in windows, if they are.
        second: another device, where a copy evaluates one half of guidance.
    """

    variant: Variant
    scheduler_config: Mapping
    latent_scale: float
    image_latent_scale: float
    weights: Weights
    loras: tuple[Lora, ...] = ()
    cache: Cache | None = None
    compiled: Compiled | None = None
    attention: str = "auto"
    windows: Windows | None = None
    second: Hardware | None = None

    def __post_init__(self):
        """Raises:
        ValueError: for choices that do not work together.
        """
        weights, cache = self.weights, self.skipping
        check_combination(
            [] if cache is None else [cache],
            [] if weights.method is None else [weights.method.name],
            self.compiled is not None,
            weights.memory == "offload_layers" and weights.device.type != "cpu",
        )
        if self.second is not None:
            check_second(cache, self.compiled is not None)
            _check_can(self, self.second)

    @property
    def skipping(self) -> str | None:
        """The method of its cache, if that skips anything."""
        return self.cache.method if self.cache is not None and self.cache.strength > 0 else None


def _check_can(model: Model, second: Hardware) -> None:
    """Refuse a second device, of another kind than the first, that lacks what the model runs with.

    Raises:
        ValueError: with what the device lacks.
    """
    method = model.weights.method
    try:
        if method is not None:
            check_method(method.name, second)
        check_attention(model.attention, second.device, _attention_dtype(model.weights))
    except ValueError as error:
        raise ValueError(
            f"The second copy on {second.device} ({second.name}) cannot run as the first does. {error} Or take "
            "CogVideoX-1.5 Second GPU away."
        ) from error


def _attention_dtype(weights: Weights) -> torch.dtype:
    """Return the dtype of queries, keys and values."""
    return torch.float16 if weights.precision.range_safe else weights.precision.dtype


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """COGVIDEOX_TEXT_ENCODER: T5, its tokenizer, and the number of tokens a prompt is padded to."""

    tokenizer_folder: Path
    tokens: int
    weights: Weights


_Handle = TypeVar("_Handle", Model, TextEncoder)


@dataclass(frozen=True, eq=False)
class VAE:
    """COGVIDEOX_VAE: the checkpoint's own autoencoder.

    Attributes:
        frame_step, in_pairs: of the clips that its transformer makes, as ``Variant`` has them.
    """

    weights: Weights
    frame_step: int = 16
    in_pairs: bool = False


@dataclass(frozen=True, eq=False)
class Handles:
    """A checkpoint, its three handles and the dtype plan they follow."""

    checkpoint: Checkpoint
    model: Model
    text_encoder: TextEncoder
    vae: VAE
    plan: DtypePlan


def open_handles(
    path: Path | str,
    dtype: str = "auto",
    hardware: Hardware | None = None,
    on_mismatch: str = "fix",
    memory: str = "auto",
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    tokenizer: Path | str | None = None,
) -> Handles:
    """Open a checkpoint for running: configs and headers only, no weights.

    Args:
        path: a checkpoint in any layout that ``open_checkpoint`` knows.
        dtype: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        hardware: where to run; by default the GPU if there is one.
        on_mismatch: ``fix``, ``warn`` or ``stop``: what to do where ``dtype`` would give a wrong picture.
        memory: ``auto``, ``gpu``, ``offload_blocks``, ``offload_layers`` or ``cpu``: where the weights are while they
            run.
        text_encoder, vae: files or folders of these parts, in the place of the checkpoint's own.
        tokenizer: the tokenizer's folder, for where neither the checkpoint nor the text encoder brings one.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, is incomplete, or does not suit ``dtype`` and ``on_mismatch``
            is ``stop``.
    """
    return make_handles(open_checkpoint(path, text_encoder, vae, tokenizer), dtype, hardware, on_mismatch, memory)


def make_handles(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    hardware: Hardware | None = None,
    on_mismatch: str = "fix",
    memory: str = "auto",
) -> Handles:
    """The handles of a checkpoint that is open already: ``open_handles`` in one step."""
    check_choice("memory", memory, MEMORY)
    hardware = hardware or Hardware.detect()
    if memory == "cpu" and hardware.device.type != "cpu":
        hardware = Hardware.detect("cpu", hardware.forced)
    plan = plan_dtypes(checkpoint, dtype, hardware, on_mismatch)
    loras = own_loras(checkpoint.part("transformer"))
    for lora in loras:
        logger.info("%s", lora.text)

    def weights(kind: str) -> Weights:
        return Weights(
            checkpoint, kind, plan.precision(kind if kind in checkpoint.parts else "transformer"), hardware, memory
        )

    return Handles(
        checkpoint,
        Model(
            checkpoint.variant, checkpoint.scheduler_config, *_latent_scales(checkpoint), weights("transformer"), loras
        ),
        TextEncoder(checkpoint.tokenizer, checkpoint.text_tokens, weights("text_encoder")),
        VAE(weights("vae"), checkpoint.variant.frame_step, checkpoint.variant.in_pairs),
        plan,
    )


def with_lora(model: Model, path: Path | str, strength: float = 1.0) -> Model:
    """The model with one more LoRA; the one given is not changed, and they share their weights.

    Raises:
        ValueError: if the file is not a LoRA, or not one of this model.
    """
    return replace(model, loras=(*model.loras, open_lora(path, model.weights.part, strength)))


def with_cache(model: Model, cache: Cache) -> Model:
    """The model with a step cache; the one given is not changed. One that skips nothing takes no other's place.

    Raises:
        ValueError: if it has one already, or one does not go with what else it has.
    """
    if model.skipping is None:
        return replace(model, cache=cache)
    check_combination([model.skipping, *([cache.method] if cache.strength else [])], [], False, False)
    return model


def with_attention(model: Model, attention: str) -> Model:
    """The model with another attention; the one given is not changed.

    Raises:
        ValueError: if it will not run here.
    """
    check_attention(attention, model.weights.device, _attention_dtype(model.weights))
    return replace(model, attention=attention)


def with_compile(model: Model, compiled: Compiled) -> Model:
    """The model with compiled blocks; the one given is not changed.

    Raises:
        ValueError: if compiling does not go with what else it has.
    """
    return replace(model, compiled=compiled)


def with_windows(model: Model, windows: Windows) -> Model:
    """The model with context windows, in the place of those it may have; the one given is not changed.

    Raises:
        ValueError: for an overlap that cuts apart what the model reads together.
    """
    check_pairs(windows, full_config(model.weights.config))
    return replace(model, windows=windows)


def other_devices(device: torch.device) -> tuple[str, ...]:
    """List the devices on which a copy of a model on ``device`` can run at the same time, ``none`` last."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    own = device.index or 0
    return (*(f"cuda:{index}" for index in range(count) if index != own), "none")


def check_other_device(name: str, device: torch.device) -> None:
    """Refuse a second device that is not there.

    Raises:
        ValueError: saying which there are.
    """
    # The same CPU once more gains nothing, and shows that the result is the same.
    there = other_devices(device)
    if name not in there and not name == device.type == "cpu":
        raise ValueError(
            f"The second device is {short(name)}, and the model runs on {device}: a second copy cannot run there. "
            f"Beside it are here: {', '.join(there)}. Choose one of those; none runs on one device."
        )


def check_one_device(model: Model) -> None:
    """Refuse a model with a second copy, where another program decides what is evaluated when.

    Raises:
        ValueError: saying what to do.
    """
    if model.second is not None:
        raise ValueError(
            f"The model has a second copy on {model.second.device}, which only CogVideoX-1.5 Sampler gives half of the "
            "work. Use that, or take CogVideoX-1.5 Second GPU away."
        )


def with_second(model: Model, device: str) -> Model:
    """The model with a second copy on another device, or with none; the one given is not changed.

    Raises:
        ValueError: if there is no such device, it lacks what the model runs with, or a copy does not go with what else
            the model has.
    """
    check_other_device(device, model.weights.device)
    if device == "none":
        return replace(model, second=None)
    hardware = Hardware.detect(device, model.weights.hardware.forced)
    dtype = model.weights.precision.dtype
    if dtype == torch.bfloat16 and hardware.bf16 != model.weights.hardware.bf16:
        raise ValueError(
            f"The model runs in bf16, which {hardware.name} ({device}) does otherwise than "
            f"{model.weights.hardware.name}: the halves of guidance would differ. Choose fp16 in the loader, or none."
        )
    model.weights.copy_on(hardware)
    return replace(model, second=hardware)


def quantized(handle: _Handle, method: str) -> _Handle:
    """A model, or a text encoder, whose weights are quantized by a method of ``choices.QUANTIZE`` when they load. The
    handle given and its weights are not changed. A text encoder's activations stay as they are: with a dynamic method,
    its weights alone are quantized.

    Raises:
        ValueError: if the part, or the device, does not allow that.
    """
    return replace(handle, weights=handle.weights.quantized(method))


def _latent_scales(checkpoint: Checkpoint) -> tuple[float, float]:
    """What latents, and the latents of start images, are multiplied by."""
    variant = checkpoint.variant
    scale, inverted = variant.latent_scale, variant.inverts_image_latents
    if "vae" in checkpoint.parts:
        config = checkpoint.parts["vae"].config
        scale, inverted = config["scaling_factor"], bool(config.get("invert_scale_latents"))
    # The pipelines of CogVideoX-Fun and VOID never read that flag.
    return scale, 1 / scale if inverted and variant.image_to_video else scale
