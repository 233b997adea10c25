"""Make what CogVideoX-Fun-V1.5-InP and VOID read beside the noise, of a video and a mask, as their own code does.

Sources: ``pipeline_cogvideox_fun_inpaint.py`` and ``get_image_to_video_latent`` of aigc-apps/VideoX-Fun (804a425), the
pipeline, ``predict_v2v.py`` and ``utils.py`` of Netflix/void-model (66e9c0e); both Apache-2.0. Clips are encoded as a
whole, to the mode of the VAE's posterior.

Both add noise to the video before it is encoded. There it comes from torch's global generator, in the order in which
the video happens to lie in memory; here it is drawn as ``[3, F, H, W]`` from one that is given.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch.nn.functional import interpolate

from .choices import FIRST, SECOND, STAGES, check_choice
from .geometry import check_size, latent_frames
from .handles import VAE
from .pictures import crop_box
from .vae import encode_values
from .variants import CONDITIONING_CHANNELS, INPAINT, SPATIAL_COMPRESSION

#: Standard deviation of the noise on the video, of pixels in -1..1: what both were trained with.
NOISE_AUGMENTATION = 0.0563
#: From where on a mask's value counts as marked. The pipeline counts any grey, which a codec leaves everywhere, and its
#: scripts cut at 240 of 255 before: of a mask of black and white all make the same.
_MARKED = 0.5
#: Levels of a quadmask, and the greatest grey of 255 that counts as each.
_QUADMASK = ((0, 31), (63, 95), (127, 191), (255, 255))


@dataclass(frozen=True)
class Canvas:
    """A clip to be made anew in parts.

    Attributes:
        frames: ``[F, H, W, 3]`` in 0..1.
        mask: ``[F, H, W]``, true where the video is made anew.
    """

    frames: torch.Tensor
    mask: torch.Tensor


def inpaint_canvas(
    width: int,
    height: int,
    frames: int,
    video: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> Canvas:
    """Lay out what is kept of a clip of ``frames`` frames of ``width`` x ``height`` pixels, and what is made anew.

    Args:
        video: ``[frames, H, W, 3]`` in 0..1; without it nothing is there to be kept but the images.
        mask: ``[1 or frames, H, W]``, where it is a half or more the video is made anew; without it all is.
        start, end: ``[1, H, W, 3]``: the first and the last frame, which are kept.

    Raises:
        ValueError: as ``check_parts``.
    """
    check_size(width, height)
    check_parts(frames, video is not None, mask is not None, start is not None and end is not None)
    canvas = torch.zeros(frames, height, width, 3) if video is None else video.clone()
    anew = torch.ones(frames, height, width, dtype=torch.bool)
    if mask is not None:
        anew = (mask >= _MARKED).expand(frames, -1, -1).clone()
    for place, image in ((0, start), (-1, end)):
        if image is not None:
            canvas[place], anew[place] = image[0], False
    return Canvas(canvas, anew)


def check_parts(frames: int, video: bool, mask: bool, both_images: bool) -> None:
    """Refuse a clip of ``frames`` frames of which what is connected says two things, or nothing.

    Raises:
        ValueError: for a mask without a video, and for a start and an end image of a single frame.
    """
    if mask and not video:
        raise ValueError(
            "A mask is connected and no video, so there is nothing that it could keep. Connect the video to video, or "
            "take the mask away."
        )
    if both_images and frames == 1:
        raise ValueError(
            "A start image and an end image are connected, but the clip has 1 frame, so it would end where it starts. "
            "Make it longer."
        )


def inpaint_latents(
    vae: VAE, canvas: Canvas, noise_aug: float = 0.0, generator: torch.Generator | None = None, **how
) -> torch.Tensor:
    """Make the 17 channels that CogVideoX-Fun-V1.5-InP reads beside the noise: what of the mask is kept, and the latent
    of the video without what is made anew. All made anew, they are zeros: text to video.

    Args:
        noise_aug: standard deviation of the noise on the video, of pixels in -1..1.
        generator: draws that noise; on the CPU.
        how: ``on_nan``, ``events`` and ``budget``, as ``vae.encode`` has them.

    Returns:
        float32 ``[1, 17, T, H/8, W/8]``, unscaled: ``concat_latent_image`` of a CONDITIONING.
    """
    count, height, width = canvas.mask.shape
    size = (height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    if canvas.mask.all():
        return torch.zeros(1, CONDITIONING_CHANNELS[INPAINT], latent_frames(count), *size)
    values = 2.0 * canvas.frames - 1.0
    values[canvas.mask] = -1.0
    latents = encode_values(vae, _augmented(values, noise_aug, generator), **how)
    kept = rearrange(1.0 - canvas.mask.float(), "f h w -> 1 1 f h w")
    # The first frame is a latent frame of its own; an end image's only frame is gone between the others'.
    shrunk = [interpolate(kept[:, :, :1], size=(1, *size), mode="trilinear", align_corners=False)]
    if count > 1:
        rest = (latent_frames(count) - 1, *size)
        shrunk.append(interpolate(kept[:, :, 1:], size=rest, mode="trilinear", align_corners=False))
    return torch.cat([torch.cat(shrunk, dim=2), latents], dim=1)


def void_latents(
    vae: VAE,
    video: torch.Tensor,
    quadmask: torch.Tensor,
    stage: str = FIRST,
    noise_aug: float = NOISE_AUGMENTATION,
    generator: torch.Generator | None = None,
    **how,
) -> torch.Tensor:
    """Make the 32 channels that VOID reads beside the noise: the latent of the mask, which is encoded as a clip of
    values from 0 (take away) to 1 (keep), and that of the whole video.

    Args:
        video: ``[F, H, W, 3]`` in 0..1.
        quadmask: ``[F, H, W]`` in 0..1, of 255 greys: 0 the object, 63 where it covers what it affects, 127 what it
            affects, 255 the rest; what is between counts as the nearest.
        stage: ``first`` tells object, affected and the rest apart; ``second`` the object, and all else.
        noise_aug, generator, how: as ``inpaint_latents`` has them.

    Returns:
        float32 ``[1, 32, T, H/8, W/8]``, unscaled: ``concat_latent_image`` of a CONDITIONING.
    """
    taken = taken_away(quadmask, stage)
    mask = encode_values(vae, repeat(1.0 - taken, "f h w -> f h w 3"), **how)
    clip = encode_values(vae, _augmented(2.0 * video - 1.0, noise_aug, generator), **how)
    return torch.cat([mask, clip], dim=1)


def taken_away(quadmask: torch.Tensor, stage: str) -> torch.Tensor:
    """Return how much is taken away at each pixel of a quadmask ``[F, H, W]`` in 0..1, as the pass of VOID reads it:
    0, 127/255 or 1 in the first, 0 or 1 in the second.

    Raises:
        ValueError: for a pass that is not one of ``choices.STAGES``.
    """
    check_choice("stage", stage, STAGES)
    greys, levels = 255.0 * quadmask.float(), torch.full_like(quadmask, 255.0, dtype=torch.float32)
    for level, most in reversed(_QUADMASK[:-1]):
        levels[greys <= most] = level
    share = (255.0 - levels) / 255.0
    if stage == SECOND:
        return (share > 0.5).float()
    # The overlap is 192/255 of the way, and taken away.
    return torch.where(share > 0.75, 1.0, torch.where(share < 0.25, 0.0, 127.0 / 255.0))


def _augmented(values: torch.Tensor, deviation: float, generator: torch.Generator | None) -> torch.Tensor:
    """Add noise to a clip ``[F, H, W, 3]`` in -1..1, but where a value is exactly -1: black, or made anew."""
    if deviation == 0:
        return values
    frames, height, width, _ = values.shape
    noise = rearrange(torch.randn(3, frames, height, width, generator=generator), "c f h w -> f h w c")
    return torch.where(values == -1, values, values + noise * deviation)


def fit_area(clip: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Scale a clip ``[F, H, W, C]`` to ``width`` x ``height`` by the mean of what a pixel covers, as both references
    do; where its shape is another, its centre is cropped to that first, so that nothing is stretched."""
    old_height, old_width = clip.shape[1:3]
    if (old_width, old_height) == (width, height):
        return clip
    left, top, right, bottom = crop_box(old_width, old_height, width, height)
    # Frame by frame: beside a clip there is no room for a copy of it.
    fitted = torch.empty(len(clip), height, width, clip.shape[3])
    for place, frame in zip(fitted, clip[:, top:bottom, left:right], strict=True):
        place.copy_(
            rearrange(
                interpolate(rearrange(frame.float(), "h w c -> 1 c h w"), (height, width), mode="area")[0],
                "c h w -> h w c",
            )
        )
    return fitted


