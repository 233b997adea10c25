"""The weights of one part as they run on one device, and where they are meanwhile."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from .checkpoint.layout import Checkpoint
from .checkpoint.parts import Part
from .checkpoint.shapes import infer_config
from .choices import GPU, MODES, OFFLOAD_BLOCKS, OFFLOAD_LAYERS
from .combinations import refuse_second_method
from .dtypes import Precision
from .events import Events
from .loading import build_module, load_module
from .modules.quantize import Loss, Method, Quantizer, quantizes
from .precision.hardware import Hardware
from .precision.quantizing import choose_method, losses_text
from .tensors import free_host_bytes
from .variants import PARTS
from .words import size_text

logger = logging.getLogger(__name__)

#: Share of the free memory that is counted on: allocators and convolutions' workspaces take some too.
_SHARE = 0.85


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on a device now; None where memory is not counted (the host, whose system swaps, Apple's
    GPU, whose memory is the host's, and other back ends)."""
    if device.type not in ("cuda", "xpu"):
        return None
    backend = getattr(torch, device.type)
    try:
        free, _ = backend.mem_get_info(device)
    except (RuntimeError, AttributeError):
        # Some of Intel's drivers, and the first torch that knows those cards, do not say.
        return None
    # What torch holds and does not use is free too.
    idle = backend.memory_reserved(device) - backend.memory_allocated(device)
    return int((free + idle) * _SHARE)


@dataclass(frozen=True)
class Placement:
    """How a part runs, as far as it decides what memory that takes.

    Attributes:
        mode: one of ``choices.MODES``.
        batched: whether both halves of guidance are one batch, as in the reference; else they run one after the other,
            in half the activations, which gives the same up to the rounding of another batch size; but not with the
            caches first_block, which decides by what it measures of a batch, and faster_cache, which predicts one half
            from the other.
    """

    mode: str
    batched: bool = True

    @property
    def text(self) -> str:
        return self.mode if self.batched else f"{self.mode} with the halves of guidance one after the other"


def placements(batched: Sequence[bool] = (True,)) -> tuple[Placement, ...]:
    """Return all placements, the fastest and largest first, with the choices there are for ``Placement.batched``."""
    return tuple(Placement(mode, together) for mode in MODES for together in batched)


# One part is on the device at a time, and one thread uses it: the text encoder makes room for the transformer, that for
# the VAE.
_turn = threading.RLock()
#: Bytes beside the weights that a text encoder or VAE needs to run.
_ROOM = 1 << 30
_loaded: "weakref.WeakSet[Weights]" = weakref.WeakSet()


def _is_host(device: torch.device) -> bool:
    """Whether a device's memory is the host's own, so that nothing can be offloaded to it."""
    return device.type == "cpu"


