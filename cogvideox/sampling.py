"""The denoising loop: free functions around diffusers' schedulers, equal to ``CogVideoXPipeline`` bit for bit.

Noise is drawn on the CPU in fp32 and cast to the dtype of the run, so that one seed is one video on every card and in
every dtype. That is the noise of the pipeline in fp32, and in 16 bits where torch draws the same there (2.13 does; 2.11
and before draw other numbers in 16 bits). Start images and clips are the mode of the VAE's posterior, where the
pipelines draw a sample of it.

Inside, latents are ``[B, T, 16, H/8, W/8]`` in the transformer's dtype, scaled and padded, as the transformer reads
them; ``sample`` takes and gives ComfyUI's ``[B, 16, T, H/8, W/8]``, unscaled.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from einops import rearrange
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint.configs import known_fields
from .choices import SCHEDULERS, check_choice
from .dtypes import Precision
from .finite import check_finite
from .geometry import check_latent, padding_frames, pixel_frames, rotary_embedding
from .handles import Model
from .lora import applied
from .memory import check_host_room, plan_memory
from .modules.speedups import Speedups
from .sentinel import OutOfMemory, Sentinel
from .tensors import check_tensor
from .variants import LATENT_CHANNELS, SPATIAL_COMPRESSION, TRAINED_STEPS, full_config
from .weights import Way, ways

logger = logging.getLogger(__name__)

#: ``ofs`` of the reference's image-to-video pipeline.
_OFS = 2.0
#: Called after each step with (steps done, steps in all, predicted clean latents [B, 16, T, H/8, W/8], scaled, on the
#: device). ``sample`` gives those of the video, without padding.
StepCallback = Callable[[int, int, torch.Tensor], None]


def sample(
    model: Model,
    positive: torch.Tensor,
    negative: torch.Tensor | None,
    latents: torch.Tensor,
    *,
    image_latents: torch.Tensor | None = None,
    seed: int,
    steps: int = 50,
    cfg: float = 6.0,
    scheduler: str = "ddim",
    denoise: float = 1.0,
    dynamic_cfg: bool = False,
    on_nan: str = "heal",
    on_step: StepCallback | None = None,
    on_load: Callable[[int, int], None] | None = None,
    on_heal: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """Denoise a batch of video latents.

    Args:
        positive, negative: prompt embeddings ``[1 or B, tokens, width]``; ``negative`` is not read at ``cfg`` 1 and may
            be None. Those of unequal length (prompts joined by Conditioning Concat) run one after the other.
        latents: ``[B, 16, T, H/8, W/8]``, unscaled. All zeros means "start from noise"; anything else is the video that
            ``denoise`` < 1 starts from.
        image_latents: what an image-to-video model starts from, ``[1 or B, 16, T, H/8, W/8]``, unscaled:
            ``vae.image_latents``.
        seed: seeds one CPU generator, as ``torch.Generator("cpu").manual_seed(seed)`` given to the reference pipeline.
            The noise is the same in every dtype the model runs in, but for the rounding to it.
        steps: steps of the whole schedule; ``denoise`` < 1 runs the last ``int(steps * denoise)`` of them, as
            ``CogVideoXVideoToVideoPipeline`` does with its ``strength``.
        cfg: classifier-free guidance (https://huggingface.co/papers/2207.12598); 1 switches it off.
        dynamic_cfg: the reference's cosine schedule of the guidance.
        on_nan: what to do at a step whose latents are not finite: ``heal`` repeats it in the next safer way to run and
            goes on, ``stop`` raises.
        on_step: called after each step; an exception it raises (an interruption) ends the run between two steps.
        on_heal: called with a sentence for the user when a step had to be healed.
        on_note: called with a sentence for the user where the model was not trained for what is asked, or does not fit
            on the card as a whole, and about what it is made faster with.

    Returns:
        float32 ``[B, 16, T, H/8, W/8]`` on the CPU, unscaled, with the ``T`` that came in, finite.

    Raises:
        ValueError: for input the model cannot run with, before any weight is read.
        NonFiniteError: for a step that is not finite and is not, or cannot be, healed.
        OutOfMemory: if memory runs out in the smallest way too; its ``latents`` are those of the last finished step, as
            returned otherwise.
    """
    check_tensor(latents, "The latent", "Use Empty CogVideoX-1.5 Latent, or what another node of this pack gives.")
    # Before all of it is looked at.
    check_latent(latents)
    check_host_room(model, latents.shape)
    check_finite(
        latents,
        "The latent",
        "Make it anew: the node that gave it ran in a dtype too small for its values, or its file is damaged.",
    )
    starts_from_noise = not latents.any().item()
    if starts_from_noise and denoise < 1.0:
        logger.warning(
            "denoise is %s, but the latent is empty: there is no video to start from, so the run starts from noise.",
            denoise,
        )
        denoise = 1.0
    noise_schedule, timesteps = plan_steps(
        model, latents, image_latents, steps=steps, scheduler=scheduler, denoise=denoise
    )
    config = full_config(model.weights.config)
    batch = latents.shape[0]
    check_guidance(cfg)
    guided = cfg > 1.0
    if guided and negative is None:
        raise ValueError(
            f"cfg is {cfg}, which needs a negative prompt to guide away from, and none is connected. Connect one or "
            "set cfg to 1."
        )
    prompts = [_check_embeddings(positive, "positive", config, batch)]
    if guided:
        prompts.insert(0, _check_embeddings(negative, "negative", config, batch))

    def tell(note: str, level: int = logging.WARNING) -> None:
        logger.log(level, "%s", note)
        if on_note is not None:
            on_note(note)

    for note in _outside_training(model, latents, image_latents):
        tell(note)

    joinable = len({prompt.shape[1] for prompt in prompts}) == 1
    smaller = _choose_ways(model, latents, guided, joinable, positive.shape[1], tell)
    device = model.weights.device
    padding = padding_frames(latents.shape[2], config)
    generator = torch.Generator("cpu").manual_seed(seed)
    speedups = Speedups(model.attention, model.cache, model.compiled, device, timesteps.tolist(), tell)

    @contextmanager
    def prepared(module: nn.Module, precision: Precision, way: Way) -> Iterator[None]:
        with applied(model.loras, module, precision, device), speedups.attached(module, guided and way.batched):
            yield

    with (
        Sentinel(model.weights, on_nan, on_load, on_heal, prepared, smaller, speedups.shortcuts) as sentinel,
        torch.no_grad(),
    ):
        dtype = model.weights.precision.activations
        start = rearrange(latents, "b c t h w -> b t c h w").to(device, dtype)
        start = model.latent_scale * torch.cat([start[:, :1].expand(-1, padding, -1, -1, -1), start], dim=1)
        noise = _draw_noise(start, generator)
        if image_latents is not None:
            image = rearrange(image_latents, "b c t h w -> b t c h w").expand(batch, -1, -1, -1, -1).to(device, dtype)
            # The reference's padding: zeros, as in every frame but the start image's. An end image stays the last.
            image = model.image_latent_scale * torch.cat(
                [image[:, :1], image.new_zeros(batch, padding, *image.shape[2:]), image[:, 1:]], dim=1
            )
        noisy = noise if denoise >= 1.0 else noise_schedule.add_noise(start, noise, timesteps[:1].to(device))

        def finished(latents: torch.Tensor) -> torch.Tensor:
            # The reference unscales in the model's own dtype, just before the VAE.
            unscaled = rearrange(1 / model.latent_scale * latents[:, padding:], "b t c h w -> b c t h w")
            return unscaled.to("cpu", torch.float32).contiguous()

        try:
            samples = finished(
                denoise_latents(
                    sentinel,
                    noise_schedule,
                    timesteps,
                    noisy * noise_schedule.init_noise_sigma,
                    [prompt.to(device, dtype) for prompt in prompts],
                    image=image if image_latents is not None else None,
                    ofs=_OFS if config["ofs_embed_dim"] is not None else None,
                    rotary=rotary_embedding(config, noisy.shape[1], *noisy.shape[3:], device),
                    cfg=cfg,
                    dynamic_cfg=dynamic_cfg,
                    generator=generator,
                    on_begin=speedups.begin,
                    on_step=None
                    if on_step is None
                    else lambda done, total, clean: on_step(done, total, clean[:, :, padding:]),
                )
            )
        except OutOfMemory as error:
            error.latents = finished(error.latents)
            raise
    speedups.report()
    return samples


def plan_steps(
    model: Model,
    latents: torch.Tensor,
    image_latents: torch.Tensor | None = None,
    *,
    steps: int = 50,
    scheduler: str = "ddim",
    denoise: float = 1.0,
):
    """Check all of a run that needs no prompt, reading no weights: to be called before minutes are spent on encoding
    one.

    Returns:
        The diffusers scheduler, set to ``steps``, and the timesteps that will run, ``[n]``.

    Raises:
        ValueError: for a latent, checkpoint or setting the sampler cannot run with.
    """
    config = full_config(model.weights.config)
    check_latent(latents, config["patch_size"])
    check_host_room(model, latents.shape)
    _check_image(model, config, latents, image_latents)
    noise_schedule = make_scheduler(model.scheduler_config, scheduler)
    return noise_schedule, schedule_timesteps(noise_schedule, steps, denoise)


def denoise_latents(
    sentinel: Sentinel,
    scheduler,
    timesteps: torch.Tensor,
    latents: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    *,
    image: torch.Tensor | None = None,
    ofs: float | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    cfg: float,
    dynamic_cfg: bool = False,
    generator: torch.Generator,
    on_begin: Callable[[int], None] | None = None,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Run the loop: ``latents`` ``[B, T, C, h, w]`` at ``timesteps[0]`` to clean latents of the same shape, in the
    dtype that the model then runs in.

    Args:
        sentinel: the transformer, entered; its way says whether both halves of guidance run as one batch.
        timesteps: on the host: the scheduler's own tables are there, and asking the device for one would wait for it.
        scheduler: a ``CogVideoXDDIMScheduler`` or ``CogVideoXDPMScheduler`` whose ``set_timesteps`` was called.
        prompts: embeddings ``[B, tokens, width]``, of the positive prompt; where ``cfg`` > 1 of the negative one before
            it.
        image: ``[B, T, C, h, w]``, scaled and padded, put beside the latents' channels.
        ofs: what 1.5's image-to-video models are told besides the timestep.
        generator: source of the noise that the DPM scheduler adds.
        on_begin: called with the index of a step whenever it is begun, again too if it is repeated.
    """
    guided = cfg > 1.0
    previous_clean, total = None, len(timesteps)
    on_device = timesteps.to(latents.device)

    @cache
    def embeddings(batched: bool, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        # The same tensors at every step: what depends on the prompts alone is computed, and kept, once for each.
        return [prompt.to(dtype) for prompt in ([torch.cat(list(prompts))] if batched else prompts)]

    def step(
        index: int, drawn: torch.Tensor, transformer: nn.Module, precision: Precision
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # A step that is done again draws the same noise again.
        generator.set_state(drawn)
        if on_begin is not None:
            on_begin(index)
        timestep, earlier = timesteps[index], timesteps[index - 1] if index > 0 else None
        current = latents.to(precision.activations)

        def predict(prompt: torch.Tensor) -> torch.Tensor:
            copies = prompt.shape[0] // current.shape[0]
            model_input = scheduler.scale_model_input(torch.cat([current] * copies), timestep)
            if image is not None:
                model_input = torch.cat([model_input, torch.cat([image.to(current.dtype)] * copies)], dim=2)
            return transformer(
                hidden_states=model_input,
                encoder_hidden_states=prompt,
                timestep=on_device[index].expand(model_input.shape[0]),
                ofs=None if ofs is None else current.new_full((1,), ofs),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0].float()

        prediction = torch.cat([predict(prompt) for prompt in embeddings(sentinel.way.batched, precision.activations)])
        if guided:
            scale = dynamic_guidance(cfg, scheduler.num_inference_steps, timestep.item()) if dynamic_cfg else cfg
            prediction = guide(*prediction.chunk(2), scale)
        stepped, clean = _step(scheduler, prediction, previous_clean, timestep, earlier, current, generator)
        return stepped.to(current.dtype), clean

    for index in range(total):
        try:
            latents, previous_clean = sentinel.run(
                partial(step, index, generator.get_state()), f"step {index + 1} of {total}"
            )
        except OutOfMemory as error:
            error.latents = latents
            raise
        if on_step is not None:
            on_step(index + 1, total, rearrange(previous_clean, "b t c h w -> b c t h w"))
    return latents


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: from the unconditional prediction towards, and past, the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def dynamic_guidance(cfg: float, steps: int, timestep: int) -> float:
    """The guidance of one step under ``dynamic_cfg``: the reference's formula, which sets a timestep (0..999) against a
    number of steps."""
    return 1 + cfg * ((1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2)


def make_scheduler(config: Mapping, name: str):
    """A fresh diffusers scheduler with the checkpoint's noise schedule.

    Raises:
        ValueError: for a name that is not one of ``SCHEDULERS``.
    """
    check_choice("scheduler", name, SCHEDULERS)
    import diffusers

    # Checked when the checkpoint was opened (``check_config``): what no table names is not used.
    return getattr(diffusers, SCHEDULERS[name]).from_config(known_fields("scheduler", config))


def schedule_timesteps(scheduler, steps: int, denoise: float) -> torch.Tensor:
    """Set the scheduler to ``steps`` and return the timesteps that ``denoise`` leaves to run, as ``steps_to_run``
    counts them.

    Raises:
        ValueError: if the noise schedule has no such timesteps.
    """
    trained = scheduler.config.num_train_timesteps
    count = steps_to_run(steps, denoise, trained)
    scheduler.set_timesteps(steps)
    # "trailing" adds up fractions: at 61 steps, 103 and others diffusers' makes one more, at a timestep of -1, which
    # would end a video in noise.
    scheduler.timesteps = scheduler.timesteps[:steps]
    if len(scheduler.timesteps) < steps or not 0 <= scheduler.timesteps.min() <= scheduler.timesteps.max() < trained:
        raise ValueError(
            f"The noise schedule of this checkpoint cannot be run in {steps} steps: with its steps_offset of "
            f"{scheduler.config.steps_offset} they would pass the {trained} timesteps it was trained with. Set steps "
            "to 50, or download scheduler/scheduler_config.json again."
        )
    return scheduler.timesteps[steps - count :]


def steps_to_run(steps: int, denoise: float, trained: int = TRAINED_STEPS) -> int:
    """How many of ``steps`` run at this ``denoise``: ``int(steps * denoise)``, as the reference's video-to-video
    pipeline counts them.

    Raises:
        ValueError: if no step would run, or more than the model was trained with.
    """
    if not 1 <= steps <= trained:
        raise ValueError(
            f"steps is {steps}; the model's noise schedule has 1 to {trained}, so this cannot be run. The model card "
            "uses 50."
        )
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(
            f"denoise is {denoise}, but it is a share between 0 and 1: how much of the video is made anew. Set it to "
            "1 to make all."
        )
    count = min(int(steps * denoise), steps)
    if count == 0:
        raise ValueError(
            f"denoise {denoise} of {steps} steps leaves no step to run, so nothing would change. Raise denoise to "
            f"{1 / steps:.3g} or more, or steps."
        )
    return count


def check_guidance(cfg: float) -> None:
    """Refuse a guidance that neither is off nor guides.

    Raises:
        ValueError: for less than 1, or what is no number.
    """
    if not 1.0 <= cfg < math.inf:
        raise ValueError(
            f"cfg is {cfg}, but guidance begins at 1, where it is off: less would lead away from the prompt. The "
            "model card uses 6."
        )


def _step(
    scheduler, prediction, previous_clean, timestep, earlier, latents, generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scheduler step: the next latents and the predicted clean ones. The two schedulers differ only in what they
    are told, and in that one draws noise."""
    if type(scheduler).__name__ == SCHEDULERS["dpm"]:
        with NoiseInFp32():
            return scheduler.step(
                prediction, previous_clean, timestep, earlier, latents, generator=generator, return_dict=False
            )
    return scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)


def _draw_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)


class NoiseInFp32(TorchFunctionMode):
    """Noise that a library draws in this ``with`` block is drawn in fp32 and cast to the dtype it asks for: torch
    before 2.13 draws other numbers in 16 bits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.randn or kwargs.get("dtype") in (None, torch.float32):
            return function(*args, **kwargs)
        return function(*args, **kwargs | {"dtype": torch.float32}).to(kwargs["dtype"])


def _check_image(model: Model, config: Mapping, latents: torch.Tensor, image_latents: torch.Tensor | None) -> None:
    takes_image = config["in_channels"] == 2 * LATENT_CHANNELS
    if config["in_channels"] not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
        raise ValueError(
            f"{model.variant.name} has {config['in_channels']} input channels; text-to-video models have "
            f"{LATENT_CHANNELS} and image-to-video ones {2 * LATENT_CHANNELS}, so it is an extension that is not "
            "known here. Load an official checkpoint or a fine-tune of one."
        )
    if takes_image and image_latents is None:
        raise ValueError(
            f"{model.variant.name} is an image-to-video model ({config['in_channels']} input channels) and no start "
            "image is connected: with text alone it makes noise. Put CogVideoX-1.5 Image to Video before the "
            "sampler, or load a text-to-video checkpoint such as CogVideoX1.5-5B."
        )
    if image_latents is not None:
        if not takes_image:
            raise ValueError(
                f"{model.variant.name} is a text-to-video model and a start image is connected, which it cannot read. "
                "Load an image-to-video checkpoint such as CogVideoX1.5-5B-I2V, or use CogVideoX-1.5 VAE Encode and "
                "denoise below 1 to start from a video."
            )
        check_latent(image_latents)
        check_finite(image_latents, "The start image's latent", "Encode it again with CogVideoX-1.5 Image to Video.")
        if image_latents.shape[2:] != latents.shape[2:] or image_latents.shape[0] not in (1, latents.shape[0]):
            image, video = (
                f"{list(tensor.shape)} ({tensor.shape[4] * 8}x{tensor.shape[3] * 8}, {pixel_frames(tensor.shape[2])} "
                "frames)"
                for tensor in (image_latents, latents)
            )
            raise ValueError(
                f"The conditioning was made for {image} and latent_image is {video}: the start image would not cover "
                "the video. Give the sampler the latent that CogVideoX-1.5 Image to Video gives, or one of the same "
                "size, length and batch."
            )
    if config["use_learned_positional_embeddings"]:
        trained = (config["sample_height"], config["sample_width"])
        if tuple(latents.shape[3:]) != trained:
            raise ValueError(
                f"{model.variant.name} has learned positions for {trained[1] * 8}x{trained[0] * 8} only, and the "
                f"latent is {latents.shape[4] * 8}x{latents.shape[3] * 8}. Set that size, or use CogVideoX1.5-5B-I2V, "
                "which takes others."
            )


def _choose_ways(
    model: Model, latents: torch.Tensor, guided: bool, joinable: bool, tokens: int, tell: Callable[[str], None]
) -> tuple[Way, ...]:
    """The way to run, and those to go on in should memory run out: in the memory mode that was chosen, or else the
    fastest that fits; told if that is not the fastest there is. Prompts of unequal length are not ``joinable`` into a
    batch."""
    found = ways((True, False) if guided and joinable else (joinable,))
    chosen = [way for way in found if way.mode == model.weights.memory] or found
    if model.weights.free is None:
        return found[found.index(chosen[0]) :]
    plan = plan_memory(model, latents.shape, guided, tokens)
    first = plan.fastest(found) if chosen is found else next(filter(plan.fits, chosen), chosen[-1])
    if first.mode != chosen[0].mode:
        tell(
            f"The whole model does not fit on the card, so it runs in {first.text}, which is slower and gives the "
            f"same video: {plan.text}."
        )
    elif first != chosen[0]:
        tell(f"The halves of guidance run one after the other, as the card has no room for both at once: {plan.text}.")
    return found[found.index(first) :]


def _check_embeddings(embeddings: torch.Tensor, name: str, config: Mapping, batch: int) -> torch.Tensor:
    width = config["text_embed_dim"]
    shape = list(embeddings.shape)
    if embeddings.ndim != 3 or shape[-1] != width:
        raise ValueError(
            f"The {name} conditioning has the shape {shape}, but this model reads [batch, tokens, {width}]: it was "
            "made by another model's text encoder. Encode the prompt with CogVideoX-1.5 Text Encode and this "
            "checkpoint's text encoder."
        )
    fixed = config["use_learned_positional_embeddings"] or not config["use_rotary_positional_embeddings"]
    if fixed and shape[1] != config["max_text_seq_length"]:
        raise ValueError(
            f"The {name} conditioning has {shape[1]} tokens, and this model has positions for exactly "
            f"{config['max_text_seq_length']}. Write one prompt instead of joining several (Conditioning Concat); "
            "Conditioning Average works."
        )
    if shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} conditioning holds {shape[0]} prompts and the latent {batch} videos, so it is not clear "
            "which belongs to which. Use one prompt for all, or as many as videos."
        )
    check_finite(
        embeddings,
        f"The {name} conditioning",
        "The text encoder that made it ran in a dtype too small for its values: encode the prompt with CogVideoX-1.5 "
        "Model Loader's own.",
    )
    return embeddings.expand(batch, -1, -1)


def _outside_training(model: Model, latents: torch.Tensor, image_latents: torch.Tensor | None) -> list[str]:
    """What of a run the model was not trained for, in sentences."""
    height, width = (size * SPATIAL_COMPRESSION for size in latents.shape[3:])
    notes = [model.variant.outside_model_card(width, height, pixel_frames(latents.shape[2]))]
    if image_latents is not None and image_latents.shape[2] > 1 and image_latents[:, :, -1].any():
        # No weight tells; those who train for it say so in the name.
        names = [str(model.weights.part.source), *(lora.path.name for lora in model.loras)]
        if not any("interp" in name.lower() for name in names):
            notes.append(
                f"An end image is connected. {model.variant.name} as released was trained with a start image only: "
                "unless this is a fine-tune for interpolation, the end will not be met."
            )
    return [note for note in notes if note]
