"""What a run refuses, and what it says about what it was asked for, before any weight is read."""

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch.nn.functional import interpolate

from .choices import DDIM, DPM, OFFLOAD_BLOCKS, OFFLOAD_LAYERS, check_share, steps_between
from .combinations import check_sharing
from .finite import check_finite
from .geometry import check_frames, check_latent, pixel_frames, video_tokens
from .handles import Model
from .memory import check_host_room
from .modules.internals import splits_anything
from .modules.sharded import Split
from .schedulers import make_scheduler, schedule_timesteps
from .tensors import check_tensor
from .variants import (
    CONDITIONING_CHANNELS,
    INPAINT,
    LATENT_CHANNELS,
    NOTHING,
    SPATIAL_COMPRESSION,
    START_IMAGE,
    VOID,
    full_config,
)
from .windows import spans, windows_text
from .words import setting, short

#: The last of the videos whose noise can be asked for.
_MOST_VIDEOS = 4095


def plan_steps(
    model: Model,
    latents: torch.Tensor,
    image_latents: torch.Tensor | None = None,
    *,
    steps: int = 50,
    scheduler: str = "ddim",
    denoise: float = 1.0,
) -> tuple[Any, torch.Tensor]:
    """Check all of a run that needs no prompt, reading no weights: to be called before minutes are spent on encoding
    one.

    Returns:
        The diffusers scheduler, set to ``steps``, and the timesteps that will run, ``[n]``.

    Raises:
        ValueError: for a latent, checkpoint or setting the sampler cannot run with.
    """
    check_request(model, latents, image_latents)
    noise_schedule = make_scheduler(model.scheduler_config, scheduler)
    check_windows(model, latents, scheduler)
    return noise_schedule, schedule_timesteps(noise_schedule, steps, denoise)


def check_request(model: Model, latents: torch.Tensor, image_latents: torch.Tensor | None) -> None:
    """Refuse latents that the model does not read, and those of a start image, or of what else is read beside the
    noise, where it wants none, or others.

    Args:
        latents: ``[B, 16, T, H/8, W/8]``.
        image_latents: what is read beside the noise, ``[1 or B, C, T, H/8, W/8]``, if there is something.

    Raises:
        ValueError: saying what does not fit what.
    """
    config = full_config(model.weights.config)
    check_latent(latents, config["patch_size"])
    check_host_room(model, latents.shape)
    check_conditioning(model, image_latents)
    check_length(model, latents)
    if image_latents is not None:
        _check_image(latents, image_latents)
    if config["use_learned_positional_embeddings"]:
        trained = (config["sample_height"], config["sample_width"])
        if tuple(latents.shape[3:]) != trained:
            raise ValueError(
                f"{model.variant.name} has learned positions for {trained[1] * 8}x{trained[0] * 8} only, and the "
                f"latent is {latents.shape[4] * 8}x{latents.shape[3] * 8}. Set that size, or use CogVideoX1.5-5B-I2V, "
                "which takes others."
            )


def check_length(model: Model, latents: torch.Tensor) -> None:
    """Refuse latents of a length that a model cannot make.

    Raises:
        ValueError: with the nearest two that it can.
    """
    if model.variant.in_pairs:
        try:
            check_frames(pixel_frames(latents.shape[2]), model.variant.frame_step, in_pairs=True)
        except ValueError as error:
            raise ValueError(
                f"{error} CogVideoX-1.5 Inpaint and CogVideoX-1.5 Object Removal (VOID) give latents of such lengths."
            ) from None


def check_windows(model: Model, latents: torch.Tensor, scheduler: str) -> None:
    """Refuse a scheduler that draws noise, or remembers the step before, for a clip of several context windows.

    Raises:
        ValueError: saying why, and what to choose.
    """
    count = len(spans(model.windows, latents.shape[2], full_config(model.weights.config)))
    if model.windows is not None and count > 1 and scheduler == DPM:
        raise ValueError(
            f"The clip of {pixel_frames(latents.shape[2])} frames is made in {count} context windows, and the "
            f"scheduler {scheduler} adds noise at each step and builds on the step before, which differ from window "
            f"to window: where they overlap the picture would blur. Set scheduler to {DDIM}, or make a clip of at "
            f"most {model.windows.length} frames."
        )


