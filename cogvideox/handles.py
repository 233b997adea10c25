"""What flows between nodes: small frozen handles that say what is to be run and how. Weights load when they are first used."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .checkpoint.layout import PARTS, Checkpoint, Part, open_checkpoint
from .checkpoint.loading import load_module
from .choices import MEMORY, MODES, check_choice
from .lora import Lora, open_lora, own_loras
from .memory import free_bytes
from .precision.hardware import Hardware
from .precision.policy import DtypePlan, Precision, plan_dtypes, size_text
from .precision.quantize import Loss, Method, Quantizer, choose_method, losses_text, quantizes
from .speed.attention import check_attention
from .speed.cache import Cache
from .speed.combine import check_choices, check_combination, refuse_second_method
from .speed.compiled import Compiled
from .variants import Variant

logger = logging.getLogger(__name__)

# One part is on the device at a time, and one thread uses it: the text encoder makes room for the transformer, that for the VAE.
_turn = threading.RLock()
#: Bytes beside the weights that a text encoder or VAE needs to run.
_ROOM = 1 << 30
_loaded: "weakref.WeakSet[Weights]" = weakref.WeakSet()


class Weights:
    """The weights of one part as they run on one device: nothing until ``running`` is first entered, then kept.

    Shared by every copy of a handle, and freed with the last of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, kind: str, precision: Precision, hardware: Hardware, memory: str = "auto", method: Method | None = None
    ):
        """``memory`` is one of ``choices.MEMORY``: where they are to be while they run; ``method``, how they are quantized."""
        self._checkpoint, self.kind, self.precision, self.hardware, self.memory = checkpoint, kind, precision, hardware, memory
        self.method = method
        self._module: nn.Module | None = None
        # How it was set up to run; None while any way is open.
        self._mode: str | None = None
        self._losses: Mapping[str, Loss] = {}
        self._quantized: weakref.WeakValueDictionary[Method, Weights] = weakref.WeakValueDictionary()

    def at(self, precision: Precision) -> "Weights":
        """The same part, to be run otherwise; nothing is shared and nothing loaded. Quantized weights stay so, as there may be no room for others,
        but activations are not quantized any more."""
        return Weights(self._checkpoint, self.kind, precision, self.hardware, self.memory, self.method and self.method.weight_only)

    def quantized(self, name: str) -> "Weights":
        """The same part, quantized by a method of ``choices.QUANTIZE`` when it loads: the same weights for all who ask while any of them has them.

        Raises:
            ValueError: if the part, or the device, does not allow that.
        """
        if self.method is not None:
            refuse_second_method(PARTS[self.kind][0], self.method.name)
        method = choose_method(name, self.part, self.hardware)
        if method not in self._quantized:
            found = Weights(self._checkpoint, self.kind, self.precision, self.hardware, self.memory, method)
            self._quantized[method] = found
            return found
        return self._quantized[method]

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    @property
    def part(self) -> Part:
        """The part on disk.

        Raises:
            ValueError: if the checkpoint does not hold it.
        """
        return self._checkpoint.part(self.kind)

    @property
    def config(self) -> Mapping:
        return self.part.config

    @property
    def nbytes(self) -> int:
        """Bytes the weights take as they run; weights stored in fp8 or quantized stay so, and others may be quantized."""
        return sum(map(self.bytes_of, self.part.tensors))

    def bytes_of(self, name: str) -> int:
        """Bytes that one tensor takes as it runs."""
        tensor = self.part.tensors[name]
        if self.quantizes(name):
            scales = 2 if self.precision.range_safe and not self.method.dynamic else 1
            return prod(tensor.shape) + scales * 4 * tensor.shape[0]
        return tensor.nbytes if tensor.is_packed else tensor.nbytes // tensor.dtype.itemsize * self.precision.dtype.itemsize

    def quantizes(self, name: str) -> bool:
        """Whether a tensor is quantized when it loads."""
        return self.method is not None and quantizes(self.kind, name, self.precision)

    @property
    def resident(self) -> int:
        """Bytes that they take on their device now."""
        with _turn:
            tensors = () if self._module is None else (*self._module.parameters(), *self._module.buffers())
            return sum(tensor.nbytes for tensor in tensors if tensor.device.type == self.device.type)

    @property
    def free(self) -> int | None:
        """Bytes they may take on their device: what is free, and what all parts hold there, as the others make way; None where it is not known."""
        free = free_bytes(self.device)
        return None if free is None else free + sum(part.resident for part in list(_loaded) if part.device == self.device)

    @property
    def is_loaded(self) -> bool:
        return self._module is not None

    @contextmanager
    def running(self, on_load: Callable[[int, int], None] | None = None, mode: str | None = None) -> Iterator[nn.Module]:
        """Have the module ready to run on its device for the length of a ``with`` block, loading it if this is the first time.

        Args:
            on_load: called with (bytes read, bytes in all) while loading; an exception it raises stops the load cleanly.
            mode: one of ``choices.MODES``: ``gpu`` has all of it on the device; the others keep it in the host's memory and have diffusers' group
                offloading bring what is about to run. By default what was chosen, or else the fastest that fits.
        """
        with _turn:
            for other in list(_loaded):
                if other is not self and other.device.type != "cpu":
                    other.park()
            mode = mode or self.fitting_mode()
            if self._mode not in (None, mode):
                # Hooks that offload cannot be taken off again by anything that is public.
                self._module, self._mode = None, None
            offloads = mode != MODES[0] and not _is_host(self.device)
            module = self._load(torch.device("cpu") if offloads else self.device, on_load)
            if offloads and self._mode is None:
                _offload(module, mode, self.device)
            self._mode = mode
            yield module if offloads else module.to(self.device)

    def quantization_text(self, on_load: Callable[[int, int], None] | None = None) -> str:
        """What quantizing saves and costs, measured on the weights themselves: they are loaded for it, into the host's memory, and are ready then."""
        with _turn:
            self._load(torch.device("cpu"), on_load)
        plain = Weights(self._checkpoint, self.kind, self.precision, self.hardware).nbytes
        sizes = f"{size_text(plain)} -> {size_text(self.nbytes)} in {self.precision.name}"
        return f"{PARTS[self.kind][0]}: {self.method.name}, {sizes}; {losses_text(self._losses)}"

    def _load(self, device: torch.device, on_load: Callable[[int, int], None] | None) -> nn.Module:
        """The module, read to ``device`` if it is not loaded."""
        if self._module is None:
            part, how = self.part, "" if self.method is None else f", {self.method.name}"
            logger.info("Loading the %s of %s in %s%s", PARTS[self.kind][0], self._checkpoint.path.name, self.precision.name, how)
            quantizer = None if self.method is None else Quantizer(self.method, self.kind, self.precision, self.device)
            self._module, self._mode = load_module(part, self.precision, device, on_load, quantizer), None
            self._losses = {} if quantizer is None else quantizer.losses
            _loaded.add(self)
        return self._module

    def fitting_mode(self) -> str:
        """The mode that was chosen, or else the fastest in which the weights fit, with a little room to run."""
        if self.kind == "vae":
            # It is small, and runs strip by strip.
            return MODES[0]
        if self.memory in MODES:
            return self.memory
        free = self.free
        return MODES[0] if free is None or self.nbytes + _ROOM <= free else MODES[-1]

    def park(self) -> None:
        """Move the weights to the host's memory."""
        with _turn:
            if self._module is not None and self._mode in (None, MODES[0]):
                self._module.to("cpu")

    def release(self) -> None:
        """Free the weights; the next ``running`` loads them again."""
        with _turn:
            self._module = None


