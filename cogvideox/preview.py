"""Give a quick look at a video that is still being made: its latents as small pictures, without the VAE."""

import torch
from einops import rearrange
from PIL import Image

#: What each of the 16 channels of a latent (scaled by 0.7, as the transformer reads it) adds to red, green and blue:
#: the figures that ComfyUI-CogVideoXWrapper previews with.
LATENT_RGB = torch.tensor(
    [
        [0.0320, 0.0409, 0.0016],
        [0.0055, 0.0052, -0.0056],
        [0.0012, -0.0161, 0.0250],
        [0.0176, 0.0037, -0.0006],
        [0.0004, 0.0061, 0.0008],
        [-0.0105, -0.0032, -0.0089],
        [-0.0001, 0.0102, -0.0001],
        [0.0208, -0.0017, 0.0067],
        [0.0055, 0.0097, 0.0019],
        [0.0121, 0.0247, 0.0372],
        [0.0010, 0.0198, 0.0099],
        [0.0068, -0.0011, -0.0070],
        [0.0004, 0.0054, -0.0185],
        [-0.0090, -0.0113, 0.0042],
        [0.0025, 0.0252, -0.0006],
        [-0.0111, 0.0018, 0.0279],
    ]
)
#: Share of the darkest and of the brightest values that is cut off: what is left is stretched to black and white, as
#: the factors alone give a pale picture.
_CUT = 0.01


def preview_frames(latents: torch.Tensor, size: int) -> list[Image.Image]:
    """Draw the first video of a batch, a frame for each latent frame: rough colours, true shapes and movement.

    Args:
        latents: predicted clean latents ``[B, 16, T, H/8, W/8]``, scaled, on any device.
        size: the longer side of the pictures is at most this, in pixels, and at most the latent's.

    Returns:
        T RGB pictures, of one size and one scale of brightness.
    """
    video = _colours(latents)
    black, span = _range(video)
    pixels = ((video - black) / span).clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()
    pictures = [Image.fromarray(frame) for frame in pixels]
    for picture in pictures:
        picture.thumbnail((size, size), Image.Resampling.BILINEAR)
    return pictures


def stretched(latents: torch.Tensor) -> torch.Tensor:
    """Return the first video's latents ``[1, 16, T, H/8, W/8]`` with their colours stretched: ``LATENT_RGB`` then gives
    -1 (black) to 1 (white), for a program that draws them so itself."""
    black, span = _range(_colours(latents))
    # What adds the same to red, green and blue.
    grey = torch.linalg.lstsq(LATENT_RGB.T, torch.ones(3, 1), driver="gelsd").solution.to(latents.device, torch.float32)
    scale = 2 / span
    return latents[:1].float().nan_to_num(0, 0, 0) * scale - (1 + black * scale) * grey.reshape(1, -1, 1, 1, 1)


def _colours(latents: torch.Tensor) -> torch.Tensor:
    """Return the colours ``[T, H/8, W/8, 3]`` of the first video, pale, finite."""
    return (rearrange(latents[0].float(), "c t h w -> t h w c") @ LATENT_RGB.to(latents.device)).nan_to_num(0, 0, 0)


def _range(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value that is to be black, and how far above it white is."""
    # A share of some tens of thousands of values is as good as that of all, and the most that torch.quantile takes on
    # any device.
    sample = video.flatten()[:: max(1, video.numel() // 50_000)]
    low, high = sample.quantile(torch.tensor([_CUT, 1 - _CUT], device=sample.device))
    return low, (high - low).clamp(min=1e-6)
