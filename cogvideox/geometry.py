"""Turn pixels and frames into latents: sizes, the frame padding of CogVideoX-1.5, and the rotary grid."""

from collections.abc import Mapping, Sequence

import torch

from .tensors import check_room
from .variants import LATENT_CHANNELS, SIZE_STEP, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, rest_of
from .words import short

#: The largest side in pixels and the longest clip in frames, 16N+1, that the nodes take; nothing larger is advised.
LARGEST_SIDE, LONGEST = 16384, 16001


def latent_frames(frames: int) -> int:
    """Return the latent frames of a clip of ``frames`` pixel frames: ``(frames - 1) // 4 + 1``."""
    return (frames - 1) // TEMPORAL_COMPRESSION + 1


def pixel_frames(latent_frame_count: int) -> int:
    """Return the pixel frames that ``latent_frame_count`` latent frames decode to: ``4 * (T - 1) + 1``."""
    return (latent_frame_count - 1) * TEMPORAL_COMPRESSION + 1


def check_frames(frames: int, step: int = 16, in_pairs: bool = False) -> None:
    """Refuse a clip length that is not ``step * N + 1`` frames (16 for CogVideoX-1.5, 8 for CogVideoX 1.0).

    Args:
        in_pairs: latent frames have to be an even number, or one: ``step * N + 5`` frames (CogVideoX-Fun-V1.5, VOID).

    Raises:
        ValueError: with the two nearest lengths that work.
    """
    rest = rest_of(in_pairs)
    if frames == 1 or (frames > 1 and frames % step == rest % step):
        return
    below = (min(frames, LONGEST) - rest) // step * step + rest
    near = near_lengths(below, step) if below >= rest and frames > 0 else f"1 or {step + 1 if rest == 1 else rest}"
    if in_pairs:
        raise ValueError(
            f"The clip length is {frames} frames, but this model makes {step}N+{rest}, or a single one: it reads "
            f"latent frames in pairs, the first of which is one frame and the others {TEMPORAL_COMPRESSION} each. Set "
            f"it to {near}."
        )
    raise ValueError(
        f"The clip length is {frames} frames, but this model makes {step}N+1 frames: the first frame stands alone and "
        f"the others are compressed in groups, so any other length would be cut or stretched. Set it to {near}."
    )


def near_lengths(below: int, step: int) -> str:
    """Name two lengths that work, or the one that is not too long."""
    return f"{below} or {below + step}" if below + step <= LONGEST else f"{below}"


def check_size(width: int, height: int) -> None:
    """Refuse a picture size that the model's patches do not divide.

    Raises:
        ValueError: with the nearest sizes that work.
    """
    check_side("width", width)
    check_side("height", height)


