"""What a run will take on a device, known from shapes alone, and what of it fits."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .choices import GPU, MODES
from .dtypes import Precision
from .events import Events
from .geometry import latent_frames, padding_frames, pixel_frames, rotary_embedding, video_tokens
from .modules import internals
from .modules.attention import bytes_beside
from .modules.fastest import Shape
from .modules.joint import join
from .modules.quantize import Method, quantize_empty
from .modules.range_safe import make_range_safe
from .tensors import check_room
from .variants import LATENT_CHANNELS, SPATIAL_COMPRESSION, full_config
from .weights import Placement, placements
from .windows import latents_at_once, spans
from .words import size_text

if TYPE_CHECKING:
    from .handles import Model

#: Bytes beside the weights with which 1360x768x81 is sampled, and decoded at nearly full speed; less works too.
WANTED_BYTES = 8 * 10**9


@dataclass(frozen=True)
class MemoryPlan:
    """What the steps of one run take on the device, in bytes.

    Attributes:
        weights: of the transformer as it runs.
        activations: of one step at most, attention included.
        loras: their weights, which stay on the device in every mode.
        cache: what a step cache holds.
        needed: by mode, all together.
        free: what there is, what loaded parts hold included, as they make way; None where it is not known.
        halved: activations where the halves of guidance run one after the other; None without guidance.
    """

    weights: int
    activations: int
    loras: int
    needed: Mapping[str, int]
    free: int | None
    cache: int = 0
    halved: int | None = None

    def bytes_of(self, placement: Placement) -> int:
        """Return all that a placement takes."""
        saved = 0 if placement.batched or self.halved is None else self.activations - self.halved
        return self.needed[placement.mode] - saved

    def fits(self, placement: Placement) -> bool:
        return self.free is None or self.bytes_of(placement) <= self.free

    def fastest(self, among: Sequence[Placement] = placements()) -> Placement:
        """Return the fastest of these placements that fits; they begin with the fastest.

        Raises:
            ValueError: if none does.
        """
        for placement in among:
            if self.fits(placement):
                return placement
        least = min(map(self.bytes_of, among))
        raise ValueError(
            f"This video needs {size_text(least, 1)} on the card even in the mode that takes the least, and "
            f"{size_text(self.free or 0, 1)} are free ({self._modes}). Make it smaller or shorter, close other "
            "programs that use the card, or set memory to cpu in the loader (--memory), which takes hours."
        )

    @property
    def text(self) -> str:
        parts = {"weights": self.weights, "activations": self.activations, "LoRAs": self.loras, "cache": self.cache}
        held = ", ".join(f"{name} {size_text(nbytes, 1)}" for name, nbytes in parts.items() if nbytes)
        said = f"{self._modes} ({held})"
        return said if self.free is None else f"{said}; {size_text(self.free, 1)} free"

    @property
    def _modes(self) -> str:
        modes = ", ".join(f"{mode} {size_text(nbytes, 1)}" for mode, nbytes in self.needed.items())
        if self.halved is None:
            return modes
        saved = size_text(self.activations - self.halved, 1)
        return f"{modes}, each {saved} less with the halves of guidance one by one"


def plan_memory(
    model: "Model", shape: tuple[int, ...], guided: bool = True, tokens: int | None = None, parts: int = 1
) -> MemoryPlan:
    """What a run of ``model`` takes, from its headers and shapes: no weights are read and nothing is computed.

    Args:
        shape: of the latent, ``[B, 16, T, H/8, W/8]``.
        guided: whether ``cfg`` is above 1.
        tokens: of the prompt; by default as many as the text encoder gives.
        parts: processes that share the tokens, of which this is one.
    """
    weights = model.weights
    tensors = weights.part.tensors
    sizes = {name: weights.bytes_of(name) for name in tensors}
    blocks: dict[str, int] = {}
    for name, nbytes in sizes.items():
        if name.startswith("transformer_blocks."):
            number = name.split(".")[1]
            blocks[number] = blocks.get(number, 0) + nbytes
    total, block, layer = sum(sizes.values()), max(blocks.values()), max(sizes.values())
    config = full_config(weights.config)
    tokens = tokens or config["max_text_seq_length"]
    batch, channels, length, *size = shape
    windows = spans(model.windows, length, config)
    run_at_once = (batch, channels, latents_at_once(model.windows, length, config), *size)
    beside = partial(bytes_beside, model.attention, device=weights.device)
    activations, halved = (
        step_bytes(config, weights.precision, run_at_once, together, tokens, weights.method, parts, beside)
        for together in (guided, False)
    )
    if len(windows) > 1:
        # The loop holds the whole clip, and blends it and its preview in fp32.
        outside = (length - windows[0].stop) * weights.precision.activations.itemsize
        more = _held_channels(config) * outside + 3 * 4 * channels * length
        activations, halved = (held + batch * prod(size) * more for held in (activations, halved))
    packed = [torch.Size(stored.shape).numel() for stored in tensors.values() if stored.is_packed]
    if packed:
        # One layer's weight at a time is widened, range-safe by way of fp32.
        widened = max(packed) * (6 if weights.precision.range_safe else weights.precision.dtype.itemsize)
        activations, halved = activations + widened, halved + widened
    loras = sum(lora.numbers for lora in model.loras) * weights.precision.dtype.itemsize
    cache = 0
    if model.cache is not None:
        copies, itemsize = batch * (2 if guided else 1), weights.precision.activations.itemsize
        for window in windows:
            padded = (batch, channels, window.stop - window.start, *size)
            cache += model.cache.nbytes(config, padded, copies, tokens, itemsize)
    # While one block or layer runs, the next is on its way.
    held = {"gpu": total, "offload_blocks": total - sum(blocks.values()) + 2 * block, "offload_layers": 2 * layer}
    needed = {mode: held[mode] + activations + loras + cache for mode in MODES}
    return MemoryPlan(total, activations, loras, needed, weights.free, cache, halved if guided else None)


def choose_placements(
    model: "Model", latents: torch.Tensor, guided: bool, joinable: bool, tokens: int, events: Events, parts: int = 1
) -> tuple[Placement, ...]:
    """Choose how to run, and how to go on should memory run out: in the memory mode that was chosen, or else the
    fastest that fits; told if that is not the fastest there is.

    Args:
        joinable: whether the prompts are of one length, so that both halves of guidance can be one batch.
        tokens: of the prompt.
        parts: processes that share the tokens, which do so only where the whole model is on the card.
    """
    found = placements((True, False) if guided and joinable else (joinable,))
    if parts > 1:
        found = tuple(placement for placement in found if placement.mode == GPU)
    chosen = [placement for placement in found if placement.mode == model.weights.memory] or found
    if model.weights.free is None:
        return found[found.index(chosen[0]) :]
    plan = plan_memory(model, latents.shape, guided, tokens, parts)
    first = plan.fastest(found) if chosen is found else next(filter(plan.fits, chosen), chosen[-1])
    if first.mode != chosen[0].mode:
        events.note(
            f"The whole model does not fit on the card, so it runs in {first.text}, which is slower and gives the "
            f"same video: {plan.text}."
        )
    elif first != chosen[0]:
        events.note(
            f"The halves of guidance run one after the other, as the card has no room for both at once: {plan.text}."
        )
    return found[found.index(first) :]


def choose_mode(model: "Model", shape: tuple[int, ...], tokens: int) -> str:
    """Choose how a copy of a model runs that evaluates one half of guidance: in the memory mode that was chosen, or
    else the fastest that fits, and the least where none does.

    Args:
        shape: of the latent, ``[B, 16, T, H/8, W/8]``.
        tokens: of the prompt.
    """
    weights, found = model.weights, placements((False,))
    if weights.memory in MODES:
        return weights.memory
    if weights.free is None:
        return found[0].mode
    plan = plan_memory(model, shape, False, tokens)
    return next(filter(plan.fits, found), found[-1]).mode


def check_host_room(model: "Model", shape: tuple[int, ...]) -> None:
    """Refuse a run that this computer's memory could not hold, from its shape alone and from below: latents and
    positions, and where the model runs on the host, what a block keeps of each token.

    Raises:
        ValueError: with the bytes.
    """
    config = full_config(model.weights.config)
    batch, _, length, height, width = shape
    at_once = latents_at_once(model.windows, length, config)
    tokens = video_tokens(config, (*shape[:2], at_once, height, width))
    head, itemsize = config["attention_head_dim"], model.weights.precision.activations.itemsize
    # Two tables in fp32; queries, keys, values, what they attend to, and the stream before and after.
    blocks = 6 * batch * head * config["num_attention_heads"] * itemsize if model.weights.device.type == "cpu" else 0
    size = f"{width * SPATIAL_COMPRESSION}x{height * SPATIAL_COMPRESSION} pixels and {pixel_frames(length)} frames"
    check_room(
        4 * prod(shape) + tokens * (2 * 4 * head + blocks),
        f"A step of {'a video' if batch == 1 else f'{batch} videos'} of {size}",
        "Make it smaller or shorter, or fewer at once.",
    )


def memory_text(model: "Model", shape: tuple[int, ...] | None = None, guided: bool = True, parts: int = 1) -> str:
    """What a run takes, in a sentence; by default one of the model card's size and length. ``parts`` as ``plan_memory``
    has it."""
    (width, height), frames = model.variant.default_size, model.variant.default_frames
    shape = shape or (
        1,
        LATENT_CHANNELS,
        latent_frames(frames),
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )
    size = f"{shape[4] * SPATIAL_COMPRESSION}x{shape[3] * SPATIAL_COMPRESSION}, {pixel_frames(shape[2])} frames"
    count = len(spans(model.windows, shape[2], full_config(model.weights.config)))
    if model.windows is not None and count > 1:
        size = f"{size} in {count} windows of {model.windows.length}"
    return f"memory to sample {size}: {plan_memory(model, shape, guided, parts=parts).text}"


def _held_channels(config: Mapping) -> int:
    """Count the channels of the whole clip that the loop of a run has, in the model's dtype, beside what it evaluates:
    the noise, what it began with, the latents of now and next, and what the model reads."""
    return 4 * LATENT_CHANNELS + config["in_channels"]


def step_bytes(
    config: Mapping,
    precision: Precision,
    shape: tuple[int, ...],
    guided: bool,
    tokens: int,
    method: Method | None = None,
    parts: int = 1,
    beside: Callable[[Shape, torch.dtype], int] = lambda *_: 0,
) -> int:
    """Bytes of activations at most in one step: a transformer of one block (the others are alike, and leave nothing
    behind) on the meta device. With the tokens in so many ``parts``, what is exchanged is there twice.

    Args:
        beside: what the attention takes beside queries, keys, values and its result.
    """
    from diffusers import CogVideoXTransformer3DModel

    batch, _, length, height, width = shape
    length += padding_frames(length, config)
    copies = batch * (2 if guided else 1)
    meta, dtype = torch.device("meta"), precision.activations
    with meta:
        module = CogVideoXTransformer3DModel.from_config(dict(config) | {"num_layers": 1})
    # torch's own: diffusers' warns of modules that are to stay in fp32, of which there are none.
    nn.Module.to(module, precision.dtype).eval()
    if precision.range_safe:
        make_range_safe(module)
        norms: list[internals.LibraryModule] = [child for child in module.modules() if isinstance(child, nn.LayerNorm)]
        for norm in norms:
            # It asks the weights otherwise.
            norm.range_safe_exponent = 0
    join(module)
    if method is not None:
        quantize_empty(module, method, precision)
    exchanged = 0
    if parts > 1:
        _run_a_part(module, parts)
        # Queries, keys, values and results, as they come in.
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        exchanged = 4 * copies * -(-(tokens + video_tokens(config, shape)) // parts) * channels * dtype.itemsize
    rotary = rotary_embedding(config, length, height, width, torch.device("cpu"))
    inputs = dict(
        hidden_states=torch.empty(copies, length, config["in_channels"], height, width, dtype=dtype, device=meta),
        encoder_hidden_states=torch.empty(copies, tokens, config["text_embed_dim"], dtype=dtype, device=meta),
        timestep=torch.empty(copies, dtype=torch.long, device=meta),
        ofs=None if config["ofs_embed_dim"] is None else torch.empty(1, dtype=dtype, device=meta),
        image_rotary_emb=None if rotary is None else tuple(table.to(meta) for table in rotary),
        return_dict=False,
    )
    given = sum(tensor.nbytes for tensor in _tensors(inputs.values()))
    loop = batch * _held_channels(config) * length * height * width * dtype.itemsize
    with torch.no_grad(), LiveBytes() as mode, FusedAttention(beside):
        module(**inputs)
    return mode.peak + given + loop + exchanged


def _run_a_part(module: internals.LibraryModule, parts: int) -> None:
    """Have a transformer's block look at a part of the tokens, and the output be of all, as where processes share
    them."""

    def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.tensor_split(parts, dim)[0]

    def enter(_: nn.Module, args: tuple, given: dict) -> tuple[tuple, dict]:
        rotary = given["image_rotary_emb"]
        streams = {name: part(given[name], 1) for name in ("hidden_states", "encoder_hidden_states")}
        positions = None if rotary is None else tuple(part(table, 0) for table in rotary)
        return args, {**given, **streams, "image_rotary_emb": positions}

    tokens: list[int] = []

    def leave(_: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.new_empty(output.shape[0], tokens.pop(), output.shape[2])

    def note(_: nn.Module, args: tuple, given: dict) -> None:
        tokens.append(given["hidden_states"].shape[1])

    block = module.transformer_blocks[0]
    block.register_forward_pre_hook(note, with_kwargs=True)
    block.register_forward_pre_hook(enter, with_kwargs=True)
    module.proj_out.register_forward_hook(leave)


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """Yield the tensors among what an operation takes or gives, those in lists too: it knows no other nests."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make under it while they live, on any device, the meta device
    too.

    Attributes:
        live, peak: bytes now, and at most.
        paused: while it is set, what is made is not counted.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            given = {internals.storage_id(tensor) for tensor in _tensors((*args, *(kwargs or {}).values()))}
            for tensor in _tensors((result,)):
                if internals.storage_id(tensor) not in given:
                    storage = tensor.untyped_storage()
                    given.add(internals.storage_id(tensor))
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
            self.peak = max(self.peak, self.live)
        return result

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes


class FusedAttention(TorchFunctionMode):
    """Attention as the one kernel that a device has for it: on the meta device torch would take it apart, and count its
    matrix of weights.

    Args:
        beside: bytes that the kernel takes meanwhile, of that shape and dtype.
    """

    def __init__(self, beside: Callable[[Shape, torch.dtype], int] = lambda *_: 0):
        super().__init__()
        self._beside = beside

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value, scale = given["query"], given["key"], given["value"], given.get("scale")
        batch, heads, tokens, channels = query.shape
        nbytes = self._beside(Shape(batch, tokens, heads, channels), query.dtype)
        held = torch.empty(nbytes, dtype=torch.uint8, device=query.device) if nbytes else None
        result = internals.fused_attention(query, key, value, scale)
        del held
        return result