def refuse_windows(model: Model) -> None:
    """Refuse a model with context windows where another program's sampler runs it.

    Raises:
        ValueError: naming ComfyUI's own windows.
    """
    if model.windows is not None:
        raise ValueError(
            "The model has context windows, which CogVideoX-1.5 Sampler runs and ComfyUI's own samplers do not. Take "
            "CogVideoX-1.5 Context Windows away, and put ComfyUI's Context Windows (Manual) behind CogVideoX-1.5 to "
            "ComfyUI, with dim at 2."
        )


def check_split(model: Model, split: Split, shape: Sequence[int]) -> None:
    """Refuse a video that processes cannot share so.

    Args:
        shape: of the latent, ``[B, 16, T, H/8, W/8]``.

    Raises:
        ValueError: saying what does not go together.
    """
    weights, config = model.weights, full_config(model.weights.config)
    on_host = weights.device.type == "cpu"
    check_sharing(
        split.guidance > 1,
        split.sequence > 1,
        model.skipping,
        model.compiled is not None,
        weights.memory in (OFFLOAD_BLOCKS, OFFLOAD_LAYERS) and not on_host,
    )
    lengths = {window.stop - window.start for window in spans(model.windows, shape[2], config)}
    for tokens in (video_tokens(config, (*shape[:2], length, *shape[3:])) for length in sorted(lengths)):
        if tokens >= split.sequence and not (on_host and tokens % split.sequence):
            continue
        raise ValueError(
            f"The video, or a window of it, has {tokens:,} tokens, which {split.sequence} processes on "
            f"{weights.device.type} cannot share in equal parts. Change its size or length, or start fewer processes."
        )
    if split.sequence > 1 and not splits_anything():
        raise ValueError(
            f"diffusers is {metadata.version('diffusers')}, which cannot share the 226 tokens of a prompt among "
            "processes. Install a newer one (0.42 can), or take --split guidance."
        )


def check_conditioning(model: Model, given: torch.Tensor | None) -> None:
    """Refuse a model without what it has to read beside the noise, and one with what it cannot read.

    Args:
        given: ``[1 or B, C, T, H/8, W/8]``: its channels say which node made it.

    Raises:
        ValueError: saying what to connect, or which checkpoint to load.
    """
    channels, reads = full_config(model.weights.config)["in_channels"], model.variant.reads
    if channels != LATENT_CHANNELS + CONDITIONING_CHANNELS[reads]:
        raise ValueError(
            f"{model.variant.name} has {channels} input channels; text-to-video models have {LATENT_CHANNELS} and "
            f"image-to-video ones {2 * LATENT_CHANNELS}, so it is an extension that is not known here. Load an "
            "official checkpoint or a fine-tune of one."
        )
    more = given.shape[1] if given is not None and given.ndim > 1 else 0
    # Without anything CogVideoX-Fun makes a video of the text alone.
    if more == CONDITIONING_CHANNELS[reads] or (given is None and reads == INPAINT):
        return
    if given is not None:
        raise ValueError(_strange(model, more))
    if reads == VOID:
        raise ValueError(
            f"{model.variant.name} takes objects out of a video ({channels} input channels) and no video with a "
            "quadmask is connected. Put CogVideoX-1.5 Object Removal (VOID) before the sampler."
        )
    raise ValueError(
        f"{model.variant.name} is an image-to-video model ({channels} input channels) and no start image is "
        "connected: with text alone it makes noise. Put CogVideoX-1.5 Image to Video before the sampler, or load "
        "a text-to-video checkpoint such as CogVideoX1.5-5B."
    )


def _strange(model: Model, channels: int) -> str:
    """Say what a conditioning of so many channels is, which the model does not read, and what to do."""
    name, reads = model.variant.name, model.variant.reads
    if channels == CONDITIONING_CHANNELS[INPAINT]:
        return (
            f"{name} is connected to a mask and a masked video, as CogVideoX-1.5 Inpaint gives them, which it cannot "
            "read: only CogVideoX-Fun-V1.5-InP checkpoints do. Load CogVideoX-Fun-V1.5-5b-InP, or take the node away."
        )
    if channels == CONDITIONING_CHANNELS[VOID]:
        return (
            f"{name} is connected to latents of {channels} channels, as CogVideoX-1.5 Object Removal (VOID) gives "
            "them, which it cannot read: only VOID's checkpoints do. Load one, such as void_pass1.safetensors, or take "
            "the node away."
        )
    if channels == CONDITIONING_CHANNELS[START_IMAGE] and reads == INPAINT:
        return (
            f"{name} is connected to CogVideoX-1.5 Image to Video, whose start image it cannot read: it takes images "
            "with a mask. Put CogVideoX-1.5 Inpaint in its place, which has start_image and end_image too."
        )
    if channels == CONDITIONING_CHANNELS[START_IMAGE] and reads == VOID:
        return (
            f"{name} is connected to CogVideoX-1.5 Image to Video, whose start image it cannot read: it takes a video "
            "and a quadmask. Put CogVideoX-1.5 Object Removal (VOID) in its place."
        )
    if channels == CONDITIONING_CHANNELS[START_IMAGE] and reads == NOTHING:
        return (
            f"{model.variant.name} is a text-to-video model and a start image is connected, which it cannot read. "
            "Load an image-to-video checkpoint such as CogVideoX1.5-5B-I2V, or use CogVideoX-1.5 VAE Encode and "
            f"{setting('denoise')} below 1 to start from a video."
        )
    return (
        f"The conditioning holds latents of {channels} channels, and {name} reads {CONDITIONING_CHANNELS[reads]} "
        "beside the noise: another model's node made them. Connect the node of this pack that is for the checkpoint."
    )


