"""``--mask``, ``--start-image`` and ``--void``: what CogVideoX-Fun-V1.5-InP and VOID read beside the noise."""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from cogvideox.conditioning import (
    NOISE_AUGMENTATION,
    fit_area,
    fit_mask_frames,
    hold_last,
    inpaint_canvas,
    inpaint_latents,
    mirror,
    void_latents,
)
from cogvideox.events import Events
from cogvideox.handles import VAE
from cogvideox.pictures import check_images, check_mask
from cogvideox.variants import CONDITIONING_CHANNELS, INPAINT, START_IMAGE, VOID, Variant
from cogvideox.video import read_image, read_latent, read_video
from cogvideox.words import short
from commands.void import stage_of

#: Files that hold one picture; any other is read as a clip.
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
#: The option that gives what a model reads beside the noise, and a checkpoint that reads it.
_OPTION = {START_IMAGE: "--image", INPAINT: "--mask", VOID: "--void"}
_READER = {START_IMAGE: "CogVideoX1.5-5B-I2V", INPAINT: "CogVideoX-Fun-V1.5-5b-InP", VOID: "void_pass1"}


def foresee_conditioning(options: argparse.Namespace, variant: Variant, latent: torch.Tensor) -> torch.Tensor | None:
    """Make zeros of the shape of what the options give a model to read beside the noise ``[1, C, T, H/8, W/8]``; None
    if that is nothing.

    Raises:
        ValueError: for what the model does not read, and where it lacks what it does.
    """
    images = options.image is not None or options.end_image is not None
    given = images or (options.seconds is not None and options.video is not None)
    if options.void is not None:
        kind = VOID
    elif options.mask is not None or (given and variant.reads == INPAINT):
        kind = INPAINT
    elif given:
        kind = START_IMAGE
    elif variant.reads not in (START_IMAGE, VOID):
        # Without anything CogVideoX-Fun makes a video of the text alone.
        return None
    elif options.plan:
        # What it takes is known without what will be read, as without a prompt.
        kind = variant.reads
    else:
        raise ValueError(
            f"{variant.name} needs {_OPTION[variant.reads]}, and makes noise of a prompt alone. Give it, or a "
            "text-to-video checkpoint such as CogVideoX1.5-5B."
        )
    if kind != variant.reads:
        raise ValueError(
            f"{_OPTION[kind]} is given, which {variant.name} does not read. Leave it away, or give a checkpoint that "
            f"reads it, such as {_READER[kind]}."
        )
    return latent.new_zeros(1, CONDITIONING_CHANNELS[kind], *latent.shape[2:])


def read_mask(
    path: Path, count: int, frames: int, size: tuple[int, int], fps: Fraction, events: Events
) -> torch.Tensor:
    """Read a mask, a picture for all frames or a clip, of a video.

    Args:
        count: frames of the video as it is.
        frames: frames that are made of it.
        size: width and height to scale and centre-crop it to.

    Returns:
        float32 ``[1 or frames, H, W]`` in 0..1.

    Raises:
        ValueError: if it cannot be read, or has another number of frames than the video.
    """
    if path.suffix.lower() in _PICTURES:
        pictures = check_images(read_image(path, events), short(path))
    else:
        pictures = read_video(path, frames, fps=fps, dtype=torch.uint8, events=events)[..., :1].float() / 255
    mask = fit_mask_frames(check_mask(pictures, short(path)), count, frames)
    return fit_area(mask[..., None], *size)[..., 0]


def make_conditioning(
    options: argparse.Namespace,
    vae: VAE,
    clip: torch.Tensor | None,
    frames: int,
    size: tuple[int, int],
    images: tuple[torch.Tensor | None, torch.Tensor | None],
    mask: torch.Tensor | None,
    **how: Any,
) -> torch.Tensor:
    """Make what CogVideoX-Fun or VOID reads beside the noise, ``[1, C, T, H/8, W/8]``, unscaled.

    Args:
        clip: ``[frames, H, W, 3]``, uint8 or float in 0..1.
        size: width and height in pixels.
        images: the first and the last frame, ``[1, H, W, 3]``, where they are given.
        mask: of ``read_mask``.
        how: ``on_nan`` and ``events``, as ``vae.encode`` has them.
    """
    # One that is not the run's: as in the nodes, the seed does not change what is kept.
    generator = torch.Generator("cpu").manual_seed(0)
    video = clip / 255 if clip is not None and clip.dtype == torch.uint8 else clip
    if options.void is not None and video is not None and mask is not None:
        return void_latents(vae, video, mask.expand(frames, -1, -1), stage_of(options), generator=generator, **how)
    canvas = inpaint_canvas(*size, frames, video, mask, *images)
    return inpaint_latents(vae, canvas, NOISE_AUGMENTATION, generator, **how)


def fit_parts(
    options: argparse.Namespace, clip: torch.Tensor, mask: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring a clip and its mask to ``frames`` frames: VOID's run back and forth, of others the last is repeated."""
    fit = hold_last if options.void is None else mirror
    return fit(clip, frames), mask if len(mask) == 1 else fit(mask, frames)


def read_noise(options: argparse.Namespace) -> torch.Tensor | None:
    """Read ``--noise``, ``[1, 16, T, H/8, W/8]``.

    Raises:
        ValueError: if it is no latent.
    """
    return None if options.noise is None else read_latent(options.noise)
