"""``generate.py --seconds``: a video of any length, in parts that each go on from the last frames of the one before.

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

from cogvideox.files import stem_of, write_whole
from cogvideox.going_on import check_known, join_clips
from cogvideox.variants import INPAINT, START_IMAGE, Variant
from cogvideox.words import reason, short

if TYPE_CHECKING:
    import torch

#: Of seeds, which go from 0 to 2**64-1.
_SEEDS = 2**64
#: Seconds of a video at most: an hour.
_LONGEST = 3600
#: Frames that CogVideoX-Fun InP goes on from: the two latent frames that it reads first, as a pair. VideoX-Fun's script
#: has clips overlap by 4, which cut such a pair.
_FUN_OVERLAP = 5


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
        count: parts to be made.
        overlap: frames with which a part begins that are there already.
        begun: frames of the clip that the first goes on from; 0 without one.
    """

    frames: int
    wanted: int
    count: int
    overlap: int = 1
    begun: int = 0

    @property
    def total(self) -> int:
        """Frames of all parts and of the clip before them."""
        before = self.begun or self.overlap
        return before + self.count * (self.frames - self.overlap)

    @property
    def texts(self) -> tuple[str, str]:
        """What is made, and how the parts are tied, a sentence or two each."""
        made = (
            f"The clip's {self.begun} frames and {self.count} parts of {self.frames} frames make the video of "
            f"{self.wanted} frames."
            if self.begun
            else f"{self.count} parts of {self.frames} frames make the video of {self.wanted} frames."
        )
        tied = (
            "Each part starts from the last frame of what is there, so colours and shapes drift a little from part to "
            "part."
            if self.overlap == 1
            else f"Each part begins with the last {self.overlap} frames of what is there, over which one fades into "
            "the other. Colours and shapes drift a little from part to part."
        )
        return made, tied


def overlap_of(given: int | None, variant: Variant) -> int:
    """Return the frames with which a part begins that are there already: 1 for image-to-video models, which read one,
    and for CogVideoX-Fun InP as many as are given.

    Raises:
        ValueError: for a model that cannot go on, and for more frames than it reads.
    """
    if variant.reads not in (START_IMAGE, INPAINT):
        raise ValueError(
            f"--seconds goes on from the frames of the part before, and {variant.name} reads none. Give an "
            "image-to-video or a CogVideoX-Fun InP checkpoint, or make one clip with --frames and --context-windows."
        )
    if variant.reads == INPAINT:
        return _FUN_OVERLAP if given is None else given
    if given not in (None, 1):
        raise ValueError(
            f"--overlap is {given}, but {variant.name} goes on from one image. Leave it out, or give a CogVideoX-Fun "
            "InP checkpoint, which reads several frames."
        )
    return 1


def frames_of(seconds: float, fps: Fraction) -> int:
    """Count the frames of a video: 5 seconds at 16 frames a second are 81 frames, as in the model card."""
    return round(seconds * fps) + 1


def plan_parts(wanted: int, frames: int, overlap: int = 1, begun: int = 0) -> Parts:
    """Count the parts of a video.

    Args:
        wanted, frames, overlap, begun: as ``Parts`` has them.

    Raises:
        ValueError: for parts that never get any further, and for a clip that is too short to go on from, or as long as
            the video already.
    """
    if frames < 2:
        raise ValueError(
            f"--frames is {frames}, and --seconds makes parts of that length, each from the last frame of the one "
            "before: none would get any further. Give --frames 81, or leave it out."
        )
    check_known(overlap, frames)
    if begun >= wanted:
        raise ValueError(
            f"The clip has {begun} frames, and with --seconds the video is to have {wanted}, so nothing would be made. "
            "Give more --seconds: it is the length of the whole video."
        )
    if 0 < begun < overlap:
        raise ValueError(
            f"--overlap is {overlap} frames, but the clip has {begun}. Give a longer clip, or a lower --overlap."
        )
    return Parts(frames, wanted, max(1, math.ceil((wanted - (begun or overlap)) / (frames - overlap))), overlap, begun)


