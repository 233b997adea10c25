"""Make a clip larger, or clearer, with one step of a CogVideoX that was trained for it: DOVE and SparkVSR.

Both were fine-tuned to take the latents of a blurred clip for noisy ones at timestep 399 and to predict the clean ones
from there. SparkVSR also sees some frames as they should be, its references, in 16 more channels. Figures and order of
work are those of the authors' scripts: https://github.com/zhengchen1999/DOVE (``inference_script.py``, Apache-2.0)
and SparkVSR's as kept in https://github.com/smthemex/ComfyUI_SparkVSR_SM (``sparkvsr_inference_script.py``,
Apache-2.0).

Where they draw a sample of the VAE's posterior from the global generator, here one CPU generator is seeded: the same
draws as theirs on a CPU after ``set_seed``, and the same on every card.

One file, as what is refused, what is encoded, the step and the decode follow from one another.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import interpolate

from .choices import AUTO, DOVE, DPM, SPARKVSR, SUPER_RESOLUTION, check_choice
from .dtypes import Precision
from .events import Events
from .finite import check_finite
from .geometry import padded, padding_frames, rotary_embedding
from .handles import VAE, Model
from .lora import applied
from .memory import check_host_room, choose_placements, plan_memory
from .modules.internals import LibraryModule
from .pictures import check_images
from .pieces import Clip, Pieces, Span, smaller
from .sampling import guide, make_speedups
from .schedulers import make_scheduler
from .sentinel import OutOfMemory, Sentinel
from .tensors import check_room
from .text import check_width
from .vae import decode, moments
from .variants import LATENT_CHANNELS, OFS, SIZE_STEP, TEMPORAL_COMPRESSION, full_config
from .weights import Placement, placements
from .words import listed, setting

#: The timestep of the one step (``sr_noise_step`` of both scripts).
TIMESTEP = 399
#: References are at least so many frames apart (the script's own check): each then has a latent frame of its own.
REFERENCE_STEP = 4
#: How much larger a clip can be made; the models were trained with 4.
SCALES = range(1, 9)
#: Bounds of the logarithm of the posterior's variance (diffusers' ``DiagonalGaussianDistribution``).
_LOG_VARIANCE = (-30.0, 20.0)


def find_kind(model: Model, kind: str = AUTO) -> str:
    """Return as what a checkpoint does super-resolution: ``dove`` or ``sparkvsr``.

    Args:
        kind: one of ``choices.SUPER_RESOLUTION``. No header tells SparkVSR from an image-to-video model, so that
            ``auto`` goes by its channels, and by the names of the checkpoint and its LoRAs.

    Raises:
        ValueError: for a checkpoint that cannot be of that kind, or does not say what it is.
    """
    check_choice("kind", kind, SUPER_RESOLUTION)
    config, name = full_config(model.weights.config), model.variant.name
    channels, channels_of = config["in_channels"], {DOVE: LATENT_CHANNELS, SPARKVSR: 2 * LATENT_CHANNELS}
    stretched = config["use_rotary_positional_embeddings"] and not config["patch_size_t"]
    if channels not in channels_of.values() or stretched or config["use_learned_positional_embeddings"]:
        raise ValueError(
            f"{name} ({channels} input channels) is not of a kind that was trained for super-resolution: DOVE is a "
            "fine-tune of CogVideoX1.5-5B or CogVideoX-2b, and SparkVSR one of CogVideoX1.5-5B-I2V. Load one of them."
        )
    if kind == AUTO:
        if channels == LATENT_CHANNELS:
            return DOVE
        if _is_named(model, SPARKVSR):
            return SPARKVSR
        raise ValueError(
            f"{name} has {channels} input channels, as image-to-video models and SparkVSR have, and its name does not "
            "say which it is. If it is SparkVSR, set kind to sparkvsr; otherwise load DOVE or SparkVSR."
        )
    if channels != channels_of[kind]:
        raise ValueError(
            f"kind is {kind}, which has {channels_of[kind]} input channels, and {name} has {channels}: it is another "
            "model. Set kind to auto, or load the other checkpoint."
        )
    return kind


def _is_named(model: Model, name: str) -> bool:
    names = [str(model.weights.part.source), *(lora.path.name for lora in model.loras)]
    return any(name in known.lower() for known in names)


def check_scale(scale: int) -> None:
    """Refuse a scale that no clip is made larger by.

    Raises:
        ValueError: for less than 1 or more than 8.
    """
    if scale not in SCALES:
        raise ValueError(
            f"scale is {scale}, but a clip is made {SCALES[0]} to {SCALES[-1]} times as large (1 only makes it "
            "clearer). The models were trained with 4."
        )


def check_reference_guidance(guidance: float) -> None:
    """Refuse a guidance by the references that is no factor.

    Raises:
        ValueError: for less than 0, or what is no number.
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(
            f"{setting('reference_guidance')} is {guidance}, but it is a factor from 0 (the references are not "
            "followed) over 1 (off, the default) upwards. Set it to 1."
        )


