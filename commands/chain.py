"""``generate.py --seconds``: a video of any length, in parts that each start from the last frame of the one before.

A part's latents are kept as soon as they are made, so that a run that was stopped goes on where it was. The folder they
are in has a name of its own for each set of settings.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.words import reason, short

if TYPE_CHECKING:
    import torch

#: Of seeds, which go from 0 to 2**64-1.
_SEEDS = 2**64
#: Hours that nobody waits for.
_LONGEST = 3600


def check_seconds(seconds: float) -> None:
    """Refuse a length that no video has.

    Raises:
        ValueError: for what is no number of seconds up to an hour.
    """
    if not 0 < seconds <= _LONGEST:
        raise ValueError(
            f"--seconds is {seconds}, but a video has over 0 and here up to {_LONGEST} seconds. Give a number such as "
            "30."
        )


@dataclass(frozen=True)
class Parts:
    """How a long video is made of parts.

    Attributes:
        frames: of a part.
        wanted: frames of the video.
        count: parts, of which each but the first begins with a frame that is there already.
    """

    frames: int
    wanted: int
    count: int

    @property
    def text(self) -> str:
        """What is made, a sentence."""
        return (
            f"{self.count} parts of {self.frames} frames make the video of {self.wanted} frames. Each part starts from "
            "the last frame of the one before, so colours and shapes drift a little from part to part."
        )


def plan_parts(seconds: float, fps: Fraction, frames: int) -> Parts:
    """Count the parts of a video: 5 seconds at 16 frames a second are 81 frames, as in the model card.

    Args:
        frames: of a part.

    Raises:
        ValueError: for parts of one frame, which never get any further.
    """
    wanted = round(seconds * fps) + 1
    if frames < 2:
        raise ValueError(
            f"--frames is {frames}, and --seconds makes parts of that length, each from the last frame of the one "
            "before: none would get any further. Give --frames 81, or leave it out."
        )
    return Parts(frames, wanted, max(1, math.ceil((wanted - 1) / (frames - 1))))


def parts_folder(output: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder beside the video in which its parts are kept: another one for other settings.

    Args:
        settings: all that the parts depend on, as JSON has it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return output.with_name(f"{output.stem[:100]}_parts_{digest[:8]}")


def make_video(
    parts: Parts,
    folder: Path,
    settings: Mapping[str, Any],
    start: "torch.Tensor",
    seed: int,
    make: "Callable[[torch.Tensor, int], torch.Tensor]",
    decode: "Callable[[torch.Tensor], torch.Tensor]",
    say: Callable[[str], None],
) -> "torch.Tensor":
    """Make the parts that are not there yet, one after the other, and the frames of all.

    Args:
        folder: where parts are kept and looked for.
        settings: written beside them, for people.
        start: the image of the first part, ``[1, H, W, 3]`` in 0..1.
        seed: of the first part; the next has the next seed.
        make: takes the image that a part starts from and its seed, and returns its latents.
        decode: returns the frames ``[F, H, W, 3]`` in 0..1 of latents, or raises if they are not to be gone on with.

    Returns:
        uint8 ``[frames, H, W, 3]``.

    Raises:
        ValueError: if a part cannot be kept, or what is kept cannot be read.
    """
    import torch

    from cogvideox.video import read_latent, write_latent

    # A frame for all, filled as they are made: bytes, as the frames of half a minute in float take four times as much.
    shown = torch.empty(parts.count * (parts.frames - 1) + 1, *start.shape[1:], dtype=torch.uint8)
    for number in range(parts.count):
        kept = folder / f"part_{number + 1:05}.latent"
        if kept.exists():
            say(f"Part {number + 1} of {parts.count} is there already ({short(kept, 400)}).")
            latents = read_latent(kept)
        else:
            say(f"Part {number + 1} of {parts.count}:")
            latents = make(start, (seed + number) % _SEEDS)
            # The next free number is this one, as those before are there.
            write_latent(latents, folder, "part")
            _describe(folder, settings)
        frames = decode(latents)
        # What a part makes of the frame it starts from is there already.
        new, begin = (frames, 0) if number == 0 else (frames[1:], number * (parts.frames - 1) + 1)
        shown[begin : begin + len(new)] = (new * 255).round().to(torch.uint8)
        start = frames[-1:]
    return shown[: parts.wanted]


def _describe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the parts were made with, so that people know whose they are.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        (folder / "settings.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{short(folder, 400)} cannot be written to ({reason(error)}), so the parts of the video cannot be kept "
            "there. Choose another folder for --output."
        ) from error