class Weights:
    """The weights of one part as they run on one device: nothing until ``running`` is first entered, then kept.

    Shared by every copy of a handle, and freed with the last of them.
    """

    _module: nn.Module | None = None
    #: Whether a part of a module may be there, of one that could not be loaded.
    _begun = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: str,
        precision: Precision,
        hardware: Hardware,
        memory: str = "auto",
        method: Method | None = None,
    ):
        """``memory`` is one of ``choices.MEMORY``: where they are to be while they run; ``method``, how they are
        quantized."""
        self._checkpoint, self.kind, self.precision = checkpoint, kind, precision
        self.hardware, self.memory, self.method = hardware, memory, method
        # How it was set up to run; None while any is open.
        self._mode: str | None = None
        # How often ``running`` is entered.
        self._in_use = 0
        self._losses: Mapping[str, Loss] = {}
        self._quantized: weakref.WeakValueDictionary[Method, Weights] = weakref.WeakValueDictionary()
        self._copies: dict[torch.device, Weights] = {}

    def at(self, precision: Precision) -> "Weights":
        """The same part, to be run otherwise; nothing is shared and nothing loaded. Quantized weights stay so, as there
        may be no room for others, but activations are not quantized any more."""
        return Weights(
            self._checkpoint, self.kind, precision, self.hardware, self.memory, self.method and self.method.weight_only
        )

    def quantized(self, name: str) -> "Weights":
        """The same part, quantized by a method of ``choices.QUANTIZE`` when it loads: the same weights for all who ask
        while any of them has them.

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

    def copy_on(self, hardware: Hardware) -> "Weights":
        """The same part on another device, or once more on the same: kept with this one, and not loaded before it is
        used.

        Raises:
            ValueError: if another program keeps these weights.
        """
        if hardware.device not in self._copies:
            self._copies[hardware.device] = Weights(
                self._checkpoint, self.kind, self.precision, hardware, self.memory, self.method
            )
        return self._copies[hardware.device]

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
        """Bytes the weights take as they run; weights stored in fp8 or quantized stay so, and others may be
        quantized."""
        return sum(map(self.bytes_of, self.part.tensors))

    def bytes_of(self, name: str) -> int:
        """Bytes that one tensor takes as it runs."""
        tensor = self.part.tensors[name]
        if self.quantizes(name):
            dynamic = self.method is not None and self.method.dynamic
            scales = 2 if self.precision.range_safe and not dynamic else 1
            return prod(tensor.shape) + scales * 4 * tensor.shape[0]
        return (
            tensor.nbytes
            if tensor.is_packed
            else tensor.nbytes // tensor.dtype.itemsize * self.precision.dtype.itemsize
        )

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
        """Bytes they may take on their device: what is free, and what all parts hold there, as the others make way but
        for one that runs; None where it is not known."""
        free = free_bytes(self.device)
        if free is None:
            return None
        there = [part for part in list(_loaded) if part.device == self.device]
        return free + sum(part.resident for part in there if part is self or not part._in_use)

    @property
    def is_stuck(self) -> bool:
        """Whether they could not make way for another part: they are on a device whole now, and the host has no room
        for them."""
        return self._lacks_host_room(0)

    def _lacks_host_room(self, beside: int) -> bool:
        """``is_stuck``, where the part that they make way for takes so many bytes of the host's memory, too."""
        if _is_host(self.device) or self._mode not in (None, GPU):
            return False
        # Those that wait in the host's memory already take no more of it.
        moved = self.resident
        return moved > 0 and moved + beside + _ROOM > free_host_bytes()

    def _host_bytes(self, device: torch.device) -> int:
        """Bytes of the host's memory that loading them to ``device`` takes. What runs there as it is stored is mapped
        from its file, and the system gives that up where it has to; Apple's GPU has no memory of its own."""
        if device.type not in ("cpu", "mps"):
            return 0
        if device.type == "mps":
            return self.nbytes
        return sum(
            self.bytes_of(name)
            for name, stored in self.part.tensors.items()
            if self.quantizes(name)
            or not (stored.is_packed or (stored.dtype == self.precision.dtype and not self.precision.range_safe))
        )

    @property
    def is_loaded(self) -> bool:
        return self._module is not None

    @contextmanager
    def running(self, events: Events | None = None, mode: str | None = None) -> Iterator[nn.Module]:
        """Have the module ready to run on its device for the length of a ``with`` block, loading it if this is the
        first time.

        Args:
            events: told of the loading; an exception it raises stops the load cleanly.
            mode: one of ``choices.MODES``: ``gpu`` has all of it on the device; the others keep it in the host's memory
                and have diffusers' group offloading bring what is about to run. By default what was chosen, or else the
                fastest that fits.
        """
        with _turn:
            waits = torch.device("cpu") if mode in (OFFLOAD_BLOCKS, OFFLOAD_LAYERS) else self.device
            make_room(self.device, self, 0 if self.is_loaded else self._host_bytes(waits))
            mode = mode or self.fitting_mode()
            if self._mode not in (None, mode):
                # Hooks that offload cannot be taken off again by anything that is public.
                self._free()
            offloads = mode != GPU and not _is_host(self.device)
            module = self._load(torch.device("cpu") if offloads else self.device, events)
            if offloads and self._mode is None:
                _offload(module, mode, self.device)
            self._mode = mode
            self._in_use += 1
            try:
                yield module if offloads else module.to(self.device)
            finally:
                self._in_use -= 1

    def quantization_text(self, events: Events | None = None) -> str:
        """Say what quantizing saves and costs, measured on the weights themselves: they are loaded for it, into the
        host's memory, and are ready then."""
        with _turn:
            self._load(torch.device("cpu"), events)
        plain = Weights(self._checkpoint, self.kind, self.precision, self.hardware).nbytes
        sizes = f"{size_text(plain)} -> {size_text(self.nbytes)} in {self.precision.name}"
        method = "not quantized" if self.method is None else self.method.name
        return f"{PARTS[self.kind][0]}: {method}, {sizes}; {losses_text(self._losses)}"

    def _load(self, device: torch.device, events: Events | None) -> nn.Module:
        """Return the module, read to ``device`` if it is not loaded."""
        if self._module is None:
            part, how = self.part, "" if self.method is None else f", {self.method.name}"
            logger.info(
                "Loading the %s of %s in %s%s",
                PARTS[self.kind][0],
                self._checkpoint.path.name,
                self.precision.name,
                how,
            )
            quantizer = None if self.method is None else Quantizer(self.method, self.kind, self.precision, self.device)
            name = PARTS[self.kind][0]
            what = f"loading {name}" if self.method is None else f"quantizing {name}"
            told = None if events is None else events.counter(what, "B")
            self._make_host_room(self._host_bytes(device), events)
            self._begun = True
            self._module, self._mode = load_module(part, self.precision, device, told, quantizer), None
            self._begun = False
            self._losses = {} if quantizer is None else quantizer.losses
            _loaded.add(self)
        return self._module

    def _make_host_room(self, nbytes: int, events: Events | None) -> None:
        """Free parts that wait in the host's memory where so many bytes are not free there: they are read again when
        they run, which takes no longer than having the system move them to disk and back. Told where that is not
        enough."""
        for other in sorted(_loaded, key=lambda part: part.nbytes, reverse=True):
            if nbytes and nbytes + _ROOM > free_host_bytes() and other is not self and other._waits:
                logger.info("The %s makes way in this computer's memory", PARTS[other.kind][0])
                other._free()
        free = free_host_bytes()
        if events is not None and nbytes > free and self.method is None and self.kind != "vae":
            events.note(
                f"The {PARTS[self.kind][0]} takes {size_text(nbytes, 1)} of this computer's memory, and "
                f"{size_text(free, 1)} are free: the system has to move some of it to disk, which is slow, or ends "
                "this program. Close other programs, or make it smaller with CogVideoX-1.5 Quantize (--quantize, "
                "--quantize-text-encoder)."
            )

    @property
    def _waits(self) -> bool:
        """Whether they are in the host's memory, and nobody runs them."""
        return self._module is not None and not self._in_use and next(self._module.parameters()).device.type == "cpu"

    def fitting_mode(self) -> str:
        """The mode that was chosen, or else the fastest in which the weights fit, with a little room to run."""
        if self.kind == "vae":
            # It is small, and runs strip by strip.
            return GPU
        if self.memory in MODES:
            return self.memory
        free = self.free
        return GPU if free is None or self.nbytes + _ROOM <= free else OFFLOAD_LAYERS

    def park(self, copies: bool = True, beside: int = 0) -> None:
        """Move the weights to the host's memory, or free them where it has no room for them; their copies' too, unless
        those are to stay where they are. Weights that run stay: another model may be called within a step of theirs.

        Args:
            beside: bytes of the host's memory that will be taken by what they make way for.
        """
        with _turn:
            if self._in_use:
                pass
            elif self._lacks_host_room(beside):
                self._free()
            elif self._module is not None and self._mode in (None, GPU):
                self._module.to("cpu")
            for copy in self._copies.values() if copies else ():
                copy.park()

    def release(self) -> None:
        """Free the weights, and their copies'; the next ``running`` loads them again."""
        with _turn:
            self._free()
            for copy in self._copies.values():
                copy.release()

    def _free(self) -> None:
        """Free the module now, or what there is of one that could not be loaded: what stands in the place of its
        methods refers to it, so that it would stay, on a card too, until the interpreter looks for what nobody uses
        any more."""
        there = () if self._module is None else (*self._module.parameters(), *self._module.buffers())
        held = [weakref.ref(tensor) for tensor in there]
        del there
        self._module = self._mode = None
        if self._begun or any(tensor() is not None for tensor in held):
            gc.collect()
        self._begun = False

    def __del__(self) -> None:
        if self._module is not None:
            self._free()


