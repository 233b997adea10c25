"""The denoising loop: free functions around diffusers' schedulers, equal to ``CogVideoXPipeline`` bit for bit.

Inside, latents are ``[B, T, 16, H/8, W/8]`` in the transformer's dtype, scaled and padded, as the transformer reads them;
``sample`` takes and gives ComfyUI's ``[B, 16, T, H/8, W/8]``, unscaled.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from einops import rearrange
from torch import nn

from .choices import SCHEDULERS
from .geometry import check_latent, padding_frames, pixel_frames, rotary_embedding
from .handles import Model
from .precision.policy import Precision
from .precision.sentinel import Sentinel, check_finite
from .variants import LATENT_CHANNELS, SPATIAL_COMPRESSION

logger = logging.getLogger(__name__)

#: Called after each step with (steps done, steps in all, predicted clean latents [B, 16, T, H/8, W/8], scaled, on the device).
StepCallback = Callable[[int, int, torch.Tensor], None]


def sample(
    model: Model,
    positive: torch.Tensor,
    negative: torch.Tensor | None,
    latents: torch.Tensor,
    *,
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
) -> torch.Tensor:
    """Denoise a batch of video latents.

    Args:
        positive, negative: prompt embeddings ``[1 or B, tokens, width]``; ``negative`` is not read at ``cfg`` 1 and may be None.
        latents: ``[B, 16, T, H/8, W/8]``, unscaled. All zeros means "start from noise"; anything else is the video that
            ``denoise`` < 1 starts from.
        seed: seeds one CPU generator, as ``torch.Generator("cpu").manual_seed(seed)`` given to the reference pipeline.
        steps: steps of the whole schedule; ``denoise`` < 1 runs the last ``int(steps * denoise)`` of them, as
            ``CogVideoXVideoToVideoPipeline`` does with its ``strength``.
        cfg: classifier-free guidance (https://huggingface.co/papers/2207.12598); 1 switches it off.
        dynamic_cfg: the reference's cosine schedule of the guidance.
        on_nan: what to do at a step whose latents are not finite: ``heal`` repeats it in the next safer way to run and goes on,
            ``stop`` raises.
        on_step: called after each step; an exception it raises (an interruption) ends the run between two steps.
        on_heal: called with a sentence for the user when a step had to be healed.

    Returns:
        float32 ``[B, 16, T, H/8, W/8]`` on the CPU, unscaled, with the ``T`` that came in, finite.

    Raises:
        ValueError: for input the model cannot run with, before any weight is read.
        NonFiniteError: for a step that is not finite and is not, or cannot be, healed.
    """
    check_finite(latents, "The latent", "Make it anew: the node that gave it ran in a dtype too small for its values, or its file is damaged.")
    starts_from_noise = not latents.any().item()
    if starts_from_noise and denoise < 1.0:
        logger.warning("denoise is %s, but the latent is empty: there is no video to start from, so the run starts from noise.", denoise)
        denoise = 1.0
    noise_schedule, timesteps = plan_steps(model, latents, steps=steps, scheduler=scheduler, denoise=denoise)
    config = _full_config(model.weights.config)
    batch = latents.shape[0]
    guided = cfg > 1.0
    if guided and negative is None:
        raise ValueError(f"cfg is {cfg}, which needs a negative prompt to guide away from, and none is connected. Connect one or set cfg to 1.")
    prompts = [_check_embeddings(positive, "positive", config, batch)]
    if guided:
        prompts.insert(0, _check_embeddings(negative, "negative", config, batch))
        if prompts[0].shape != prompts[1].shape:
            raise ValueError(
                f"The negative prompt has {prompts[0].shape[1]} tokens and the positive one {prompts[1].shape[1]}; the model reads both in one "
                "batch, so they must be of equal length. Encode both with CogVideoX-1.5 Text Encode."
            )
    _warn_outside_model_card(model, latents)

    device = model.weights.device
    padding = padding_frames(latents.shape[2], config)
    generator = torch.Generator("cpu").manual_seed(seed)
    with Sentinel(model.weights, on_nan, on_load, on_heal) as sentinel, torch.no_grad():
        dtype = model.weights.precision.activations
        start = rearrange(latents, "b c t h w -> b t c h w").to(device, dtype)
        start = model.latent_scale * torch.cat([start[:, :1].expand(-1, padding, -1, -1, -1), start], dim=1)
        noise = _draw_noise(start, generator)
        noisy = noise if denoise >= 1.0 else noise_schedule.add_noise(start, noise, timesteps[:1].to(device))
        result = denoise_latents(
            sentinel,
            noise_schedule,
            timesteps.to(device),
            noisy * noise_schedule.init_noise_sigma,
            torch.cat(prompts).to(device, dtype),
            rotary=rotary_embedding(config, noisy.shape[1], *noisy.shape[3:], device),
            cfg=cfg,
            dynamic_cfg=dynamic_cfg,
            generator=generator,
            on_step=on_step,
        )[:, padding:]
        # The reference unscales in the model's own dtype, just before the VAE.
        return rearrange(1 / model.latent_scale * result, "b t c h w -> b c t h w").to("cpu", torch.float32).contiguous()


def plan_steps(model: Model, latents: torch.Tensor, *, steps: int = 50, scheduler: str = "ddim", denoise: float = 1.0):
    """Check all of a run that needs no prompt, reading no weights: to be called before minutes are spent on encoding one.

    Returns:
        The diffusers scheduler, set to ``steps``, and the timesteps that will run, ``[n]``.

    Raises:
        ValueError: for a latent, checkpoint or setting the sampler cannot run with.
    """
    config = _full_config(model.weights.config)
    check_latent(latents, config["patch_size"])
    _check_model(model, config)
    noise_schedule = make_scheduler(model.scheduler_config, scheduler)
    return noise_schedule, schedule_timesteps(noise_schedule, steps, denoise)


def denoise_latents(
    sentinel: Sentinel,
    scheduler,
    timesteps: torch.Tensor,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    cfg: float,
    dynamic_cfg: bool = False,
    generator: torch.Generator,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Run the loop: ``latents`` ``[B, T, C, h, w]`` at ``timesteps[0]`` to clean latents of the same shape, in the dtype that the model then runs in.

    Args:
        sentinel: the transformer, entered.
        scheduler: a ``CogVideoXDDIMScheduler`` or ``CogVideoXDPMScheduler`` whose ``set_timesteps`` was called.
        prompt_embeds: ``[B, tokens, width]``, or ``[2B, ...]`` (negative first) where ``cfg`` > 1.
        generator: source of the noise that the DPM scheduler adds.
    """
    guided = cfg > 1.0
    previous_clean, total = None, len(timesteps)

    def step(index: int, drawn: torch.Tensor, transformer: nn.Module, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        # A step that is done again draws the same noise again.
        generator.set_state(drawn)
        timestep, earlier = timesteps[index], timesteps[index - 1] if index > 0 else None
        current = latents.to(precision.activations)
        model_input = scheduler.scale_model_input(torch.cat([current] * 2) if guided else current, timestep)
        prediction = transformer(
            hidden_states=model_input,
            encoder_hidden_states=prompt_embeds.to(precision.activations),
            timestep=timestep.expand(model_input.shape[0]),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0].float()
        if guided:
            scale = dynamic_guidance(cfg, scheduler.num_inference_steps, timestep.item()) if dynamic_cfg else cfg
            prediction = guide(*prediction.chunk(2), scale)
        stepped, clean = _step(scheduler, prediction, previous_clean, timestep, earlier, current, generator)
        return stepped.to(current.dtype), clean

    for index in range(total):
        latents, previous_clean = sentinel.run(partial(step, index, generator.get_state()), f"step {index + 1} of {total}")
        if on_step is not None:
            on_step(index + 1, total, rearrange(previous_clean, "b t c h w -> b c t h w"))
    return latents


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: from the unconditional prediction towards, and past, the conditional one."""
    return unconditional + scale * (conditional - unconditional)


def dynamic_guidance(cfg: float, steps: int, timestep: int) -> float:
    """The guidance of one step under ``dynamic_cfg``: the reference's formula, which sets a timestep (0..999) against a number of steps."""
    return 1 + cfg * ((1 - math.cos(math.pi * ((steps - timestep) / steps) ** 5.0)) / 2)


def make_scheduler(config: Mapping, name: str):
    """A fresh diffusers scheduler with the checkpoint's noise schedule.

    Raises:
        ValueError: for a name that is not one of ``SCHEDULERS``.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"The scheduler is {name!r}, which CogVideoX was not made for. Choose one of {', '.join(SCHEDULERS)}.")
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(dict(config))


def schedule_timesteps(scheduler, steps: int, denoise: float) -> torch.Tensor:
    """Set the scheduler to ``steps`` and return the timesteps that ``denoise`` leaves to run.

    Raises:
        ValueError: if no step would run, or more than the model was trained with.
    """
    trained = scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise ValueError(f"steps is {steps}; the model's noise schedule has 1 to {trained}, so this cannot be run. The model card uses 50.")
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise is {denoise}, but it is a share between 0 and 1: how much of the video is made anew. Set it to 1 to make all.")
    scheduler.set_timesteps(steps)
    count = min(int(steps * denoise), steps)
    if count == 0:
        raise ValueError(
            f"denoise {denoise} of {steps} steps leaves no step to run, so nothing would change. Raise denoise to {1 / steps:.3g} or more, or steps."
        )
    return scheduler.timesteps[steps - count :]


def _step(scheduler, prediction, previous_clean, timestep, earlier, latents, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One scheduler step: the next latents and the predicted clean ones. The two schedulers differ only in what they are told."""
    if type(scheduler).__name__ == SCHEDULERS["dpm"]:
        return scheduler.step(prediction, previous_clean, timestep, earlier, latents, generator=generator, return_dict=False)
    return scheduler.step(prediction, timestep, latents, generator=generator, return_dict=False)


def _draw_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _full_config(config: Mapping) -> Mapping:
    """A transformer's config with the defaults of the class filled in, as old releases leave fields out."""
    import inspect

    from diffusers import CogVideoXTransformer3DModel

    parameters = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | dict(config)


def _check_model(model: Model, config: Mapping) -> None:
    if config["in_channels"] != LATENT_CHANNELS:
        raise ValueError(
            f"{model.variant.name} is an image-to-video model ({config['in_channels']} input channels) and no start image is connected: with "
            "text alone it makes noise. Load a text-to-video checkpoint such as CogVideoX1.5-5B."
        )


def _check_embeddings(embeddings: torch.Tensor, name: str, config: Mapping, batch: int) -> torch.Tensor:
    width = config["text_embed_dim"]
    shape = list(embeddings.shape)
    if embeddings.ndim != 3 or shape[-1] != width:
        raise ValueError(
            f"The {name} conditioning has the shape {shape}, but this model reads [batch, tokens, {width}]: it was made by another model's text "
            "encoder. Encode the prompt with CogVideoX-1.5 Text Encode and this checkpoint's text encoder."
        )
    if shape[0] not in (1, batch):
        raise ValueError(
            f"The {name} conditioning holds {shape[0]} prompts and the latent {batch} videos, so it is not clear which belongs to which. Use one "
            "prompt for all, or as many as videos."
        )
    check_finite(
        embeddings,
        f"The {name} conditioning",
        "The text encoder that made it ran in a dtype too small for its values: encode the prompt with CogVideoX-1.5 Model Loader's own.",
    )
    return embeddings.expand(batch, -1, -1)


def _warn_outside_model_card(model: Model, latents: torch.Tensor) -> None:
    height, width = (size * SPATIAL_COMPRESSION for size in latents.shape[3:])
    note = model.variant.outside_model_card(width, height, pixel_frames(latents.shape[2]))
    if note:
        logger.warning(note)
