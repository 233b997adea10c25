"""Frames to latents and back with the checkpoint's own VAE."""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import nn

from .dtypes import Precision
from .events import Events
from .finite import check_finite
from .geometry import check_latent, check_size, latent_frames, pixel_frames
from .handles import VAE
from .modules.internals import LibraryModule
from .modules.strips import Strips
from .out_of_memory import empty_cache, is_out_of_memory
from .pictures import check_images
from .sentinel import OutOfMemory, Sentinel
from .tensors import check_room
from .variants import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from .weights import free_bytes

#: Where memory is not counted, the budget that the first failure halves; and the one below which there is nothing to be
#: saved.
_PLENTY, _LEAST = 16 << 30, 64 << 20


def decode(
    vae: VAE,
    samples: torch.Tensor,
    on_nan: str = "heal",
    events: Events | None = None,
    budget: int | None = None,
    in_pairs: bool | None = None,
) -> torch.Tensor:
    """Decode video latents, one video and two latent frames at a time, in as little memory as there is.

    Equal to diffusers' untiled ``vae.decode`` (its chunks and caches; batches one video at a time, its ``use_slicing``)
    followed by ``VideoProcessor.postprocess_video``, but for rounding: relative L2 under 1e-5 in fp32. Frames
    leave the device as they are made. ``in_pairs`` it is as equal to the decode of VideoX-Fun (aigc-apps/VideoX-Fun,
    ``AutoencoderKLCogVideoX``), which CogVideoX-Fun-V1.5 and VOID come with.

    Args:
        samples: ``[B, 16, T, H/8, W/8]``, unscaled.
        on_nan: what to do about a chunk that is not finite: ``heal`` decodes it again in fp32 and goes on so, ``stop``
            raises.
        events: told of the loading, of each chunk (in latent frames), and when a chunk had to be healed or done again
            in less memory; asked many times a chunk whether to stop.
        budget: bytes that may be taken on the device beside the weights; by default what is free there. Less is slower
            and gives the same.
        in_pairs: whether the first latent frame is decoded alone and the others in pairs; by default as the checkpoint
            says that the VAE came with. What made the latents knows better.

    Returns:
        float32 ``[B * F, H, W, 3]`` in 0..1 on the CPU; ``F = 4 (T - 1) + 1`` for an odd ``T`` and in pairs, ``4 T``
        for an even one otherwise.

    Raises:
        ValueError: for a latent that is not a CogVideoX one, or not finite, or whose frames this computer cannot hold.
        NonFiniteError: if a chunk is not finite and is not, or cannot be, healed.
        OutOfMemory: if memory runs out even with the smallest strips.
    """
    events = events or Events()
    check_latent(samples)
    batch, _, length, height, width = samples.shape
    in_pairs = vae.in_pairs if in_pairs is None else in_pairs
    frames = pixel_frames(length) if in_pairs else _decoded_frames(length)
    height, width = height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION
    check_room(
        4 * 3 * batch * frames * height * width,
        f"The frames of {batch} video(s) of {width}x{height} pixels and {frames} frames",
        "Decode fewer videos at once, or make them smaller or shorter.",
    )
    check_finite(
        samples, "The latent", "Sample it again with CogVideoX-1.5 Sampler, whose steps are checked, or load another."
    )
    images = torch.empty(batch, frames, height, width, 3)
    with Sentinel(vae.weights, on_nan, events) as sentinel, torch.no_grad():
        size = _frames_of(sentinel.module, "num_latent_frames_batch_size")
        chunks = pair_lengths(length, size) if in_pairs else chunk_lengths(length, size)
        work = _Chunks(sentinel, Strips.decode, budget, events)
        for video, latent in enumerate(samples.split(1)):
            start, first = 0, 0
            for index, piece in enumerate(latent.split(chunks, dim=2)):
                decoded = work.run(index, piece, f"frames from {start} of {frames}")
                images[video, start : start + decoded.shape[2]] = rearrange(
                    decoded.mul_(0.5).add_(0.5).clamp_(0, 1), "1 c f h w -> f h w c"
                )
                start, first = start + decoded.shape[2], first + piece.shape[2]
                events.progress("decoding", video * length + first, batch * length, "latent frame")
    return rearrange(images, "b f h w c -> (b f) h w c")