def check_guidance(cfg: float, negative: torch.Tensor | str | None = "") -> None:
    """Refuse a guidance that neither is off nor guides.

    Args:
        negative: what it guides away from, None where there is nothing.

    Raises:
        ValueError: for less than 1, or what is no number; for more than 1 with nothing to guide away from.
    """
    if not 1.0 <= cfg < math.inf:
        raise ValueError(
            f"cfg is {cfg}, but guidance begins at 1, where it is off: less would lead away from the prompt. The "
            "model card uses 6."
        )
    if cfg > 1.0 and negative is None:
        raise ValueError(
            f"cfg is {cfg}, which needs a negative prompt to guide away from, and none is connected. Connect one or "
            "set cfg to 1."
        )


def guided_steps(cfg: float, start: float, end: float, steps: int) -> range:
    """Return which of a run's steps are guided: none at ``cfg`` 1.

    Args:
        start, end: shares of the steps, between which they are.

    Raises:
        ValueError: for what is no share; where it guides, for a start that is not below the end, and where no step lies
            between them.
    """
    check_guidance_range(start, end, cfg)
    found = steps_between(start, end, steps)
    if cfg <= 1.0:
        return range(0)
    if not found:
        begin, finish = setting("cfg_start"), setting("cfg_end")
        raise ValueError(
            f"{begin} is {start} and {finish} {end}, and none of {steps} steps lies between them, so none would be "
            f"guided. Set {finish} higher or {begin} lower, or cfg to 1, which switches guidance off."
        )
    return found


def turns_of(guided: range) -> set[int]:
    """Return the steps before which guidance begins or ends: what was kept of one kind of step is of no use to the
    other."""
    return {guided.start, guided.stop} if guided else set()


def check_guidance_range(start: float, end: float, cfg: float = math.inf) -> None:
    """Refuse a part of the steps in which nothing would be guided, unless ``cfg`` says so too.

    Raises:
        ValueError: for what is no share, and for a start that is not below the end.
    """
    begin, finish = setting("cfg_start"), setting("cfg_end")
    for name, share in (("cfg_start", start), ("cfg_end", end)):
        check_share(name, share, f"Set {begin} to 0 and {finish} to 1 to guide every step.")
    if start >= end and cfg > 1.0:
        raise ValueError(
            f"{begin} is {start} and {finish} {end}, so no step would be guided. Set {begin} below {finish}, or cfg "
            "to 1, which switches guidance off."
        )


def check_noise(noise: torch.Tensor, latents: torch.Tensor) -> None:
    """Refuse noise that is not finite, or not of the latents' shape ``[B, 16, T, H/8, W/8]``."""
    check_tensor(noise, "The noise", "Connect a LATENT that holds noise.")
    if noise.shape != latents.shape:
        raise ValueError(
            f"The noise has the shape {list(noise.shape)} and the latent {list(latents.shape)}: each value needs its "
            "own. Make the noise for a video of the same size, length and batch."
        )
    check_finite(noise, "The noise", "Make it anew.")
    if not noise.any():
        raise ValueError(
            "The noise is zero throughout, as an empty latent is, so the video would start from nothing. Connect a "
            "LATENT that holds noise, or leave noise unconnected: seed makes it."
        )


