"""The denoising loop: free functions around diffusers' schedulers, equal to ``CogVideoXPipeline`` bit for bit.

Noise is drawn on the CPU in fp32 and cast to the dtype of the run, so that one seed is one video on every card and in
every dtype. That is the noise of the pipeline in fp32, and in 16 bits where torch draws the same there (2.13 does; 2.11
and before draw other numbers in 16 bits). Start images and clips are the mode of the VAE's posterior, where the
pipelines draw a sample of it.

Inside, latents are ``[B, T, 16, H/8, W/8]`` in the transformer's dtype, scaled and padded, as the transformer reads
them; ``sample`` takes and gives ComfyUI's ``[B, 16, T, H/8, W/8]``, unscaled.

One file, as a run is read from top to bottom: what it is given, the loop, a step, one evaluation.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from .dtypes import Precision
from .events import Events
from .finite import check_finite
from .geometry import check_latent, padded, padding_frames, rotary_embedding, video_tokens
from .handles import Model
from .lora import applied
from .memory import check_host_room, choose_mode, choose_placements
from .modules.fastest import Shape
from .modules.sharded import Call, Team
from .modules.speedups import Speedups
from .requests import (
    check_batch_index,
    check_embeddings,
    check_guidance,
    check_noise,
    fit_mask,
    guided_steps,
    outside_training,
    plan_steps,
    turns_of,
)
from .schedulers import advance
from .second import Second
from .sentinel import OutOfMemory, Sentinel
from .skips import plan_skips
from .tensors import check_tensor
from .variants import CONDITIONING_CHANNELS, INPAINT, OFS, full_config
from .weights import Placement
from .windows import Canvas, latents_at_once, spans
from .words import setting


def sample(
    model: Model,
    positive: torch.Tensor,
    negative: torch.Tensor | None,
    latents: torch.Tensor,
    *,
    image_latents: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    noise_mask: torch.Tensor | None = None,
    batch_index: Sequence[int] | None = None,
    seed: int,
    steps: int = 50,
    cfg: float = 6.0,
    scheduler: str = "ddim",
    denoise: float = 1.0,
    dynamic_cfg: bool = False,
    on_nan: str = "heal",
    cfg_start: float = 0.0,
    cfg_end: float = 1.0,
    events: Events | None = None,
    team: Team | None = None,
) -> torch.Tensor:
    """Denoise a batch of video latents.

    Args:
        positive, negative: prompt embeddings ``[1 or B, tokens, width]``; ``negative`` is not read at ``cfg`` 1 and may
            be None. Those of unequal length (prompts joined by Conditioning Concat) run one after the other.
        latents: ``[B, 16, T, H/8, W/8]``, unscaled. All zeros means "start from noise"; anything else is the video that
            ``denoise`` < 1 starts from.
        image_latents: what the model reads beside the noise, ``[1 or B, C, T, H/8, W/8]``, unscaled:
            ``vae.image_latents`` for image to video, what ``conditioning`` makes for CogVideoX-Fun and VOID. Without it
            CogVideoX-Fun reads zeros, which is text to video.
        noise: standard normal, ``[B, 16, T, H/8, W/8]``, in the place of what ``seed`` draws for the video; what pads
            it is drawn all the same.
        noise_mask: 1 where the video is made anew and 0 where ``latents`` are kept, as ``requests.fit_mask`` has it. At
            each step what is kept is the given video at that noise level, as core samplers do; where the mask is 0 it
            comes out as it went in.
        batch_index: which videos of a larger batch these are: they begin with the noise that ``seed`` draws for those.
        seed: seeds one CPU generator, as ``torch.Generator("cpu").manual_seed(seed)`` given to the reference pipeline.
            The noise is the same in every dtype the model runs in, but for the rounding to it.
        steps: steps of the whole schedule; ``denoise`` < 1 runs the last ``int(steps * denoise)`` of them, as
            ``CogVideoXVideoToVideoPipeline`` does with its ``strength``.
        cfg: classifier-free guidance (https://huggingface.co/papers/2207.12598); 1 switches it off.
        dynamic_cfg: the reference's cosine schedule of the guidance.
        on_nan: what to do at a step whose latents are not finite: ``heal`` repeats it in the next safer precision and
            goes on, ``stop`` raises.
        cfg_start, cfg_end: shares of the steps that run, between which the run is guided. Outside them a step follows
            the positive prompt alone, at half the cost, as with ``cfg`` 1.
        events: told of the loading, of each step, of steps that were healed, and of what the model was not trained for,
            does not fit on the card, or is made faster with.
        team: the processes that make these videos together, each of which calls this with the same arguments and gets
            the same videos.

    Returns:
        float32 ``[B, 16, T, H/8, W/8]`` on the CPU, unscaled, with the ``T`` that came in, finite.

    Raises:
        ValueError: for input the model cannot run with, before any weight is read.
        NonFiniteError: for a step that is not finite and is not, or cannot be, healed.
        OutOfMemory: if memory runs out even in the mode that takes the least; its ``latents`` are those of the last
            finished step, as returned otherwise.
    """
    events = events or Events()
    check_tensor(latents, "The latent", "Use Empty CogVideoX-1.5 Latent, or what another node of this pack gives.")
    # Before all of it is looked at.
    check_latent(latents)
    check_host_room(model, latents.shape)
    check_finite(
        latents,
        "The latent",
        "Make it anew: the node that gave it ran in a dtype too small for its values, or its file is damaged.",
    )
    if denoise < 1.0 and not latents.any().item():
        events.note(
            f"{setting('denoise')} is {denoise}, but the latent is empty: there is no video to start from, so the run "
            "starts from noise."
        )
        denoise = 1.0
    noise_schedule, timesteps = plan_steps(
        model, latents, image_latents, steps=steps, scheduler=scheduler, denoise=denoise
    )
    check_guidance(cfg, negative)
    guided = guided_steps(cfg, cfg_start, cfg_end, len(timesteps))
    if noise is not None:
        check_noise(noise, latents)
    if noise_mask is not None:
        noise_mask = fit_mask(noise_mask, latents, noise_schedule.config.prediction_type)
        empty = not latents.any().item()
        if empty:
            events.note("The latent is empty, so its noise mask has no video to keep: all of it is made anew.")
        if empty or (noise_mask == 1).all().item():
            noise_mask = None
    config = full_config(model.weights.config)
    prompts = [check_embeddings(positive, "positive", config, latents.shape[0])]
    if guided and negative is not None:
        prompts.insert(0, check_embeddings(negative, "negative", config, latents.shape[0]))
    for note in outside_training(model, latents, image_latents):
        events.note(note)
    windows = spans(model.windows, latents.shape[2], config)

    apart = team is None and model.second is not None and len(prompts) > 1
    placements = _placements(model, latents, guided, prompts, events, team, apart)
    device = model.weights.device
    turns = turns_of(guided)
    speedups = make_speedups(model, latents.shape, positive.shape[1], timesteps.tolist(), events.note, turns)

    @contextmanager
    def prepared(module: nn.Module, precision: Precision, placement: Placement | None) -> Iterator[None]:
        batched = bool(guided) and placement is not None and placement.batched
        together = nullcontext() if team is None else team.attached(module)
        with applied(model.loras, module, precision, device), speedups.attached(module, batched, precision), together:
            yield

    second = _second(model, latents.shape, positive.shape[1], timesteps.tolist(), turns, events) if apart else None
    with (
        nullcontext() if second is None else second,
        Sentinel(model.weights, on_nan, events, prepared, placements, speedups.shortcuts, team) as sentinel,
        torch.no_grad(),
    ):
        dtype = _holding(model, latents, noise, image_latents, *prompts)
        # In front, but for models that read a single frame with zeros behind it.
        padding = 0 if model.variant.in_pairs else padding_frames(latents.shape[2], config)
        generator = torch.Generator("cpu").manual_seed(seed)
        start = model.latent_scale * _padded(latents.to(device, dtype), padding)
        drawn = draw_noise(start, generator, check_batch_index(batch_index, len(start)))
        if noise is not None:
            drawn[:, padding:] = rearrange(noise, "b c t h w -> b t c h w")
        noisy = drawn if denoise >= 1.0 else noise_schedule.add_noise(start, drawn, timesteps[:1].to(device))
        kept = None
        if noise_mask is not None:
            mask = _padded(noise_mask.to(device), padding)
            kept = Kept(noise_schedule, mask, start.float(), drawn.float())
        run = Run(
            sentinel,
            noise_schedule,
            timesteps,
            Prompts([prompt.to(device, dtype) for prompt in prompts]),
            image=_beside(model, image_latents, latents, padding, dtype),
            ofs=OFS if config["ofs_embed_dim"] is not None else None,
            rotary={
                length: rotary_embedding(config, length, noisy.shape[3], noisy.shape[4], device)
                for length in {window.stop - window.start for window in windows}
            },
            cfg=cfg,
            guided=guided,
            dynamic_cfg=dynamic_cfg,
            generator=generator,
            speedups=speedups,
            padding=padding,
            behind=padding_frames(noisy.shape[1], config),
            kept=kept,
            windows=windows,
            overlap=0 if model.windows is None else model.windows.overlap,
            evaluate=_one_by_one if team is None else team.evaluate,
            second=second,
        )
        try:
            clean = run.denoise(noisy * noise_schedule.init_noise_sigma, events)
        except OutOfMemory as error:
            if error.latents is not None:
                error.latents = _unscaled(error.latents, padding, model.latent_scale)
            raise
        samples = _unscaled(clean, padding, model.latent_scale)
    if noise_mask is not None:
        samples = torch.where(noise_mask == 0, latents.to("cpu", torch.float32), samples)
    speedups.report()
    return samples


def _placements(
    model: Model,
    latents: torch.Tensor,
    guided: range,
    prompts: Sequence[torch.Tensor],
    events: Events,
    team: Team | None,
    apart: bool,
) -> tuple[Placement, ...]:
    """Choose how to run, and how to go on should memory run out; ``apart`` where two devices have a half of guidance
    each."""
    apart = apart or (team is not None and team.split.guidance > 1)
    joinable = len({prompt.shape[1] for prompt in prompts}) == 1 and not apart
    parts = 1 if team is None else team.split.sequence
    found = choose_placements(model, latents, bool(guided), joinable, prompts[-1].shape[1], events, parts)
    return found if team is None else tuple(team.least(found))


def make_speedups(
    model: Model,
    shape: Sequence[int],
    tokens: int,
    timesteps: Sequence[float],
    tell: Callable[[str, int], None],
    in_full: Collection[int] = (),
) -> Speedups:
    """Set up what a run is made faster with, as the handle says.

    Args:
        shape: of the latents, ``[B, 16, T, H/8, W/8]``; of a clip of several windows the transformer sees one.
        tokens: of a prompt.
        timesteps: of all steps of the run.
        tell: called with sentences for the user, and logging's level of each.
        in_full: steps that TeaCache must not skip, besides the first and the last.
    """
    config, device = full_config(model.weights.config), model.weights.device
    batch, channels, length, *size = shape
    at_once = latents_at_once(model.windows, length, config)
    heads = Shape(
        batch,
        tokens + video_tokens(config, (batch, channels, at_once, *size)),
        config["num_attention_heads"],
        config["attention_head_dim"],
    )
    skips = plan_skips(model, timesteps, in_full)
    return Speedups(model.attention, model.cache, model.compiled, device, timesteps, heads, tell, skips)


def _second(
    model: Model,
    shape: Sequence[int],
    tokens: int,
    timesteps: Sequence[float],
    turns: Collection[int],
    events: Events,
) -> Second:
    """Set up the copy of a model on its second device."""
    assert model.second is not None
    weights = model.weights.copy_on(model.second)

    @contextmanager
    def prepared(module: nn.Module, precision: Precision, speedups: Speedups, device: torch.device) -> Iterator[None]:
        with applied(model.loras, module, precision, device), speedups.attached(module, False, precision):
            yield

    copy = replace(model, weights=weights, second=None)
    # It tells nothing that the first does not.
    speedups = make_speedups(copy, shape, tokens, timesteps, lambda *_: None, turns)
    return Second(weights, choose_mode(copy, tuple(shape), tokens), speedups, prepared, events)


def _padded(latents: torch.Tensor, padding: int, zeros: bool = False) -> torch.Tensor:
    """Return ``[B, C, T, h, w]`` as ``[B, padding + T, C, h, w]``; ``zeros`` as ``geometry.padded`` has it."""
    return padded(rearrange(latents, "b c t h w -> b t c h w"), padding, 1, zeros)


def _holding(model: Model, *given: torch.Tensor | None) -> torch.dtype:
    """Return the dtype in which a run begins: that of its activations, or fp32 where something given, scaled, would
    become Inf in that. So a first step that is healed finds it as it was given."""
    scale = max(1.0, model.latent_scale, model.image_latent_scale)
    largest = max(float(tensor.abs().max()) for tensor in given if tensor is not None and tensor.numel())
    dtype = model.weights.precision.activations
    # Half of it: noise is added.
    return dtype if scale * largest < torch.finfo(dtype).max / 2 else torch.float32


def _beside(
    model: Model, given: torch.Tensor | None, latents: torch.Tensor, padding: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what the model reads beside the noise, ``[B, padding + T, C, h, w]``, scaled; None if there is nothing."""
    if given is None and model.variant.reads == INPAINT:
        given = latents.new_zeros(1, CONDITIONING_CHANNELS[INPAINT], *latents.shape[2:])
    if given is None:
        return None
    image = given.expand(latents.shape[0], -1, -1, -1, -1).to(model.weights.device, dtype)
    return model.image_latent_scale * _padded(image, padding, zeros=True)


def _unscaled(latents: torch.Tensor, padding: int, scale: float) -> torch.Tensor:
    """Return the latents of a run as ``sample`` gives them. The reference unscales in the model's own dtype, just
    before the VAE."""
    unscaled = rearrange(1 / scale * latents[:, padding:], "b t c h w -> b c t h w")
    return unscaled.to("cpu", torch.float32).contiguous()


def draw_noise(like: torch.Tensor, generator: torch.Generator, index: Sequence[int] | None = None) -> torch.Tensor:
    """Draw the noise of a batch, or what a larger one has at these places."""

    def draw(count: int) -> torch.Tensor:
        return torch.randn((count, *like.shape[1:]), generator=generator, dtype=torch.float32, device="cpu")

    if index is None:
        return draw(len(like)).to(like)
    # One after the other, as 16 channels make it the same: those that are not wanted take no memory.
    wanted = {}
    for number in range(max(index) + 1):
        noise = draw(1)
        if number in index:
            wanted[number] = noise
    return torch.cat([wanted[number] for number in index]).to(like)


class Prompts:
    """The embeddings ``[B, tokens, width]`` of a run: of the positive prompt, where it is guided of the negative one
    before it.

    The same tensors are given at every step: what depends on the prompts alone is computed, and kept, once for each.
    """

    def __init__(self, embeddings: Sequence[torch.Tensor]):
        self._embeddings = embeddings
        self._kept: dict[tuple[bool, bool, torch.dtype], list[torch.Tensor]] = {}

    def of(self, guided: bool, batched: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return what the transformer reads, one call each: all in one batch, or one after the other; where a step is
        not guided, the positive prompt alone."""
        key = guided, batched, dtype
        if key not in self._kept:
            read = self._embeddings if guided else self._embeddings[-1:]
            together = [torch.cat(list(read))] if batched else read
            self._kept[key] = [prompt.to(dtype) for prompt in together]
        return self._kept[key]


@dataclass(frozen=True)
class Kept:
    """The part of a video that a noise mask keeps, as core's ``KSamplerX0Inpaint`` has it.

    Attributes:
        mask: ``[1 or B, T, 1, h, w]``, 1 where the video is made anew.
        video, noise: ``[B, T, C, h, w]``, scaled, padded, float32.
    """

    scheduler: Any
    mask: torch.Tensor
    video: torch.Tensor
    noise: torch.Tensor

    def within(self, window: slice) -> "Kept":
        """Return the part of it in a context window."""
        return replace(self, mask=self.mask[:, window], video=self.video[:, window], noise=self.noise[:, window])

    def enter(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the latents of a step with what is kept at that noise level."""
        noised = self.scheduler.add_noise(self.video, self.noise, timestep[None].to(self.video.device))
        return (latents * self.mask + noised * (1 - self.mask)).to(latents.dtype)

    def hold(self, prediction: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the v that leads to the given video where it is kept, and to the predicted one elsewhere."""
        signal = self.scheduler.alphas_cumprod[timestep.item()].item()
        scale, deviation = signal**0.5, (1 - signal) ** 0.5
        clean = scale * latents.float() - deviation * prediction
        clean = clean * self.mask + self.video * (1 - self.mask)
        return (scale * latents.float() - clean) / deviation


@dataclass
class Run:
    """One run of the loop, and what is the same at each of its steps.

    Attributes:
        sentinel: the transformer, entered; its placement says whether both halves of guidance run as one batch.
        scheduler: one of diffusers' (``choices.SCHEDULERS``) whose ``set_timesteps`` was called.
        timesteps: on the host: the scheduler's own tables are there, and asking the device for one would wait for it.
        image: ``[B, T, C, h, w]`` of any number of channels, scaled and padded, put beside the latents' channels; a
            window reads its part.
        ofs: what 1.5's image-to-video models are told besides the timestep.
        rotary: cosines and sines of the positions, by the latent frames of a window: in each they begin anew.
        generator: source of the noise that the DPM scheduler adds.
        guided: the steps that are guided.
        padding: latent frames in front that are not the video's.
        behind: frames of zeros that the transformer reads behind them.
        kept: what a noise mask keeps.
        windows: what of the padded clip the transformer reads at once: all, or one window after the other.
        overlap: latent frames that a window shares with the next.
        evaluate: evaluates prompts by the transformer, and returns their predictions in order.
        second: a copy of the transformer that evaluates half of them.
    """

    sentinel: Sentinel
    scheduler: Any
    timesteps: torch.Tensor
    prompts: Prompts
    image: torch.Tensor | None
    ofs: float | None
    rotary: Mapping[int, tuple[torch.Tensor, torch.Tensor] | None]
    cfg: float
    guided: range
    dynamic_cfg: bool
    generator: torch.Generator
    speedups: Speedups
    padding: int
    windows: Sequence[slice]
    behind: int = 0
    kept: Kept | None = None
    overlap: int = 0
    evaluate: Callable[[Sequence[Call], nn.Module], list[torch.Tensor]] = field(default_factory=lambda: _one_by_one)
    second: Second | None = None
    _elsewhere: dict[tuple[int, torch.device], torch.Tensor] = field(init=False, default_factory=dict)
    _on_device: torch.Tensor = field(init=False)

    def denoise(self, latents: torch.Tensor, events: Events) -> torch.Tensor:
        """Run the loop: ``latents`` ``[B, T, C, h, w]`` at ``timesteps[0]`` to clean latents of the same shape, in the
        dtype that the model then runs in.

        Raises:
            OutOfMemory: with the latents of the last finished step.
        """
        self._on_device = self.timesteps.to(latents.device)
        clean: torch.Tensor | None = None
        for index in range(len(self.timesteps)):
            try:
                latents, clean = self._run_windows(index, latents, clean, events)
            except OutOfMemory as error:
                error.latents = latents
                raise
        return latents

    def _run_windows(
        self, index: int, latents: torch.Tensor, clean: torch.Tensor | None, events: Events
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next latents of the whole clip and the predicted clean ones, made window by window."""
        total, count, drawn = len(self.timesteps), len(self.windows), self.generator.get_state()

        def show(number: int, predicted: torch.Tensor) -> None:
            video = rearrange(predicted[:, self.padding :], "b t c h w -> b c t h w")
            events.step(index * count + number + 1, total * count, video)

        if count == 1:
            made, clean = self.sentinel.run(
                partial(self._step, index, 0, latents, clean, drawn), f"step {index + 1} of {total}"
            )
            show(0, clean)
            return made, clean
        stepped, predicted = Canvas(latents, self.overlap), Canvas(latents, self.overlap)
        for number, window in enumerate(self.windows):
            # Without what the scheduler of one window remembers: check_windows.
            made, cleaned = self.sentinel.run(
                partial(self._step, index, number, latents[:, window], None, drawn),
                f"step {index + 1} of {total}, window {number + 1} of {count}",
            )
            stepped.add(window, made)
            predicted.add(window, cleaned)
            show(number, predicted.blended(clean))
        return stepped.blended().to(made.dtype), predicted.blended()

    def _step(
        self,
        index: int,
        number: int,
        latents: torch.Tensor,
        previous_clean: torch.Tensor | None,
        drawn: torch.Tensor,
        transformer: nn.Module,
        precision: Precision,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next latents and the predicted clean ones of a window. It may be called again, otherwise, for one
        step."""
        # A step that is done again draws the same noise again.
        self.generator.set_state(drawn)
        guided, window = index in self.guided, self.windows[number]
        self._begin(index, guided, number)
        current, timestep = latents.to(precision.activations), self.timesteps[index]
        kept = None if self.kept is None else self.kept.within(window)
        if kept is not None:
            current = kept.enter(current, timestep)
        placement = self.sentinel.placement
        prompts = self.prompts.of(guided, placement is not None and placement.batched, precision.activations)
        image = None if self.image is None else self.image[:, window].to(current.dtype)
        calls = [partial(self._predict, index, current, image, prompt) for prompt in prompts]
        if self.second is None:
            prediction = torch.cat(self.evaluate(calls, transformer))
        else:
            restart = partial(self._begin, index, guided, number)
            prediction = torch.cat(self.second.evaluate(calls, transformer, restart))
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = guide(unconditional, conditional, self._guidance(index))
        if kept is not None:
            prediction = kept.hold(prediction, current, timestep)
        earlier = self.timesteps[index - 1] if index > 0 else None
        stepped, clean = advance(self.scheduler, prediction, previous_clean, timestep, earlier, current, self.generator)
        return stepped.to(current.dtype), clean

    def _begin(self, index: int, guided: bool, window: int) -> None:
        anew = self.second is not None and self.second.begin(index, guided, window)
        self.speedups.begin(index, guided, window, anew)

    def _predict(
        self,
        index: int,
        current: torch.Tensor,
        image: torch.Tensor | None,
        prompt: torch.Tensor,
        transformer: nn.Module,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return the transformer's prediction, float32 ``[copies * B, T, C, h, w]``, for a prompt of so many copies.

        Args:
            device: where the transformer is, if not where ``current`` is.
        """
        here, device = current.device, device or current.device
        if device != here:
            current = current.to(device)
            # The same tensor at each step, as at home.
            key = id(prompt), device
            if key not in self._elsewhere:
                self._elsewhere[key] = prompt.to(device)
            prompt = self._elsewhere[key]
        copies = prompt.shape[0] // current.shape[0]
        model_input = self.scheduler.scale_model_input(torch.cat([current] * copies), self.timesteps[index])
        if image is not None:
            model_input = torch.cat([model_input, torch.cat([image.to(device)] * copies)], dim=2)
        frames, rotary = model_input.shape[1], self.rotary[current.shape[1] + self.behind]
        if self.behind:
            model_input = functional.pad(model_input, (0, 0, 0, 0, 0, 0, 0, self.behind))
        prediction = transformer(
            hidden_states=model_input,
            encoder_hidden_states=prompt,
            timestep=self._on_device[index].to(device).expand(model_input.shape[0]),
            ofs=None if self.ofs is None else current.new_full((1,), self.ofs),
            image_rotary_emb=None if rotary is None else tuple(table.to(device) for table in rotary),
            return_dict=False,
        )[0]
        return prediction[:, :frames].to(here, torch.float32)

    def _guidance(self, index: int) -> float:
        if not self.dynamic_cfg:
            return self.cfg
        return dynamic_guidance(self.cfg, self.scheduler.num_inference_steps, int(self.timesteps[index]))


def _one_by_one(calls: Sequence[Call], transformer: nn.Module) -> list[torch.Tensor]:
    return [call(transformer) for call in calls]


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: from the unconditional prediction towards, and past, the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def dynamic_guidance(cfg: float, steps: int, timestep: int) -> float:
    """The guidance of one step under ``dynamic_cfg``: the reference's formula, which sets a timestep (0..999) against a
    number of steps."""
    return 1 + cfg * ((1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2)