def parts_folder(output: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder beside the video in which its parts are kept: another one for other settings.

    Args:
        settings: all that the parts depend on, as JSON has it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return output.with_name(f"{stem_of(output)}_parts_{digest[:8]}")


def make_video(
    parts: Parts,
    folder: Path,
    settings: Mapping[str, Any],
    size: tuple[int, int],
    shape: "torch.Size",
    before: "torch.Tensor | None",
    seed: int,
    make: "Callable[[torch.Tensor | None, int], torch.Tensor]",
    decode: "Callable[[torch.Tensor], torch.Tensor]",
    say: Callable[[str], None],
) -> "torch.Tensor":
    """Make the parts that are not there yet, one after the other, and the frames of all.

    Args:
        folder: where parts are kept and looked for.
        settings: written beside them, for people.
        size: width and height in pixels.
        shape: of a part's latents.
        before: the clip that the first part goes on from, uint8 ``[parts.begun, H, W, 3]``; None without one.
        seed: of the first part; the next has the next seed.
        make: takes the frames ``[parts.overlap, H, W, 3]`` in 0..1 that a part begins with, None for a first part
            without a clip, and its seed; returns its latents.
        decode: returns the frames ``[F, H, W, 3]`` in 0..1 of latents, or raises if they are not to be gone on with.

    Returns:
        uint8 ``[frames, H, W, 3]``.

    Raises:
        Unkept: if a part cannot be kept.
        ValueError: if the folder cannot be written to, or what is kept there is no such part.
    """
    import torch

    # Filled as they are made: bytes, as the frames of half a minute in float take four times as much.
    shown = torch.empty(parts.total, *size[::-1], 3, dtype=torch.uint8)
    known, end = None, parts.begun
    if before is not None:
        shown[:end] = before
        known = before[-parts.overlap :] / 255
    for number in range(parts.count):
        kept = folder / f"part_{number + 1:05}.latent"
        latents = None
        if not kept.exists():
            say(f"Part {number + 1} of {parts.count}:")
            # Before: where this cannot be written, the part could not be either.
            _describe(folder, settings)
            latents = make(known, (seed + number) % _SEEDS)
            if not _keep(latents, kept):
                latents = None
        if latents is None:
            say(f"Part {number + 1} of {parts.count} is there already ({short(kept, 400)}).")
            latents = _kept(kept, shape)
        frames = decode(latents)
        if known is not None:
            # In place: all of a part joined would be there twice.
            frames[: len(known)] = join_clips(known, frames[: len(known)], len(known))
            end -= len(known)
        shown[end : end + len(frames)] = (frames * 255).round().to(torch.uint8)
        end += len(frames)
        known = frames[-parts.overlap :].clone()
    return shown[: parts.wanted]


class Unkept(ValueError):
    """A part could not be written.

    Attributes:
        latents: its latents.
    """

    def __init__(self, said: object, latents: "torch.Tensor"):
        super().__init__(said)
        self.latents = latents


def _keep(latents: "torch.Tensor", path: Path) -> bool:
    """Write the latents of a part, whole or not at all; return whether that was done, as another process with the same
    settings may have written them meanwhile.

    Raises:
        Unkept: if they cannot be written.
    """
    from cogvideox.video import latent_bytes

    try:
        # Under this name alone: the next free number may be the next part's.
        write_whole(path, latent_bytes(latents))
    except (ValueError, OSError) as error:
        if path.exists():
            return False
        said = _unwritable(path.parent, error) if isinstance(error, OSError) else error
        raise Unkept(said, latents) from error
    return True


def _kept(path: Path, shape: "torch.Size") -> "torch.Tensor":
    """Read the latents of a part.

    Raises:
        ValueError: if they are not what was written there.
    """
    from cogvideox.finite import is_finite
    from cogvideox.video import read_latent

    latents, failed = None, None
    try:
        latents = read_latent(path)
    except ValueError as error:
        failed = error
    # A channel of a frame is zeros throughout where a copy was not finished.
    if latents is None or latents.shape != shape or not is_finite(latents) or not latents.any(-1).any(-1).all():
        raise ValueError(
            f"{short(path, 400)} is not the part of the video that was written there: the file is damaged, or another "
            "is in its place. Delete it, and the part is made anew."
        ) from failed
    return latents


def _describe(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the parts were made with, so that people know whose they are.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(settings, indent=2, sort_keys=True).encode()
        write_whole(folder / "settings.json", content, overwrite=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{short(folder, 400)} cannot be written to ({reason(error)}), so the parts of the video cannot be kept there. "
        "Choose another folder for --output."
    )
