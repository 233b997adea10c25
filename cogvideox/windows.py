"""Make a clip that is longer than the model was trained for in windows that overlap, at each step of the sampler.

The scheme is the temporal multidiffusion of VOID (https://github.com/Netflix/void-model, Apache-2.0,
``pipeline_cogvideox_fun_inpaint.py``), and equal to it: each window is a clip of its own to the model, whose positions
begin at 0, and takes a whole step of the scheduler. Where windows overlap, what they make is averaged with weights that
rise and fall in a line. The last window is shorter where the clip ends.

What a window reads beside its noise is its part of what the clip has. So the frame that pads a clip in front is in the
first window, and so is the image that a clip starts from: image-to-video models were trained to begin with that image,
at frame 0, and a later window that was given it would begin with it again. Later windows read zeros there, as these
models did in every twentieth clip of their training (``noised_image_dropout`` 0.05 in the configs of zai-org/CogVideo).
What they show comes from the frames they share with the window before, and from the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .choices import BLENDS, LINEAR, check_choice
from .geometry import LONGEST, latent_frames, near_lengths, padding_frames, pixel_frames
from .variants import TEMPORAL_COMPRESSION


@dataclass(frozen=True)
class Windows:
    """How a long clip is made in windows.

    Attributes:
        length: of a window in frames, 4N+1. 1.5 reads latent frames in pairs, so that 161 frames are 42 latent frames,
            as they are in a clip of 161 frames with its padding; VOID's 85 are 22.
        overlap: latent frames that a window shares with the next.
        blend: one of ``choices.BLENDS``.
    """

    length: int = 161
    overlap: int = 4
    blend: str = LINEAR

    def __post_init__(self):
        """Refuse what could not be run with, whatever the model.

        Raises:
            ValueError: for an unknown blend, another length, or an overlap that leaves nothing of a window.
        """
        check_window_length(self.length)
        check_overlap(self.length, self.overlap)
        check_choice("The blend of the context windows", self.blend, BLENDS)

    def latent_frames(self, config: Mapping) -> int:
        """Return the latent frames of a window: as many as a clip of its length has, its padding included."""
        count = latent_frames(self.length)
        return count + padding_frames(count, config)

    @property
    def text(self) -> str:
        """How clips are made, a sentence."""
        return (
            f"Context windows: a clip of more than {self.length} frames is made in windows of {self.length} that share "
            f"{self.overlap * TEMPORAL_COMPRESSION}."
        )


def check_window_length(length: int) -> None:
    """Refuse a window that is no clip of more than one latent frame.

    Raises:
        ValueError: with the two nearest lengths that are.
    """
    if length > 1 and length % TEMPORAL_COMPRESSION == 1:
        return
    below = max(pixel_frames(2), (min(length, LONGEST) - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1)
    near = near_lengths(below, TEMPORAL_COMPRESSION)
    raise ValueError(
        f"The length of the context windows is {length} frames, but a window is a clip, and those have 4N+1 frames: "
        f"the first alone and the others in fours. Set it to {near}; 161 is the longest that CogVideoX-1.5 was trained "
        "for."
    )


def check_overlap(length: int, overlap: int) -> None:
    """Refuse an overlap that is as long as a window.

    Args:
        length: of a window, in frames.
        overlap: in latent frames.

    Raises:
        ValueError: with what a window has.
    """
    count = latent_frames(length)
    if not 0 <= overlap < count:
        usual = "; 4 is usual" if count > 4 else ""
        raise ValueError(
            f"The overlap of the context windows is {overlap} latent frames, and a window of {length} frames has "
            f"{count}: no window would get any further than the one before. Set it from 0 to {count - 1}{usual}."
        )


def check_pairs(windows: Windows, config: Mapping) -> None:
    """Refuse an overlap that would cut one of the groups in which a transformer reads latent frames.

    Raises:
        ValueError: with the two nearest overlaps that do not.
    """
    group = config["patch_size_t"] or 1
    if windows.overlap % group:
        below = windows.overlap // group * group
        near = [str(overlap) for overlap in (below, below + group) if overlap < latent_frames(windows.length)]
        raise ValueError(
            f"The overlap of the context windows is {windows.overlap} latent frames, but this model reads them in "
            f"groups of {group}, one of which every other window would cut apart. Set it to "
            f"{' or '.join(near)}."
        )


def latents_at_once(windows: Windows | None, length: int, config: Mapping) -> int:
    """Return how many latent frames of a clip of ``length`` the transformer reads at once, padding left out."""
    return min(length, spans(windows, length, config)[0].stop)


def spans(windows: Windows | None, length: int, config: Mapping) -> list[slice]:
    """Return the windows of a clip as slices of its latent frames, padding included: all of them in one, where there
    are no windows or the clip is no longer than one.

    Args:
        length: latent frames of the clip, without its padding.
        config: the transformer's, in full.
    """
    total = length + padding_frames(length, config)
    size = total if windows is None else windows.latent_frames(config)
    shared = 0 if windows is None else windows.overlap
    found = [slice(0, min(size, total))]
    while found[-1].stop < total:
        start = found[-1].stop - shared
        found.append(slice(start, min(start + size, total)))
    return found


def windows_text(windows: Windows | None, length: int, config: Mapping) -> str | None:
    """Say in a sentence in how many windows a clip of ``length`` latent frames is made; None where it is in one."""
    count = len(spans(windows, length, config))
    if windows is None or count == 1:
        return None
    return (
        f"The clip of {pixel_frames(length)} frames is made in {count} windows of {windows.length} frames that share "
        f"{windows.overlap * TEMPORAL_COMPRESSION}: each step runs {count} times, in the memory of one window."
    )


class Canvas:
    """Blends what the windows of one step made, ``[B, frames, C, h, w]``, into a clip."""

    def __init__(self, clip: torch.Tensor, overlap: int):
        """Begin with nothing.

        Args:
            clip: a tensor of the clip's shape ``[B, T, C, h, w]``, on its device.
            overlap: latent frames that a window shares with the next.
        """
        self._sum = torch.zeros_like(clip, dtype=torch.float32)
        self._weights = self._sum.new_zeros(1, clip.shape[1], 1, 1, 1)
        self._overlap = overlap

    def add(self, span: slice, made: torch.Tensor) -> None:
        """Lay a window's frames onto the clip; weighted in their own dtype, as the reference does."""
        weights = made.new_ones(1, made.shape[1], 1, 1, 1)
        if self._overlap and span.start > 0:
            weights[:, : self._overlap] = self._ramp(0.0, 1.0, made)
        if self._overlap and span.stop < self._sum.shape[1]:
            weights[:, -self._overlap :] = self._ramp(1.0, 0.0, made)
        self._sum[:, span] += made * weights
        self._weights[:, span] += weights

    def _ramp(self, begin: float, end: float, like: torch.Tensor) -> torch.Tensor:
        return torch.linspace(begin, end, self._overlap + 2)[1:-1].to(like).reshape(1, -1, 1, 1, 1)

    def blended(self, elsewhere: torch.Tensor | None = None) -> torch.Tensor:
        """Return the clip so far, float32 ``[B, T, C, h, w]``.

        Args:
            elsewhere: what is where no window has been laid yet; zeros without it.
        """
        reached = self._weights > 0
        weights = torch.where(reached, self._weights, 1.0)
        blended = self._sum / weights
        return blended if elsewhere is None else torch.where(reached, blended, elsewhere)
