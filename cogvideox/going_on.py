"""Go on where a clip ends: what the next part starts from, and how parts are joined."""

import torch

from .geometry import check_frames
from .tensors import check_room


def part_lengths(length: int, frame_step: int, in_pairs: bool) -> tuple[int, bool]:
    """Return the lengths that a part can have, as ``check_frames`` takes them: those of the VAE's checkpoint; but 8N+5
    frames go with any, as CogVideoX-Fun InP, which makes such, has the VAE of all others.

    Args:
        frame_step, in_pairs: of the VAE's handle.

    Returns:
        The step, and whether latent frames come in pairs.
    """
    return (8, True) if length % 8 == 5 else (frame_step, in_pairs)


def check_known(overlap: int, length: int) -> None:
    """Refuse an overlap that is not 4N+1 frames, or leaves nothing of the next part to be made.

    Raises:
        ValueError: with what it can be.
    """
    if overlap < 1 or overlap % 4 != 1:
        below = min(max(1, (overlap - 1) // 4 * 4 + 1), max(1, (length - 2) // 4 * 4 + 1))
        near = f"{below} or {below + 4}" if below + 4 < length else f"{below}"
        raise ValueError(
            f"The overlap is {overlap} frames, but what is known of the next part has to be 4N+1 frames: the first "
            f"alone and the others in fours, as the VAE reads them. Set it to {near}."
        )
    if overlap >= length:
        raise ValueError(
            f"The overlap is {overlap} frames and the next part has {length}, so nothing new would be made. Set the "
            "overlap to 1, or the length higher."
        )


def known_frames(clip: torch.Tensor, length: int, overlap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the next part of a clip as far as it is known.

    Args:
        clip: ``[F, H, W, 3]`` in 0..1.
        length: frames of the next part, 4N+1.
        overlap: frames of the clip's end that it begins with, 4N+1.

    Returns:
        The part ``[length, H, W, 3]``, the last known frame repeated; and a mask ``[length, H, W]``, 0 where a frame is
        known and 1 where it is to be made.

    Raises:
        ValueError: for a length or an overlap that does not go, or a clip that is shorter than the overlap.
    """
    check_frames(length, 4)
    check_known(overlap, length)
    if len(clip) < overlap:
        raise ValueError(
            f"The overlap is {overlap} frames, but the clip has {len(clip)}. Set the overlap lower, or connect the "
            "whole clip."
        )
    _, height, width, channels = clip.shape
    check_room(
        4 * length * height * width * (channels + 1),
        f"A part of {length} frames of {width}x{height}",
        "Make it smaller or shorter.",
    )
    known = clip[-overlap:]
    mask = known.new_ones(length, height, width)
    mask[:overlap] = 0.0
    return torch.cat([known, known[-1:].expand(length - overlap, -1, -1, -1)]), mask


def join_clips(first: torch.Tensor, second: torch.Tensor, overlap: int) -> torch.Tensor:
    """Put one clip behind another, ``[F, H, W, 3]`` each, with a linear cross-fade.

    The weights of the second clip are ``i / overlap``, so that the fade begins with the first clip's own frame, as in
    VideoX-Fun's ``predict_i2v.py`` (https://github.com/aigc-apps/VideoX-Fun, Apache-2.0).

    Args:
        overlap: the frames at the end of the first that the second begins with.

    Raises:
        ValueError: for clips of different sizes, or an overlap that one of them has not.
    """
    if first.shape[1:] != second.shape[1:]:
        sizes = [f"{clip.shape[2]}x{clip.shape[1]}" for clip in (first, second)]
        raise ValueError(
            f"The first clip has frames of {sizes[0]} and the second of {sizes[1]}, so they cannot be joined. Make "
            "both in one size, or put Upscale Image behind one."
        )
    fewest = min(len(first), len(second))
    if not 0 <= overlap <= fewest:
        raise ValueError(
            f"The overlap is {overlap} frames, but the clips have {len(first)} and {len(second)}. Set it from 0 to "
            f"{fewest}; it is what CogVideoX-1.5 Extend was told."
        )
    if overlap == 0:
        return torch.cat([first, second])
    share = torch.arange(overlap, dtype=first.dtype, device=first.device).div(overlap).reshape(-1, 1, 1, 1)
    faded = first[-overlap:] * (1 - share) + second[:overlap] * share
    return torch.cat([first[:-overlap], faded, second[overlap:]])
