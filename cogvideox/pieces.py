"""A clip that is made larger in pieces: what it is padded to, where pieces lie in it, and what of each is kept.

Figures are those of DOVE's and SparkVSR's scripts (``super_resolution``).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from torch.nn.functional import interpolate, pad

from .geometry import latent_frames
from .variants import LATENT_CHANNELS, SIZE_STEP, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

#: Clips are brought to ``LENGTH_STEP * N + 1`` frames, as both scripts do.
LENGTH_STEP = 8
#: By how much pieces overlap, in frames and in pixels (``overlap_t``, ``overlap_hw``): half is cut off at either side.
OVERLAP_FRAMES, OVERLAP_PIXELS = 8, 32
#: The smallest pieces that are tried: frames and pixels a side, beyond the overlap.
_LEAST_FRAMES, _LEAST_PIXELS = 16, 256


@dataclass(frozen=True)
class Span:
    """One piece of an enlarged clip: where it starts and stops, in frames, rows and columns."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """Cut rows and columns out of ``[..., H, W]``."""
        return images[..., self.start[1] : self.stop[1], self.start[2] : self.stop[2]]

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        frames, height, width = (stop - start for start, stop in zip(self.start, self.stop, strict=True))
        # A piece of 4N frames has none that stands alone.
        length = latent_frames(frames) if frames % TEMPORAL_COMPRESSION else frames // TEMPORAL_COMPRESSION
        return (1, LATENT_CHANNELS, length, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)


@dataclass(frozen=True)
class Pieces:
    """The pieces that a clip is made in.

    Attributes:
        whole: frames, height and width of it.
        size: of a piece; those at the ends are larger, as what is left over is theirs.
    """

    whole: tuple[int, int, int]
    size: tuple[int, int, int]

    @property
    def spans(self) -> list[Span]:
        """All pieces, the first chunk of frames first, and of it the first row."""
        overlaps = (OVERLAP_FRAMES, OVERLAP_PIXELS, OVERLAP_PIXELS)
        axes = [axis_spans(*axis) for axis in zip(self.whole, self.size, overlaps, strict=True)]
        return [Span(*zip(*spans, strict=True)) for spans in product(*axes)]

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of the largest piece's latents."""
        return max((span.latent_shape for span in self.spans), key=math.prod)

    def kept(self, span: Span) -> tuple[list[slice], list[slice]]:
        """Return what of a piece is kept, and where it goes in the whole: half of an overlap is cut off."""
        inside, there = [], []
        for start, stop, whole, overlap in zip(
            span.start, span.stop, self.whole, (OVERLAP_FRAMES, OVERLAP_PIXELS, OVERLAP_PIXELS), strict=True
        ):
            first = start + (overlap // 2 if start else 0)
            last = stop - (overlap // 2 if stop < whole else 0)
            inside.append(slice(first - start, last - start))
            there.append(slice(first, last))
        return inside, there

    @property
    def text(self) -> str:
        frames, height, width = self.whole
        count, (chunk, rows, columns) = len(self.spans), self.size
        if count == 1:
            return f"{width}x{height} pixels and {frames} frames are made in one piece."
        return (
            f"{width}x{height} pixels and {frames} frames are made in {count} pieces of about "
            f"{min(columns, width)}x{min(rows, height)} pixels and {min(chunk, frames)} frames, as there is no room "
            f"for all at once. They overlap by {OVERLAP_FRAMES} frames and {OVERLAP_PIXELS} pixels."
        )


def axis_spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a line into parts of one size that overlap, the last of which reaches to the end: start and stop of each.

    Args:
        size: of a part; as long as the line or longer gives one.

    Raises:
        ValueError: for several that are no longer than their overlap.
    """
    if size >= length:
        return [(0, length)]
    if size <= overlap:
        raise ValueError(f"A piece of {size} is no longer than its overlap of {overlap}: give a larger one.")
    stride = size - overlap
    count = (length - size) // stride + 1
    starts = [stride * index for index in range(count)]
    return [(start, length if index == count - 1 else start + size) for index, start in enumerate(starts)]


@dataclass(frozen=True)
class Clip:
    """A clip, and what it is enlarged to: padded to whole latent frames and patches.

    Attributes:
        images: ``[F, H, W, 3]`` in 0..1, or uint8.
        scale: times as wide and high.
        grid: what H and W are padded to a multiple of, with black at the right and below.
    """

    images: torch.Tensor
    scale: int
    grid: int

    @property
    def height(self) -> int:
        return self.images.shape[1]

    @property
    def width(self) -> int:
        return self.images.shape[2]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the enlarged clip, padded."""
        frames = len(self.images) + -(len(self.images) - 1) % LENGTH_STEP
        height, width = (self.scale * (side + -side % self.grid) for side in (self.height, self.width))
        return frames, height, width

    def enlarged(self, span: Span, frames: torch.Tensor) -> torch.Tensor:
        """Return some frames of a piece, ``[1, 3, f, h, w]`` in -1..1: enlarged whole, as neighbours count, then
        cut."""
        # The last frame is repeated. In 0..255, as the scripts have it: there eight bits are whole numbers.
        some = self.images[frames.clamp(max=len(self.images) - 1)]
        some = some.float() if some.dtype == torch.uint8 else some.cpu() * 255
        # In memory as theirs: interpolation rounds otherwise where channels come last.
        some = rearrange(some, "f h w c -> f c h w").contiguous()
        some = pad(some, (0, -self.width % self.grid, 0, -self.height % self.grid))
        large = interpolate(some, size=self.size[1:], mode="bilinear", align_corners=False)
        return rearrange(span.cut(large) / 255.0 * 2.0 - 1.0, "f c h w -> 1 c f h w")

    def frames(self, span: Span) -> torch.Tensor:
        """Return the numbers of a piece's frames."""
        return torch.arange(span.start[0], span.stop[0])


def smaller(whole: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield smaller and smaller sizes of pieces: first fewer frames, down to four times the least, then smaller
    pictures, then fewer frames still."""
    sizes = list(whole)
    for least_frames in (4 * _LEAST_FRAMES, _LEAST_FRAMES):
        while sizes[0] > least_frames:
            sizes[0] = max(_up(sizes[0] // 2, LENGTH_STEP), least_frames)
            yield (sizes[0], sizes[1], sizes[2])
        while max(sizes[1:]) > _LEAST_PIXELS:
            longer = 1 if sizes[1] > sizes[2] else 2
            sizes[longer] = max(_up(sizes[longer] // 2, SIZE_STEP) + OVERLAP_PIXELS, _LEAST_PIXELS)
            yield (sizes[0], sizes[1], sizes[2])


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