def check_batch_index(index: Sequence[int] | None, batch: int) -> list[int] | None:
    """Return which videos of a larger batch those of a latent are, counted from 0, as ComfyUI's nodes note it; None
    where they are simply the first ones.

    Raises:
        ValueError: for no whole numbers from 0 on, and for another count than that of the videos.
    """
    if index is None:
        return None
    found = [int(number) for number in index]
    if len(found) != batch or min(found, default=0) < 0 or max(found, default=0) > _MOST_VIDEOS:
        raise ValueError(
            f"The latent's batch_index is {short(found)}, and it holds {batch} videos: each needs one number from 0 to "
            f"{_MOST_VIDEOS}. Make the latent anew."
        )
    return None if found == list(range(batch)) else found


def fit_mask(mask: torch.Tensor, latents: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return a noise mask at the size of the latents, as core samplers have it: trilinear, ``[1 or B, 1, T, h, w]``.

    Args:
        mask: 1 where the video is made anew, 0 where it is kept: ``[H, W]``, ``[frames, H, W]`` or
            ``[frames, 1, H, W]`` for all videos, or ``[B, 1, T, H, W]``.
        prediction_type: of the checkpoint's noise schedule.

    Raises:
        ValueError: for what is no mask, or a model that does not predict v.
    """
    remedy = "Connect a MASK to Set Latent Noise Mask."
    check_tensor(mask, "The noise mask", remedy)
    shape, batch = list(mask.shape), latents.shape[0]
    fits = 2 <= mask.ndim <= 5 and 0 not in shape and (mask.ndim < 4 or shape[1] == 1)
    if not fits or (mask.ndim == 5 and shape[0] not in (1, batch)):
        raise ValueError(
            f"The noise mask has the shape {shape}, and it has to be [frames, height, width], or a batch of {batch} of "
            f"them. {remedy}"
        )
    check_finite(mask, "The noise mask", remedy)
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"The noise mask has values from {mask.min():.3g} to {mask.max():.3g}, but a mask goes from 0 (keep) to 1 "
            f"(make anew). {remedy}"
        )
    if prediction_type != "v_prediction":
        raise ValueError(
            f"The checkpoint predicts {prediction_type}, and a noise mask works with those that predict v, as all "
            "released ones do. Take the mask away."
        )
    mask = mask.cpu().float()
    video = mask if mask.ndim == 5 else mask.reshape(1, 1, -1, *shape[-2:])
    return interpolate(video, latents.shape[2:], mode="trilinear")


def check_embeddings(embeddings: torch.Tensor, name: str, config: Mapping, batch: int) -> torch.Tensor:
    """Return prompt embeddings ``[1 or B, tokens, width]`` as ``[B, tokens, width]``.

    Raises:
        ValueError: for those of another model, for too many, and for values that are not finite.
    """
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


def outside_training(model: Model, latents: torch.Tensor, image_latents: torch.Tensor | None) -> list[str]:
    """Say in sentences what of a run the model was not trained for, and in how many windows it makes a clip that is
    longer."""
    height, width = (size * SPATIAL_COMPRESSION for size in latents.shape[3:])
    frames = pixel_frames(latents.shape[2])
    windows = windows_text(model.windows, latents.shape[2], full_config(model.weights.config))
    if windows is not None and model.windows is not None:
        # What the model sees of it. Any whole latent frames make a clip there.
        step, rest = model.variant.frame_step, model.variant.rest
        frames = (model.windows.length - rest) // step * step + rest
    notes = [windows, model.variant.outside_model_card(width, height, frames)]
    image = image_latents if model.variant.reads == START_IMAGE else None
    if image is not None and image[:, :, 1:-1].any():
        notes.append(
            f"The conditioning holds latents between the first and the last frame, where {model.variant.name} was "
            "trained to read zeros: another model's node made it (WanImageToVideo and its like do), or one that joins "
            "latents. Put CogVideoX-1.5 Image to Video in its place."
        )
    elif image is not None and image.shape[2] > 1 and image[:, :, -1].any():
        # No weight tells; those who train for it say so in the name.
        names = [str(model.weights.part.source), *(lora.path.name for lora in model.loras)]
        if not any("interp" in name.lower() for name in names):
            notes.append(
                f"An end image is connected. {model.variant.name} as released was trained with a start image only: "
                "unless this is a fine-tune for interpolation, the end will not be met."
            )
    return [note for note in notes if note]


def _check_image(latents: torch.Tensor, image_latents: torch.Tensor) -> None:
    # Whatever is before them, the last channels are a video's latents.
    check_latent(image_latents[:, -LATENT_CHANNELS:])
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