def encode(
    vae: VAE,
    images: torch.Tensor,
    on_nan: str = "heal",
    events: Events | None = None,
    budget: int | None = None,
) -> torch.Tensor:
    """Encode one clip, or one image, eight frames at a time: the mode of diffusers' ``vae.encode``, so that the same
    frames give the same latents.

    Args:
        images: ``[F, H, W, 3]`` in 0..1, or uint8 in 0..255, F = 4N+1, H and W multiples of 16.
        on_nan, events, budget: as ``decode`` has them; chunks are told in frames.

    Returns:
        float32 ``[1, 16, (F - 1) / 4 + 1, H/8, W/8]`` on the CPU, unscaled; relative L2 to the reference under 1e-5 in
        fp32.

    Raises:
        ValueError: for images the VAE cannot read.
        NonFiniteError: if a chunk is not finite and is not, or cannot be, healed.
        OutOfMemory: if memory runs out even with the smallest strips.
    """
    if images.dtype != torch.uint8:
        images = check_images(images, "images")
    return _encode(vae, images, _read_frames, on_nan, events, budget)


def encode_values(
    vae: VAE,
    values: torch.Tensor,
    on_nan: str = "heal",
    events: Events | None = None,
    budget: int | None = None,
) -> torch.Tensor:
    """Encode a clip that is no picture, as it is: float32 ``[F, H, W, 3]`` of any values, where those of a picture go
    from -1 to 1. Otherwise as ``encode``."""
    return _encode(vae, values, _as_they_are, on_nan, events, budget)


def _encode(
    vae: VAE,
    images: torch.Tensor,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    on_nan: str,
    events: Events | None,
    budget: int | None,
) -> torch.Tensor:
    count, height, width = images.shape[:3]
    check_size(width, height)
    if count % TEMPORAL_COMPRESSION != 1:
        fitting = pixel_frames(latent_frames(count))
        raise ValueError(
            f"The clip has {count} frames, and the VAE reads 4N+1: the first alone and the others in fours. Cut it to "
            f"{fitting}, or repeat frames."
        )
    # The posterior's mean, which is its mode; the other half is its variance.
    return moments(vae, images, prepare, on_nan, events, budget).chunk(2, dim=1)[0]


def moments(
    vae: VAE,
    clip: torch.Tensor,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    on_nan: str = "heal",
    events: Events | None = None,
    budget: int | None = None,
) -> torch.Tensor:
    """Encode one clip of any length that the reference reads, eight frames at a time: the parameters of the posterior
    that diffusers' ``vae.encode`` gives.

    Args:
        clip: ``[F, ...]``, whatever ``prepare`` makes frames of; F = 4N+1, or a multiple of 4.
        prepare: takes a part of the clip and returns its frames, ``[1, 3, f, H, W]`` in -1..1. Called again for a part
            that has to be done again.
        on_nan, events, budget: as ``encode`` has them.

    Returns:
        float32 ``[1, 32, T, H/8, W/8]`` on the CPU: 16 channels of the mean, and 16 of the variance's logarithm.
    """
    events = events or Events()
    count, done, parts = len(clip), 0, []

    def encode_part(strips: Strips, part: torch.Tensor) -> torch.Tensor:
        # Here and not before: what is kept to be run again are then parts of the clip, and no second one in fp32.
        return strips.encode(prepare(part))

    with Sentinel(vae.weights, on_nan, events) as sentinel, torch.no_grad():
        work = _Chunks(sentinel, encode_part, budget, events)
        for index, part in enumerate(
            clip.split(chunk_lengths(count, _frames_of(sentinel.module, "num_sample_frames_batch_size")))
        ):
            parts.append(work.run(index, part, f"encoding frames from {done} of {count}"))
            done += len(part)
            events.progress("encoding", done, count, "frame")
    return torch.cat(parts, dim=2)


def _read_frames(frames: torch.Tensor) -> torch.Tensor:
    frames = frames / 255 if frames.dtype == torch.uint8 else frames
    return 2.0 * rearrange(frames, "f h w c -> 1 c f h w") - 1.0


def _as_they_are(values: torch.Tensor) -> torch.Tensor:
    return rearrange(values, "f h w c -> 1 c f h w")