class SharedWeights(Weights):
    """The weights of a part that another program has loaded and keeps: they are used and not copied, and it is that
    program that moves and counts them.

    They run from where they are. Only what lies elsewhere than on ``hardware.device``, or is to run in another dtype,
    is copied there for the length of a run.
    """

    def __init__(
        self,
        kind: str,
        tensors: Callable[[], Mapping[str, torch.Tensor]],
        owner: str,
        precision: Precision,
        hardware: Hardware,
    ):
        """Args:
        tensors: gives the weights by the names of diffusers' or transformers' module, wherever they are at the moment.
        owner: whose they are, for messages.
        """
        self.kind, self.precision, self.hardware, self.memory, self.method = kind, precision, hardware, GPU, None
        self._tensors, self._owner = tensors, owner

    def copy_on(self, hardware: Hardware) -> Weights:
        raise ValueError(
            f"The weights are kept by {self._owner}, which has them on one device. Load the checkpoint with "
            "CogVideoX-1.5 Model Loader to run it on two."
        )

    def at(self, precision: Precision) -> "SharedWeights":
        return SharedWeights(self.kind, self._tensors, self._owner, precision, self.hardware)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def resident(self) -> int:
        return 0

    @contextmanager
    def running(self, events: Events | None = None, mode: str | None = None) -> Iterator[nn.Module]:
        with _turn:
            make_room(self.device, self)
            tensors = self._tensors()
            module = build_module(self.kind, infer_config(self.kind, tensors, Path(self._owner)))
            # New parameters of the same memory: the other program's own are not touched.
            module.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
            # Not diffusers' own, which warns of what it would keep in fp32.
            nn.Module.to(module, self.device, self.precision.dtype)
            yield module.requires_grad_(False).eval()

    def park(self, copies: bool = True, beside: int = 0) -> None:
        """Leave them: the other program moves them."""

    def release(self) -> None:
        """Leave them: the other program frees them."""


def make_room(device: torch.device, but: Weights | None = None, on_host: int = 0) -> None:
    """Have all parts leave a device that is not the host, but for one, which will take so many bytes ``on_host``."""
    for other in list(_loaded):
        if other is not but and other.device == device and device.type != "cpu":
            other.park(copies=False, beside=on_host)


def _offload(module: nn.Module, mode: str, device: torch.device) -> None:
    """Have diffusers bring each block, or each layer, of a module in the host's memory to the device when it is about
    to run."""
    from diffusers.hooks import apply_group_offloading

    blocks = mode == OFFLOAD_BLOCKS and hasattr(module, "transformer_blocks")
    apply_group_offloading(
        module,
        onload_device=device,
        offload_type="block_level" if blocks else "leaf_level",
        num_blocks_per_group=1 if blocks else None,
        # The next is on its way while one runs, from memory that is pinned as it goes: all of it pinned would be a
        # second copy of the model.
        use_stream=device.type == "cuda",
        low_cpu_mem_usage=device.type == "cuda",
    )