def read_reference_frames(text: str) -> tuple[int, ...]:
    """Read at which frames the references stand, counted from 0: ``0, 24, 48``. None are given by an empty text.

    Raises:
        ValueError: for what is no list of frames, or frames that are too near to each other.
    """
    name = setting("reference_frames")
    words = [word for word in re.split(r"[\s,;，；、]+", text) if word]
    odd = [word for word in words if not re.fullmatch(r"[0-9]{1,7}", word)]
    if odd:
        raise ValueError(
            f"{name} holds {listed(odd)}, which is no frame. Give whole numbers from 0, with commas: 0, 24, 48."
        )
    frames = tuple(int(word) for word in words)
    for first, second in zip(sorted(frames), sorted(frames)[1:], strict=False):
        if second - first < REFERENCE_STEP:
            raise ValueError(
                f"{name} has the frames {first} and {second}, and they have to be {REFERENCE_STEP} or more "
                "apart: nearer ones fall on one latent frame, where the second would replace the first. Take one away."
            )
    return frames


def check_references(kind: str, given: int | None, reference_frames: str, frames: int | None = None) -> tuple[int, ...]:
    """Refuse references that a run cannot use; return at which frames they stand.

    Args:
        kind: as ``find_kind`` has it.
        given: how many images there are, 0 for none; None where that is not known yet, but that there are some.
        frames: of the clip, where it is known.

    Raises:
        ValueError: saying what does not fit what.
    """
    places, name = read_reference_frames(reference_frames), setting("reference_frames")
    if given == 0 and not places:
        return ()
    if kind != SPARKVSR:
        raise ValueError(
            "References are given, and this checkpoint is run as DOVE, which reads none. Take them away and empty "
            f"{name}, or load SparkVSR."
        )
    if given == 0:
        raise ValueError(
            f"{name} names {len(places)} frames, and no reference images are given. Connect them to "
            f"{setting('references')}, or empty {name}."
        )
    if not places:
        raise ValueError(
            f"References are given, and {name} does not say which frames of the clip they are. Name them, "
            "counted from 0, such as 0, 24, 48."
        )
    if given is not None and given != len(places):
        raise ValueError(
            f"There are {given} reference images, and {name} names {len(places)} frames: each image needs "
            "the frame that it shows. Name as many."
        )
    if frames is not None and max(places) >= frames:
        raise ValueError(
            f"{name} names the frame {max(places)}, and the clip has {frames}, counted from 0: its last is "
            f"{frames - 1}. Name one of them."
        )
    return places


def check_enlarged(kind: str, frames: int, height: int, width: int, scale: int) -> None:
    """Refuse a clip that this computer's memory could not hold once it is made larger.

    Args:
        kind: as ``find_kind`` has it.
        height, width: as it is given.

    Raises:
        ValueError: with the bytes.
    """
    size = _empty(kind, frames, height, width, scale).size
    check_room(
        2 * 4 * math.prod(size) * 3,
        f"A clip of {width}x{height} pixels and {frames} frames, made {scale} times larger,",
        "Set a smaller scale, or cut the clip.",
    )