class _Chunks:
    """Runs a video's chunks in order. One that has to be done again, otherwise, needs what the ones before left: they
    are run again for that."""

    def __init__(
        self,
        sentinel: Sentinel,
        step: Callable[[Strips, torch.Tensor], torch.Tensor],
        budget: int | None,
        events: Events,
    ):
        self._sentinel, self._step, self._events = sentinel, step, events
        self._budget = free_bytes(sentinel.weights.device) if budget is None else budget
        self._pieces: list[torch.Tensor] = []
        self._strips: Strips | None = None
        self._reached = 0

    def run(self, index: int, piece: torch.Tensor, where: str) -> torch.Tensor:
        """The result of chunk ``index`` of a video; 0 begins another video."""
        self._pieces[index:] = [piece]
        while True:
            try:
                return self._sentinel.run(partial(self._work, index), where)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Not in there: the error holds on to what was being made.
            self._strips = None
            self._halve(where)

    def _work(self, index: int, module: nn.Module, precision: Precision) -> torch.Tensor:
        if index == 0 or self._strips is None or self._reached != index or self._strips.module is not module:
            self._strips = Strips(
                module, precision.dtype, self._sentinel.weights.device, self._budget, self._events.check_cancelled
            )
            for earlier in self._pieces[:index]:
                self._step(self._strips, earlier)
        # Until it is done, what the chunks before left is half overwritten.
        self._reached = -1
        result = self._step(self._strips, self._pieces[index])
        self._reached = index + 1
        return result

    def _halve(self, where: str) -> None:
        """Take half the memory from now on.

        Raises:
            OutOfMemory: if that is less than the smallest strips need.
        """
        device = self._sentinel.weights.device
        self._budget = (_PLENTY if self._budget is None else self._budget) // 2
        empty_cache(device)
        if self._budget < _LEAST:
            raise OutOfMemory(
                f"{where}: {device} ran out of memory even with the smallest strips, so something else fills it. "
                "Close other programs that use the card, or make the video smaller or shorter."
            )
        text = (
            f"{where}: {device} ran out of memory. Going on from here with at most {self._budget / 1e9:.2f} GB; "
            "nothing that was finished is lost."
        )
        self._events.healed(text)


def image_latents(
    vae: VAE, start_image: torch.Tensor, frames: int, end_image: torch.Tensor | None = None, **how
) -> torch.Tensor:
    """The latents that an image-to-video model reads beside the noise: the start image's, zeros, and an end image's if
    there is one.

    Args:
        start_image, end_image: ``[1, H, W, 3]`` in 0..1, H and W multiples of 16.
        frames: of the clip to make.
        how: ``on_nan``, ``events`` and ``budget``, as ``encode`` has them.

    Returns:
        float32 ``[1, 16, T, H/8, W/8]``, unscaled: ``concat_latent_image`` of a CONDITIONING.

    Raises:
        ValueError: for images the VAE cannot read, or an end image of a clip of one latent frame.
    """
    length = latent_frames(frames)
    if end_image is not None and length < 2:
        raise ValueError(
            f"An end image is connected, but the clip has {frames} frames, so it would end where it starts. Make it "
            "longer."
        )
    first = encode(vae, start_image, **how)
    latents = torch.zeros(1, first.shape[1], length, *first.shape[3:])
    latents[:, :, :1] = first
    if end_image is not None:
        latents[:, :, -1:] = encode(vae, end_image, **how)
    return latents


def _frames_of(vae: LibraryModule, name: str) -> int:
    return getattr(vae, name)


def chunk_lengths(length: int, size: int) -> list[int]:
    """Latent frames per chunk, as the reference cuts them: a remainder joins the first chunk."""
    count = max(length // size, 1)
    return [length - size * (count - 1)] + [size] * (count - 1)


def pair_lengths(length: int, size: int) -> list[int]:
    """Latent frames per chunk, as VideoX-Fun cuts them: the first alone, and a remainder at the end."""
    return [1, *(min(size, length - start) for start in range(1, length, size))]


def _decoded_frames(length: int) -> int:
    """Frames of ``length`` latent frames: a chunk with an odd number holds the clip's first frame, which is not
    stretched in time."""
    return (length - 1) * TEMPORAL_COMPRESSION + 1 if length % 2 else length * TEMPORAL_COMPRESSION
