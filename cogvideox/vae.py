"""Latents to frames with the checkpoint's own VAE, delivered as they are decoded."""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange

from .geometry import check_latent
from .handles import VAE
from .precision.sentinel import Sentinel, check_finite
from .variants import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION


def decode(
    vae: VAE,
    samples: torch.Tensor,
    on_nan: str = "heal",
    on_chunk: Callable[[int, int], None] | None = None,
    on_load: Callable[[int, int], None] | None = None,
    on_heal: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """Decode video latents, one video and two latent frames at a time, into one tensor allocated beforehand.

    Equal to diffusers' ``vae.decode`` (its chunks and caches; batches one video at a time, its ``use_slicing``) followed by
    ``VideoProcessor.postprocess_video``.

    Args:
        samples: ``[B, 16, T, H/8, W/8]``, unscaled.
        on_nan: what to do about a chunk that is not finite: ``heal`` decodes it again in fp32 and goes on so, ``stop`` raises.
        on_chunk: called with (latent frames done, latent frames in all) after each chunk; an exception it raises stops the decode.
        on_heal: called with a sentence for the user when a chunk had to be healed.

    Returns:
        float32 ``[B * F, H, W, 3]`` in 0..1 on the CPU; ``F = 4 (T - 1) + 1`` for an odd ``T``, ``4 T`` for an even one.

    Raises:
        ValueError: for a latent that is not a CogVideoX one, or not finite.
        NonFiniteError: if a chunk is not finite and is not, or cannot be, healed.
    """
    check_latent(samples)
    check_finite(samples, "The latent", "Sample it again with CogVideoX-1.5 Sampler, whose steps are checked, or load another.")
    batch, _, length, height, width = samples.shape
    frames = _decoded_frames(length)
    images = torch.empty(batch, frames, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION, 3)
    device = vae.weights.device

    def decode_piece(piece, cache, module, precision):
        piece = piece.to(device, precision.dtype)
        if module.post_quant_conv is not None:
            piece = module.post_quant_conv(piece)
        return module.decoder(piece, conv_cache=_cast(cache, precision.dtype))

    with Sentinel(vae.weights, on_nan, on_load, on_heal) as sentinel, torch.no_grad():
        chunks = _chunks(length, sentinel.module.num_latent_frames_batch_size)
        for video, latent in enumerate(samples.split(1)):
            cache, start, first = None, 0, 0
            for size in chunks:
                piece = latent[:, :, first : first + size]
                decoded, cache = sentinel.run(partial(decode_piece, piece, cache), f"frames from {start} of {frames}")
                decoded = (decoded * 0.5 + 0.5).clamp(0, 1)
                images[video, start : start + decoded.shape[2]] = rearrange(decoded, "1 c f h w -> f h w c")
                start, first = start + decoded.shape[2], first + size
                if on_chunk is not None:
                    on_chunk(video * length + first, batch * length)
    return rearrange(images, "b f h w c -> (b f) h w c")


def _cast(cache, dtype: torch.dtype):
    """The decoder's cache of the frames before, in nested dicts, in ``dtype``."""
    if isinstance(cache, dict):
        return {name: _cast(entry, dtype) for name, entry in cache.items()}
    return cache.to(dtype) if torch.is_tensor(cache) else cache


def _chunks(length: int, size: int) -> list[int]:
    """Latent frames per chunk, as the reference cuts them: a remainder joins the first chunk."""
    count = max(length // size, 1)
    return [length - size * (count - 1)] + [size] * (count - 1)


def _decoded_frames(length: int) -> int:
    """Frames of ``length`` latent frames: a chunk with an odd number holds the clip's first frame, which is not stretched in time."""
    return (length - 1) * TEMPORAL_COMPRESSION + 1 if length % 2 else length * TEMPORAL_COMPRESSION