def _empty(kind: str, frames: int, height: int, width: int, scale: int) -> Clip:
    """Make a clip that has a size alone."""
    return Clip(torch.empty(frames, height, width, 0), scale, _grid(kind, scale))


def upscale(
    model: Model,
    vae: VAE,
    images: torch.Tensor,
    embeddings: torch.Tensor,
    *,
    scale: int = 4,
    seed: int = 0,
    kind: str = AUTO,
    references: torch.Tensor | None = None,
    reference_frames: str = "",
    reference_guidance: float = 1.0,
    piece: tuple[int, int, int] | None = None,
    on_nan: str = "heal",
    events: Events | None = None,
) -> torch.Tensor:
    """Make one clip of any size and length larger.

    Args:
        images: ``[F, H, W, 3]`` in 0..1, or uint8 in 0..255.
        embeddings: of the empty prompt, ``[1, tokens, width]``.
        scale: times as wide and high, 1 to 8. The models were trained with 4.
        seed: seeds one CPU generator, for the sample of the VAE's posterior.
        kind: as ``find_kind`` takes it.
        references: SparkVSR's: some frames as they should be, ``[n, h, w, 3]`` in 0..1, of any size.
        reference_frames: at which frames of the clip they stand, as ``read_reference_frames`` reads them.
        reference_guidance: away from what the model makes without references (their channels are zero there) and
            towards what it makes with them; 1 switches it off and halves the work.
        piece: frames (a multiple of 8), height and width (multiples of 16, in pixels of the result) of the pieces that
            it is made in. By default as large as the memory plan allows, at best all at once.
        on_nan: ``heal`` or ``stop``, for each part of the work.
        events: told of the loading, of the encoding, of each of the transformer's blocks and of the decoding.

    Returns:
        float32 ``[F, scale * H, scale * W, 3]`` in 0..1 on the CPU.

    Raises:
        ValueError: for input that it cannot be run with, before any weight is read.
        NonFiniteError: if something is not finite and is not, or cannot be, healed.
        OutOfMemory: if memory runs out even with the smallest pieces; where the clip was made all at once, its
            ``latents`` are what was to be decoded.
    """
    events = events or Events()
    kind = find_kind(model, kind)
    check_scale(scale)
    check_reference_guidance(reference_guidance)
    config = full_config(model.weights.config)
    images = images if images.dtype == torch.uint8 else check_images(images, "images")
    clip = Clip(images, scale, _grid(kind, scale))
    frames, height, width = images.shape[:3]
    check_enlarged(kind, frames, height, width, scale)
    places = check_references(kind, 0 if references is None else len(references), reference_frames, len(images))
    check_width(embeddings, config["text_embed_dim"])
    check_finite(embeddings, "The empty prompt's embedding", "Make it anew, with a text encoder.")
    shown = Shown([], ()) if references is None else _shown(check_images(references, "references"), places, clip)
    guidance = reference_guidance if places else 1.0
    for note in notes_of(model, kind, bool(places), reference_guidance):
        events.note(note)
    model = replace(model, cache=None)

    step = _OneStep(model, embeddings, kind, guidance, on_nan, events)
    sizes = [piece] if piece is not None else list(step.sizes(clip.size))
    while True:
        pieces = Pieces(clip.size, sizes.pop(0))
        if len(pieces.spans) > 1:
            events.note(pieces.text)
        noisy = _encode(vae, clip, pieces, shown, model.latent_scale, seed, on_nan, events)
        try:
            clean = step.run(noisy)
            break
        except OutOfMemory:
            if not sizes:
                raise
        events.healed("The card ran out of memory. Going on in smaller pieces, from the beginning.")
    return _decode(vae, clean, clip, pieces, on_nan, events)