def fit_mask_frames(mask: torch.Tensor, count: int, frames: int) -> torch.Tensor:
    """Bring the frames of a mask ``[N, H, W]`` to those of the clip that it belongs to: one is for all of them.

    Args:
        count: frames of the clip as it came.
        frames: frames that are made, to which the clip was cut or its last frame repeated.

    Raises:
        ValueError: for a number of frames that is neither.
    """
    if len(mask) == 1:
        return mask
    if len(mask) < min(count, frames):
        raise ValueError(
            f"The mask has {len(mask)} frames and the video {count}, so it is not clear which belong together. Give it "
            "one frame for all, or as many as the video."
        )
    return hold_last(mask[:frames], frames)


def hold_last(clip: torch.Tensor, frames: int) -> torch.Tensor:
    """Cut a clip ``[F, ...]`` to ``frames`` frames, or repeat its last."""
    missing = frames - len(clip)
    return clip[:frames] if missing <= 0 else torch.cat([clip, clip[-1:].expand(missing, *clip.shape[1:])])


def mirror(clip: torch.Tensor, frames: int) -> torch.Tensor:
    """Cut a clip ``[F, ...]`` to ``frames`` frames, or run it back and forth until it has them, as VOID's
    ``temporal_padding`` does."""
    while len(clip) < frames:
        clip = torch.cat([clip, clip.flip(0)])[:frames]
    return clip[:frames]
