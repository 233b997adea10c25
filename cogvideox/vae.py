"""Frames to latents and back with the checkpoint's own VAE."""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange

from .geometry import check_latent, check_size, latent_frames
from .handles import VAE
from .pictures import check_images
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


def encode(
    vae: VAE,
    images: torch.Tensor,
    on_nan: str = "heal",
    on_chunk: Callable[[int, int], None] | None = None,
    on_load: Callable[[int, int], None] | None = None,
    on_heal: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """Encode one clip, or one image, eight frames at a time: the mode of diffusers' ``vae.encode``, so that the same frames give the same latents.

    Args:
        images: ``[F, H, W, 3]`` in 0..1, F = 4N+1, H and W multiples of 16.
        on_nan, on_load, on_heal: as ``decode`` has them.
        on_chunk: called with (frames done, frames in all) after each chunk; an exception it raises stops the encoding.

    Returns:
        float32 ``[1, 16, (F - 1) / 4 + 1, H/8, W/8]`` on the CPU, unscaled.

    Raises:
        ValueError: for images the VAE cannot read.
        NonFiniteError: if a chunk is not finite and is not, or cannot be, healed.
    """
    images = check_images(images, "images")
    count, height, width = images.shape[:3]
    check_size(width, height)
    if count % TEMPORAL_COMPRESSION != 1:
        raise ValueError(
            f"The clip has {count} frames, and the VAE reads 4N+1: the first alone and the others in fours. Cut it to {latent_frames(count) * 4 - 3}."
        )
    device = vae.weights.device

    def encode_piece(piece, cache, module, precision):
        piece = (2.0 * rearrange(piece, "f h w c -> 1 c f h w") - 1.0).to(device, precision.dtype)
        moments, cache = module.encoder(piece, conv_cache=_cast(cache, precision.dtype))
        return (moments if module.quant_conv is None else module.quant_conv(moments)), cache

    done, cache, moments = 0, None, []
    with Sentinel(vae.weights, on_nan, on_load, on_heal) as sentinel, torch.no_grad():
        for size in _chunks(count, sentinel.module.num_sample_frames_batch_size):
            piece = images[done : done + size]
            encoded, cache = sentinel.run(partial(encode_piece, piece, cache), f"encoding frames from {done} of {count}")
            # The posterior's mean, which is its mode; the other half is its variance.
            moments.append(encoded.chunk(2, dim=1)[0].to("cpu", torch.float32))
            done += size
            if on_chunk is not None:
                on_chunk(done, count)
    return torch.cat(moments, dim=2)


def image_latents(
    vae: VAE, start_image: torch.Tensor, frames: int, end_image: torch.Tensor | None = None, on_load: Callable[[int, int], None] | None = None, **how
) -> torch.Tensor:
    """The latents that an image-to-video model reads beside the noise: the start image's, zeros, and an end image's if there is one.

    Args:
        start_image, end_image: ``[1, H, W, 3]`` in 0..1, H and W multiples of 16.
        frames: of the clip to make.
        how: ``on_nan``, ``on_heal``, as ``encode`` has them.

    Returns:
        float32 ``[1, 16, T, H/8, W/8]``, unscaled: ``concat_latent_image`` of a CONDITIONING.

    Raises:
        ValueError: for images the VAE cannot read, or an end image of a clip of one latent frame.
    """
    length = latent_frames(frames)
    if end_image is not None and length < 2:
        raise ValueError(f"An end image is connected, but the clip has {frames} frames, so it would end where it starts. Make it longer.")
    first = encode(vae, start_image, on_load=on_load, **how)
    latents = torch.zeros(1, first.shape[1], length, *first.shape[3:])
    latents[:, :, :1] = first
    if end_image is not None:
        latents[:, :, -1:] = encode(vae, end_image, on_load=on_load, **how)
    return latents


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