def check_side(name: str, value: int) -> None:
    """Refuse a width or height in pixels that the model's patches do not divide.

    Raises:
        ValueError: with the nearest values that work.
    """
    if value < SIZE_STEP or value % SIZE_STEP:
        below = min(max(SIZE_STEP, value // SIZE_STEP * SIZE_STEP), LARGEST_SIDE)
        above = min(max(value // SIZE_STEP + 1, 1) * SIZE_STEP, LARGEST_SIDE)
        near = f"{below}" if above == below else f"{below} or {above}"
        raise ValueError(
            f"The {name} is {value} pixels, but it must be a multiple of {SIZE_STEP}: the VAE shrinks the picture 8 "
            f"times and the transformer reads it in patches of 2 x 2. Set it to {near}."
        )


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch without a video.

    Raises:
        ValueError: for less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size is {batch_size}, so there would be no video to make. Set it to 1 or more.")


def check_video_room(width: int, height: int, frames: int, batch_size: int = 1) -> None:
    """Refuse sizes that this computer could not hold, decoded one video at a time.

    Raises:
        ValueError: with the bytes they would take.
    """
    values = 3 * width * height * frames + batch_size * LATENT_CHANNELS * latent_frames(frames) * (
        width // SPATIAL_COMPRESSION
    ) * (height // SPATIAL_COMPRESSION)
    videos = "A video" if batch_size == 1 else f"{short(batch_size)} videos"
    what = f"{videos} of {short(width)}x{short(height)} pixels and {short(frames)} frames"
    check_room(4 * values, what, "Make it smaller or shorter, or fewer at once.")


def empty_latent(
    width: int, height: int, frames: int, batch_size: int = 1, frame_step: int = 16, in_pairs: bool = False
) -> torch.Tensor:
    """Make the latent that means "start from noise": float32 zeros of ``latent_shape``."""
    return torch.zeros(latent_shape(width, height, frames, batch_size, frame_step, in_pairs))


def latent_shape(
    width: int, height: int, frames: int, batch_size: int = 1, frame_step: int = 16, in_pairs: bool = False
) -> tuple[int, int, int, int, int]:
    """Return the shape of a latent, ``[B, 16, T, H/8, W/8]`` with ``T = (frames - 1) // 4 + 1``.

    Args:
        width, height: pixels, multiples of 16.
        frames: pixel frames, as ``check_frames`` takes them with ``frame_step`` and ``in_pairs``.
        batch_size: videos, at least 1.

    Raises:
        ValueError: for sizes, lengths or batches that the model cannot make.
    """
    check_size(width, height)
    check_frames(frames, frame_step, in_pairs)
    check_batch_size(batch_size)
    check_video_room(width, height, frames, batch_size)
    size = (height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
    return batch_size, LATENT_CHANNELS, latent_frames(frames), *size


def check_latent(samples: torch.Tensor, patch_size: int = 1) -> None:
    """Refuse what is not a CogVideoX video latent ``[B, 16, T, H/8, W/8]``.

    Args:
        samples: the ``samples`` of a LATENT.
        patch_size: the transformer's patch, which H/8 and W/8 must divide by; 1 where no transformer is involved.

    Raises:
        ValueError: for a wrong rank, channel count or size.
    """
    shape = list(samples.shape)
    if samples.ndim != 5:
        raise ValueError(
            f"The latent has the shape {shape}, {samples.ndim} dimensions, but a CogVideoX latent is a video with 5: "
            f"[batch, {LATENT_CHANNELS}, frames, height/8, width/8]. Image latents do not fit; use Empty "
            "CogVideoX-1.5 Latent."
        )
    if shape[1] != LATENT_CHANNELS:
        raise ValueError(
            f"The latent has {shape[1]} channels, but CogVideoX's has {LATENT_CHANNELS}: it was made for, or by, "
            "another model. Use Empty CogVideoX-1.5 Latent, or a latent encoded with a CogVideoX VAE."
        )
    if 0 in shape:
        raise ValueError(
            f"The latent is empty (shape {shape}), so there is nothing to work on. Check the node that made it."
        )
    if shape[3] % patch_size or shape[4] % patch_size:
        step = SPATIAL_COMPRESSION * patch_size
        raise ValueError(
            f"The latent is {shape[4]}x{shape[3]} cells ({shape[4] * 8}x{shape[3] * 8} pixels), but the transformer "
            f"reads patches of {patch_size}x{patch_size} cells. Use a width and a height that are multiples of {step} "
            "pixels."
        )


def padding_frames(latent_frame_count: int, config: Mapping) -> int:
    """Return the latent frames that the sampler puts in front, and takes away afterwards, so that ``patch_size_t``
    divides their number."""
    patch = config.get("patch_size_t") or 1
    return -latent_frame_count % patch


def padded(latents: torch.Tensor, padding: int, dim: int, zeros: bool = False) -> torch.Tensor:
    """Return latents with ``padding`` more frames in front, as the reference pads: the first frame again.

    Args:
        dim: of the frames.
        zeros: as the reference pads image latents: zeros behind the first frame, so that an end image stays the last.
    """
    first, rest = latents.tensor_split([1], dim)
    shape = [padding if each == dim else size for each, size in enumerate(latents.shape)]
    return torch.cat([first, latents.new_zeros(shape), rest] if zeros else [first.expand(shape), latents], dim)


def video_tokens(config: Mapping, shape: Sequence[int]) -> int:
    """Return the tokens that the transformer makes of a latent ``[B, 16, T, H/8, W/8]``, its padding included."""
    _, _, length, height, width = shape
    frames = (length + padding_frames(length, config)) // (config["patch_size_t"] or 1)
    return frames * (height // config["patch_size"]) * (width // config["patch_size"])


def rotary_embedding(
    config: Mapping, latent_frame_count: int, height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute rotary position tables ``(cos, sin)``, each float32 ``[tokens, head_dim]``, or None for sin-cos models.

    The grids are the reference pipeline's (diffusers ``CogVideoXPipeline``): CogVideoX-1.5 slices a grid of absolute
    positions; 1.0 stretches the picture over the grid it was trained on. Pictures larger than the sliced grid, where
    the reference stops with a shape error, take the positions that follow.

    Args:
        config: the transformer's config.
        latent_frame_count: latent frames, padding included.
        height, width: latent cells.
    """
    if not config.get("use_rotary_positional_embeddings"):
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch, patch_t = config["patch_size"], config.get("patch_size_t")
    grid = (height // patch, width // patch)
    base = (config["sample_height"] // patch, config["sample_width"] // patch)
    if patch_t:
        return get_3d_rotary_pos_embed(
            embed_dim=config["attention_head_dim"],
            crops_coords=None,
            grid_size=grid,
            temporal_size=(latent_frame_count + patch_t - 1) // patch_t,
            grid_type="slice",
            max_size=(max(base[0], grid[0]), max(base[1], grid[1])),
            device=device,
        )
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    return get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]),
        grid_size=grid,
        temporal_size=latent_frame_count,
        device=device,
    )