def describe_plan(
    model: Model, frames: int, height: int, width: int, scale: int = 4, kind: str = AUTO, guidance: float = 1.0
) -> str:
    """Say in what pieces a clip would be made larger, from headers and shapes alone.

    Args:
        guidance: by references; 1 where there are none.

    Raises:
        ValueError: for a checkpoint or scale that it cannot be run with, or a clip that is too large then.
    """
    kind = find_kind(model, kind)
    check_scale(scale)
    check_enlarged(kind, frames, height, width, scale)
    size, model = _empty(kind, frames, height, width, scale).size, replace(model, cache=None)
    step = _OneStep(model, torch.empty(1, 0, 0), kind, guidance, "heal", Events())
    pieces = Pieces(size, next(step.sizes(size)))
    return f"{pieces.text} {plan_memory(model, pieces.largest, step.guided).text}"


def _grid(kind: str, scale: int) -> int:
    """What the clip's sides are padded to a multiple of, before it is enlarged: DOVE's script has 16, SparkVSR's 4 for
    its scale of 4. What is enlarged has to be a multiple of 16 in any case."""
    return SIZE_STEP if kind == DOVE else math.lcm(4, SIZE_STEP // math.gcd(SIZE_STEP, scale))


def notes_of(model: Model, kind: str, refers: bool, guidance: float) -> Iterator[str]:
    """Say what a run leaves out, and what it may not be meant for."""
    if model.cache is not None:
        yield "The cache is left out: it reuses what one step leaves to the next, and there is only one."
    if kind == DOVE and not _is_named(model, DOVE):
        yield (
            "Nothing in the checkpoint's name says DOVE. Others with 16 channels, such as CogVideoX1.5-5B itself, were "
            "not trained for super-resolution and make noise of a clip."
        )
    if not refers and abs(guidance - 1) > 1e-3:
        yield f"{setting('reference_guidance')} is {guidance}, and there are no references to follow: it has no effect."


@dataclass(frozen=True)
class Shown:
    """SparkVSR's references.

    Attributes:
        images: each ``[1, 3, H, W]`` in -1..1, of the enlarged clip's padded size, in the order of the frames.
        places: their frames.
    """

    images: Sequence[torch.Tensor]
    places: Sequence[int]

    def within(self, span: Span) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the latent frame of each reference that lies within a piece, and its picture there."""
        for place, image in zip(self.places, self.images, strict=True):
            latent = (place - span.start[0]) // TEMPORAL_COMPRESSION
            if 0 <= latent < span.latent_shape[2]:
                yield latent, span.cut(image)


def _shown(references: torch.Tensor, places: Sequence[int], clip: Clip) -> Shown:
    order = sorted(range(len(places)), key=lambda index: places[index])
    size, images = clip.size[1:], []
    for index in order:
        image = 2.0 * rearrange(references[index].cpu(), "h w c -> 1 c h w").contiguous() - 1.0
        # The whole of it, padding included, as the script has it.
        same = tuple(image.shape[2:]) == size
        images.append(image if same else interpolate(image, size=size, mode="bilinear", align_corners=False))
    return Shown(images, [places[index] for index in order])


def _encode(
    vae: VAE, clip: Clip, pieces: Pieces, shown: Shown, scale: float, seed: int, on_nan: str, events: Events
) -> list[torch.Tensor]:
    """Return what the transformer reads of each piece: latents ``[1, 16, T, h, w]``, scaled, and beside them the
    references', ``[1, 32, T, h, w]``, if there are any."""
    generator = torch.Generator("cpu").manual_seed(seed)
    spans = pieces.spans
    counts = [span.stop[0] - span.start[0] + 4 * len(list(shown.within(span))) for span in spans]
    done, found = 0, []

    def draw(frames: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        nonlocal done
        mean, log_variance = moments(
            vae, frames, prepare, on_nan=on_nan, events=_Share(events, done, sum(counts))
        ).chunk(2, dim=1)
        done += len(frames)
        deviation = torch.exp(0.5 * log_variance.clamp(*_LOG_VARIANCE))
        return (mean + deviation * torch.randn(mean.shape, generator=generator)) * scale

    for span in spans:
        latents = draw(clip.frames(span), partial(clip.enlarged, span))
        beside = torch.zeros_like(latents)
        for place, image in shown.within(span):
            # Four frames alike, and the first latent frame of them.
            still = rearrange(image, "1 c h w -> 1 c 1 h w").expand(-1, -1, TEMPORAL_COMPRESSION, -1, -1)
            numbers = torch.arange(TEMPORAL_COMPRESSION)
            beside[:, :, place] = draw(numbers, partial(torch.index_select, still, 2))[:, :, 0]
        found.append(torch.cat([latents, beside], dim=1) if shown.images else latents)
    return found


def _decode(
    vae: VAE, clean: list[torch.Tensor], clip: Clip, pieces: Pieces, on_nan: str, events: Events
) -> torch.Tensor:
    """Decode the pieces and put them together, without what pads them.

    Args:
        clean: latents of each piece, ``[1, 16, T, h, w]``, unscaled.
    """
    spans, lengths = pieces.spans, [latents.shape[2] for latents in clean]
    frames, height, width = len(clip.images), clip.scale * clip.height, clip.scale * clip.width
    images = torch.empty(frames, height, width, 3) if len(spans) > 1 else None
    for index, span in enumerate(spans):
        share = _Share(events, sum(lengths[:index]), sum(lengths))
        try:
            decoded = decode(vae, clean[index], on_nan=on_nan, events=share, in_pairs=False)
        except OutOfMemory as error:
            error.latents = clean[0] if images is None else None
            raise
        if images is None:
            return decoded[:frames, :height, :width].contiguous()
        inside, there = pieces.kept(span)
        target = images[tuple(there)]
        # What lies beyond the clip pads it.
        kept = (slice(part.start, part.start + size) for part, size in zip(inside, target.shape, strict=False))
        target.copy_(decoded[tuple(kept)])
    assert images is not None
    return images


class _Share(Events):
    """The part of one piece in the progress of all."""

    def __init__(self, events: Events, before: int, total: int):
        """Args:
        before: units of work of the pieces that are done.
        total: of all pieces.
        """
        self._events, self._before, self._total = events, before, total

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        if what in ("encoding", "decoding"):
            done, total = self._before + done, self._total
        self._events.progress(what, done, total, unit)

    def note(self, text: str, level: int = logging.WARNING) -> None:
        self._events.note(text, level)

    def healed(self, text: str) -> None:
        self._events.healed(text)

    def check_cancelled(self) -> None:
        self._events.check_cancelled()


class _OneStep:
    """The one step of the transformer, over all pieces of a clip."""

    def __init__(self, model: Model, embeddings: torch.Tensor, kind: str, guidance: float, on_nan: str, events: Events):
        self._model, self._embeddings, self._kind, self._guidance = model, embeddings, kind, guidance
        self._on_nan, self._events = on_nan, events
        self._config = full_config(model.weights.config)
        # Velocity and step of both scripts' scheduler; DDIM's are the same.
        self._scheduler = make_scheduler(model.scheduler_config, DPM)

    @property
    def guided(self) -> bool:
        return abs(self._guidance - 1) > 1e-3

    def sizes(self, whole: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        """Yield the sizes of pieces that fit, the largest first, and after them all smaller ones; the smallest in any
        case."""
        found = [whole]
        for size in smaller(whole):
            if math.prod(Pieces(whole, size).largest) < math.prod(Pieces(whole, found[-1]).largest):
                found.append(size)
        first = next((index for index, size in enumerate(found) if self._fits(Pieces(whole, size).largest)), -1)
        yield from found[first:]

    def _fits(self, shape: tuple[int, ...]) -> bool:
        weights = self._model.weights
        try:
            check_host_room(self._model, shape)
        except ValueError:
            return False
        if weights.free is None:
            return True
        plan = plan_memory(self._model, shape, self.guided, self._embeddings.shape[1] or None)
        found = placements((True, False) if self.guided else (True,))
        chosen = [placement for placement in found if placement.mode == weights.memory] or found
        return any(plan.fits(placement) for placement in chosen)

    def run(self, noisy: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the clean latents of each piece, ``[1, 16, T, h, w]``, unscaled, float32 on the CPU.

        Args:
            noisy: what ``_encode`` gives.
        """
        model, device = self._model, self._model.weights.device
        largest = max((latents[:, :LATENT_CHANNELS] for latents in noisy), key=torch.numel)
        tokens = self._embeddings.shape[1]
        chosen = choose_placements(model, largest, self.guided, True, tokens, self._events)
        speedups = make_speedups(model, largest.shape, tokens, [TIMESTEP], self._events.note)

        @contextmanager
        def prepared(module: nn.Module, precision: Precision, placement: Placement | None) -> Iterator[None]:
            batched = self.guided and placement is not None and placement.batched
            with applied(model.loras, module, precision, device), speedups.attached(module, batched, precision):
                yield

        clean = []
        with (
            Sentinel(model.weights, self._on_nan, self._events, prepared, chosen, speedups.shortcuts) as sentinel,
            torch.no_grad(),
        ):
            for index, latents in enumerate(noisy):
                self._events.check_cancelled()
                where = f"piece {index + 1} of {len(noisy)}"

                def work(
                    module: nn.Module, precision: Precision, index: int = index, latents: torch.Tensor = latents
                ) -> torch.Tensor:
                    speedups.begin(0, self.guided)
                    batched = sentinel.placement is not None and sentinel.placement.batched
                    calls = 2 if self.guided and not batched else 1
                    with _blocks_told(module, self._events, index, len(noisy), calls):
                        return self._step(latents.to(device), module, precision, calls)

                clean.append(self._unscaled(sentinel.run(work, where)))
        return clean

    def _step(self, latents: torch.Tensor, module: nn.Module, precision: Precision, calls: int) -> torch.Tensor:
        """Return the clean latents ``[1, T, 16, h, w]``, scaled, of one piece ``[1, 16 or 32, T, h, w]``."""
        config, dtype = self._config, precision.activations
        given = rearrange(latents, "b c t h w -> b t c h w")
        padding = padding_frames(given.shape[1], config)
        given = padded(given, padding, 1).to(dtype)
        video = given[:, :, :LATENT_CHANNELS]
        if given.shape[2] < config["in_channels"]:
            given = torch.cat([given, torch.zeros_like(video)], dim=2)
        copies = [given]
        if self.guided:
            copies.insert(0, torch.cat([video, torch.zeros_like(video)], dim=2))
        rotary = rotary_embedding(config, given.shape[1], given.shape[3], given.shape[4], given.device)
        predictions = []
        for read in copies if calls == 2 else [torch.cat(copies)]:
            count = len(read)
            predictions.append(
                module(
                    hidden_states=read,
                    encoder_hidden_states=self._embeddings.to(given).expand(count, -1, -1),
                    timestep=torch.full((count,), TIMESTEP, dtype=torch.long, device=given.device),
                    ofs=None if config["ofs_embed_dim"] is None else given.new_full((count,), OFS),
                    image_rotary_emb=rotary,
                    return_dict=False,
                )[0].float()
            )
        prediction = torch.cat(predictions)
        if self.guided:
            without, following = prediction.chunk(2)
            prediction = guide(without, following, self._guidance)
        timestep = torch.full((1,), TIMESTEP, dtype=torch.long, device=given.device)
        # The velocity of the prediction with the noisy latents for noise is what the prediction leads back to.
        return self._scheduler.get_velocity(prediction, video.float(), timestep)[:, padding:]

    def _unscaled(self, clean: torch.Tensor) -> torch.Tensor:
        scale = self._model.latent_scale
        video = rearrange(clean, "b t c h w -> b c t h w").to("cpu", torch.float32)
        # Each script in its own way, which is a rounding apart.
        return (1 / scale * video if self._kind == DOVE else video / scale).contiguous()


@contextmanager
def _blocks_told(module: LibraryModule, events: Events, index: int, count: int, calls: int) -> Iterator[None]:
    """Tell of each block of the transformer that is done, of all pieces together: one step can take minutes."""
    blocks = module.transformer_blocks
    total, done = count * calls * len(blocks), index * calls * len(blocks)

    def tell(*_: object) -> None:
        nonlocal done
        done += 1
        events.progress("upscaling", done, total, "block")

    hooks = [block.register_forward_hook(tell) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