def _is_host(device: torch.device) -> bool:
    """Whether a device's memory is the host's own, so that nothing can be offloaded to it."""
    return device.type == "cpu"


def _offload(module: nn.Module, mode: str, device: torch.device) -> None:
    """Have diffusers bring each block, or each layer, of a module in the host's memory to the device when it is about to run."""
    from diffusers.hooks import apply_group_offloading

    blocks = mode == "offload_blocks" and hasattr(module, "transformer_blocks")
    apply_group_offloading(
        module,
        onload_device=device,
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        # The next is on its way while one runs, from memory that is pinned as it goes: all of it pinned would be a second copy of the model.
        use_stream=device.type == "cuda",
        low_cpu_mem_usage=device.type == "cuda",
    )


@dataclass(frozen=True, eq=False)
class Model:
    """COGVIDEOX_MODEL: the transformer, its noise schedule, the scales of the latents it works on, and what it runs with.

    Attributes:
        latent_scale: what a VAE latent is multiplied by.
        image_latent_scale: what the latent of a start image is multiplied by: the inverse for CogVideoX1.5-5B-I2V, which was trained so
            (``invert_scale_latents`` of the VAE's config).
        loras: applied in this order whenever the transformer runs; the weights are never changed.
        cache: what is reused from step to step, if anything.
        compiled: how the blocks are compiled, if they are.
        attention: the kernel of the attention, one of ``speed.attention.BACKENDS``.
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

    def __post_init__(self):
        """Raises:
        ValueError: for choices that do not work together.
        """
        check_combination(self)


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
        frame_step: the clips its transformer makes have ``frame_step * N + 1`` frames.
    """

    weights: Weights
    frame_step: int = 16


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
        memory: ``auto``, ``gpu``, ``offload_blocks``, ``offload_layers`` or ``cpu``: where the weights are while they run.
        text_encoder, vae: files or folders of these parts, in the place of the checkpoint's own.
        tokenizer: the tokenizer's folder, for where neither the checkpoint nor the text encoder brings one.

    Raises:
        ValueError: if it is not a CogVideoX checkpoint, is incomplete, or does not suit ``dtype`` and ``on_mismatch`` is ``stop``.
    """
    return make_handles(open_checkpoint(path, text_encoder, vae, tokenizer), dtype, hardware, on_mismatch, memory)


def make_handles(
    checkpoint: Checkpoint, dtype: str = "auto", hardware: Hardware | None = None, on_mismatch: str = "fix", memory: str = "auto"
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
        return Weights(checkpoint, kind, plan.precision(kind if kind in checkpoint.parts else "transformer"), hardware, memory)

    return Handles(
        checkpoint,
        Model(checkpoint.variant, checkpoint.scheduler_config, *_latent_scales(checkpoint), weights("transformer"), loras),
        TextEncoder(checkpoint.tokenizer, checkpoint.text_tokens, weights("text_encoder")),
        VAE(weights("vae"), checkpoint.variant.frame_step),
        plan,
    )


def with_lora(model: Model, path: Path | str, strength: float = 1.0) -> Model:
    """The model with one more LoRA; the one given is not changed, and they share their weights.

    Raises:
        ValueError: if the file is not a LoRA, or not one of this model.
    """
    return replace(model, loras=(*model.loras, open_lora(path, model.weights.part, strength)))


def with_cache(model: Model, cache: Cache) -> Model:
    """The model with a step cache; the one given is not changed.

    Raises:
        ValueError: if it has one already, or one does not go with what else it has.
    """
    if model.cache is not None:
        check_choices([model.cache.method, cache.method], [], False, False)
    return replace(model, cache=cache)


def with_attention(model: Model, attention: str) -> Model:
    """The model with another attention; the one given is not changed.

    Raises:
        ValueError: if it will not run here.
    """
    precision = model.weights.precision
    check_attention(attention, model.weights.device, torch.float16 if precision.range_safe else precision.dtype)
    return replace(model, attention=attention)


def with_compile(model: Model, compiled: Compiled) -> Model:
    """The model with compiled blocks; the one given is not changed.

    Raises:
        ValueError: if compiling does not go with what else it has.
    """
    return replace(model, compiled=compiled)


def quantized(handle: _Handle, method: str) -> _Handle:
    """A model, or a text encoder, whose weights are quantized by a method of ``choices.QUANTIZE`` when they load. The handle given and its weights
    are not changed. A text encoder's activations stay as they are: with a dynamic method, its weights alone are quantized.

    Raises:
        ValueError: if the part, or the device, does not allow that.
    """
    return replace(handle, weights=handle.weights.quantized(method))


def _latent_scales(checkpoint: Checkpoint) -> tuple[float, float]:
    """What latents, and the latents of start images, are multiplied by."""
    config = checkpoint.parts["vae"].config if "vae" in checkpoint.parts else {}
    scale = config.get("scaling_factor", checkpoint.variant.latent_scale)
    # Folders that share one VAE between several transformers have the flag of only one of them: the family decides there.
    whole = checkpoint.parts["transformer"].source == checkpoint.path / "transformer" and "vae" in checkpoint.parts
    own = whole and checkpoint.parts["vae"].source == checkpoint.path / "vae"
    inverted = config.get("invert_scale_latents", False) if own else checkpoint.variant.inverts_image_latents
    return scale, 1 / scale if inverted else scale
