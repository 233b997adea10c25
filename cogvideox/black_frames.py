"""Find the frames of a clip that are black, as ffmpeg's ``blackdetect`` sees them, and those that hold NaN or Inf.

A pixel's luma is BT.601's ``0.299 R + 0.587 G + 0.114 B`` in full range; it is black if its luma, rounded to 8 bits, is
at most ``pixel_black_threshold * 255`` (25 at the default 0.10). A frame is black if at least ``picture_black_ratio``
of its pixels are.
Source: ffmpeg's vf_blackdetect (defaults ``pixel_black_th`` 0.10, ``picture_black_ratio_th`` 0.98) behind swscale's RGB
to full-range luma; against ffmpeg 9 the per-pixel decision differs for 4 of 4,194,304 dark colours, all of them exactly
half a grey level.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .choices import ON_BLACK, STOP, WARN, check_choice, check_share
from .events import Events
from .words import setting

logger = logging.getLogger(__name__)

_LUMA = (0.299, 0.587, 0.114)
#: 255ths up to which values are looked at for whether they were 8 bits once.
_DARK = 25.5
#: Pixels looked at together: small enough for the processor's cache, large enough to amortise a call.
_BLOCK = 1 << 18


class BlackVideoError(RuntimeError):
    """The video is black; the message says which frames, the likely cause and the fix."""


@dataclass(frozen=True)
class BlackFrameReport:
    """What the check saw.

    Attributes:
        ratios: per frame, the share of black pixels, 0..1.
        nonfinite: indices of the frames that hold NaN or Inf.
        picture_black_ratio, video_black_ratio: the thresholds in force.
        eight_bit: indices of the black frames whose dark values are all whole 255ths, as in a video that was saved and
            loaded again: what was NaN when it was saved is 0 there.
    """

    ratios: tuple[float, ...]
    nonfinite: tuple[int, ...]
    picture_black_ratio: float
    video_black_ratio: float
    eight_bit: tuple[int, ...] = ()

    @property
    def black_frames(self) -> tuple[int, ...]:
        """Indices of the black frames, counted from 0."""
        return tuple(index for index, ratio in enumerate(self.ratios) if ratio >= self.picture_black_ratio)

    @property
    def verdict(self) -> str:
        """``ok``, ``partly black`` or ``black`` (enough black frames, or any value that is not finite)."""
        black = len(self.black_frames)
        if self.nonfinite or (black and black >= self.video_black_ratio * len(self.ratios)):
            return "black"
        return "partly black" if black else "ok"

    @property
    def text(self) -> str:
        """The verdict for people: frames as ranges, counted from 0."""
        total, black = len(self.ratios), self.black_frames
        lines = [f"verdict: {self.verdict}"]
        if black:
            lines.append(f"{len(black)} of {total} frames are black: {frame_ranges(black)}")
        else:
            darkest = max(range(total), key=self.ratios.__getitem__)
            lines.append(
                f"none of {total} frames is black; the darkest is frame {darkest} with {self.ratios[darkest]:.1%} "
                "black pixels"
            )
        if self.nonfinite:
            lines.append(
                f"{len(self.nonfinite)} of {total} frames hold NaN or Inf, which is saved as black: "
                f"{frame_ranges(self.nonfinite)}"
            )
        return "\n".join(lines)

    @property
    def explained(self) -> str:
        """The verdict, and the advice where there is one."""
        return f"{self.text}\n{self.advice}".rstrip()

    @property
    def advice(self) -> str:
        """The likely cause of a black video and what to do about it; "" where the verdict is not black."""
        if self.verdict != "black":
            return ""
        if self.nonfinite:
            return (
                "Likely cause: the model ran in a dtype too small for its activations. CogVideoX-1.5 was trained in "
                "bf16; in fp16 activations pass 65504, become Inf and then NaN. Set dtype to auto in CogVideoX-1.5 "
                "Model Loader (--dtype) and run again."
            )
        if self.eight_bit:
            return (
                "The black frames hold nothing finer than 8 bits, as in a video that was saved and loaded again, and "
                "NaN is saved as black: an overflow cannot be seen in them any more. Likely cause: the model that "
                "made them ran in a dtype too small for its activations, as fp16 is for weights trained in bf16 (all "
                "CogVideoX but 2b). To tell, put this check directly behind the decoder, where it sees NaN itself, or "
                "make the video again with dtype at auto in CogVideoX-1.5 Model Loader (--dtype)."
            )
        return (
            "Every value is finite, and finer than 8 bits, so this is not an overflow. Likely causes: an empty latent "
            "was decoded without sampling, the prompt asks for darkness, or the latents come from another model. "
            "Check what is connected to the decoder."
        )


def check_black_frames(
    images: torch.Tensor,
    pixel_black_threshold: float = 0.10,
    picture_black_ratio: float = 0.98,
    video_black_ratio: float = 1.0,
    events: Events | None = None,
) -> BlackFrameReport:
    """Look at every pixel of a clip once, in blocks: constant extra memory, and the input stays as it is.

    Args:
        images: ``[frames, H, W, 3]`` (or 4, whose alpha is ignored), floating point, on any device. They are saved from
            0 to 1: values beyond count as those.
        pixel_black_threshold: share of white up to which a pixel's luma is black, 0..1.
        picture_black_ratio: share of black pixels from which a frame is black, 0..1.
        video_black_ratio: share of black frames from which the video is black, 0..1.
        events: told of each frame.

    Raises:
        ValueError: for thresholds outside 0..1 or what is not a batch of RGB frames.
    """
    _check_input(images, pixel_black_threshold, picture_black_ratio, video_black_ratio)
    # Luma that rounds to at most this many 255ths is black. Half a grey level rounds up, as swscale rounds it (hence
    # .4995, which lies between that and the next lower luma an 8-bit colour can have).
    limit = (math.floor(pixel_black_threshold * 255) + 0.4995) / 255
    luma_of = torch.tensor(_LUMA, device=images.device)
    pixels = images.shape[1] * images.shape[2]
    ratios, nonfinite, eight_bit = [], [], []
    for index, image in enumerate(images):
        black, finite = 0, True
        blocks = image[..., :3].split(max(1, _BLOCK // images.shape[2]))
        for rows in blocks:
            dark, rows_finite = _count_dark(rows, limit, luma_of)
            black, finite = black + dark, finite and rows_finite
        ratios.append(black / pixels)
        if not finite:
            nonfinite.append(index)
        elif ratios[-1] >= picture_black_ratio and all(_on_the_grid(rows) for rows in blocks):
            eight_bit.append(index)
        if events is not None:
            events.progress("checking", index + 1, len(images), "frame")
    return BlackFrameReport(tuple(ratios), tuple(nonfinite), picture_black_ratio, video_black_ratio, tuple(eight_bit))


def _on_the_grid(rows: torch.Tensor) -> bool:
    """Return whether all dark values of ``[rows, W, 3]`` are whole 255ths, as in a picture of 8 bits. They are
    finite."""
    levels = rows.float() * 255
    # Within the rounding of their dtype.
    off = (levels - levels.round()).abs() - levels.abs() * (torch.finfo(rows.dtype).eps / 2)
    return bool(((off <= 1e-3) | (levels > _DARK)).all())


def _count_dark(rows: torch.Tensor, limit: float, luma_of: torch.Tensor) -> tuple[int, bool]:
    """Count the black pixels of ``[rows, W, 3]``, and say whether all values are finite. One that is not counts as
    black, as it is saved so."""
    low, high = (bound.item() for bound in rows.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = ~rows.isfinite().all(-1).view(-1)
        return int((bad | (_luma(rows, luma_of) < limit)).sum()), False
    # Luma lies between the darkest and the brightest channel, so a block that is all bright or all dark is decided by
    # them.
    if low > limit * (1 + 1e-5):
        return 0, True
    if high < limit * (1 - 1e-5):
        return rows.numel() // 3, True
    return int((_luma(rows, luma_of) < limit).sum()), True


def _luma(rows: torch.Tensor, luma_of: torch.Tensor) -> torch.Tensor:
    """Compute the luma ``[pixels]`` of ``[rows, W, 3]`` as they are saved: what lies outside 0..1 is cut to it."""
    return torch.mv(rows.reshape(-1, 3).float().clamp(0, 1), luma_of)


def enforce(report: BlackFrameReport, action: str) -> None:
    """Act on a report: ``stop`` raises if the video is black, ``warn`` logs, ``pass`` does nothing.

    Raises:
        BlackVideoError: if ``action`` is ``stop`` and the verdict is ``black``.
        ValueError: for an unknown action.
    """
    check_choice("action", action, ON_BLACK)
    if action == STOP and report.verdict == "black":
        meant = "" if report.nonfinite else f"\nIf the video is meant to be dark, set {setting('action')} to warn."
        raise BlackVideoError(f"The video is black, so it is not passed on to be saved.\n{report.explained}{meant}")
    if action == WARN and report.verdict != "ok":
        logger.warning("%s", report.explained)


def frame_ranges(frames: Sequence[int]) -> str:
    """Write the numbers of frames as ranges: ``(0, 1, 2, 5)`` -> ``0-2, 5``."""
    ranges: list[list[int]] = []
    for frame in frames:
        if ranges and frame == ranges[-1][1] + 1:
            ranges[-1][1] = frame
        else:
            ranges.append([frame, frame])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def _check_input(images: torch.Tensor, *thresholds: float) -> None:
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            f"The images are {images.dtype} with the shape {list(images.shape)}, but frames are floating point "
            "[frames, height, width, 3] in 0..1. Connect the IMAGE output of a decoder."
        )
    for name, value in zip(
        ("pixel_black_threshold", "picture_black_ratio", "video_black_ratio"), thresholds, strict=True
    ):
        check_threshold(name, value)


def check_threshold(name: str, value: float) -> None:
    """Refuse a threshold that is no share.

    Raises:
        ValueError: outside 0..1.
    """
    check_share(name, value, "The default follows ffmpeg's blackdetect.")
