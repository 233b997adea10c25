"""``--stage``, ``--first-pass``: VOID's passes: the second starts from noise that moves as the first's video."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogvideox.choices import FIRST, SECOND, STAGES
from cogvideox.words import reason, short

if TYPE_CHECKING:
    import torch

    from cogvideox.events import Events
    from cogvideox.warped_noise import RaftFlow

BOTH = "both"
#: Asks for RAFT's weights in the place of a file of them.
_DOWNLOAD = Path("download")
#: Options that say more of ``--void``.
_OPTIONS = ("stage", "first_pass", "flow_model", "second_model")


def add_options(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Add the options of VOID's passes, read by the program's own ``path``."""
    group = parser.add_argument_group("take objects out of a video")
    group.add_argument(
        "--stage",
        choices=(*STAGES, BOTH),
        help=(
            "which pass of VOID; both: --model makes the first, with --cfg 1 --steps 30 --scheduler ddim_origin, its "
            "video is kept beside --output, and --second-model makes the second with the options as given (default: "
            "second with --first-pass or --noise, else first)"
        ),
    )
    group.add_argument(
        "--first-pass",
        type=path,
        metavar="VIDEO",
        help="what the first pass made of --video: the second starts from noise that moves as it does",
    )
    group.add_argument(
        "--second-model",
        type=path,
        metavar="PATH",
        help="the checkpoint of the second pass, with --stage both: void_pass2",
    )
    group.add_argument(
        "--flow-model",
        type=path,
        metavar="FILE|download",
        help=(
            "the weights of RAFT that tell how --first-pass moves, raft_large_C_T_SKHT_V2-ff5fadd5.pth; download: from "
            "pytorch.org, 21 MB, to where torchvision keeps them (default: those that are there)"
        ),
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where options of VOID's passes do not go together."""
    given = [name for name in _OPTIONS if getattr(options, name) is not None]
    if given and options.void is None:
        parser.error(f"--{given[0].replace('_', '-')} goes with --void")
    if options.noise is not None and options.first_pass is not None:
        parser.error("--noise and --first-pass are two noises to start from: give one of them")
    if options.stage == SECOND and options.noise is None and options.first_pass is None:
        parser.error(
            "--stage second starts from noise that moves as the first pass's video does: give that video as "
            "--first-pass, or the noise as --noise"
        )
    if options.stage == FIRST and options.first_pass is not None:
        parser.error("--first-pass is what --stage second goes on from: leave one of them away")
    if options.stage == BOTH and (options.noise is not None or options.first_pass is not None):
        parser.error("--stage both makes the first pass and the noise itself: leave --first-pass and --noise away")
    if (options.stage == BOTH) != (options.second_model is not None):
        parser.error("--stage both and --second-model go together: a checkpoint for each pass")
    if options.flow_model is not None and options.first_pass is None and options.stage != BOTH:
        parser.error("--flow-model goes with --first-pass, or with --stage both")


def stage_of(options: argparse.Namespace) -> str:
    """Return which pass of VOID is made; of both, the one after the other, the second."""
    if options.stage is None:
        return FIRST if options.noise is None and options.first_pass is None else SECOND
    return FIRST if options.stage == FIRST else SECOND


@dataclass
class Warp:
    """What the noise of a second pass is made of.

    Attributes:
        flow: None where no weights are there and a plan alone is wanted.
        video: the first pass's, uint8 ``[F, H, W, 3]``; None until it is made.
    """

    flow: "RaftFlow | None"
    video: "torch.Tensor | None" = None

    def noise(self, latent: "torch.Tensor", seed: int, device: "torch.device", events: "Events") -> "torch.Tensor":
        """Make the noise ``[1, 16, T, H/8, W/8]`` for such a latent, on a card if the model runs on one."""
        import torch

        from cogvideox.warped_noise import warped_noise

        assert self.flow is not None
        assert self.video is not None
        # RAFT is wrong on Apple's cards, as CommonSource's raft.py says.
        device = device if device.type == "cuda" else torch.device("cpu")
        video, self.video = self.video, None
        return warped_noise(video, tuple(latent.shape), self.flow.to(device), seed, device, events)


def plan_warp(options: argparse.Namespace, frames: int, size: tuple[int, int], events: "Events") -> Warp | None:
    """Read what a second pass's noise is made of, if it is to be made.

    Args:
        frames: of the video that the second pass makes.
        size: width and height of it.

    Raises:
        ValueError: without torchvision or RAFT's weights, and for a video that is not the first pass's.
    """
    if options.first_pass is None and options.stage != BOTH:
        return None
    warp = Warp(_open_flow(options.flow_model, downloads=not options.plan))
    if options.first_pass is not None:
        warp.video = read_first_pass(options.first_pass, frames, size, events)
    return warp


def read_first_pass(path: Path, frames: int, size: tuple[int, int], events: "Events") -> "torch.Tensor":
    """Read the video of a first pass: uint8 ``[frames, H, W, 3]``.

    Raises:
        ValueError: if it cannot be read, or has another number of frames.
    """
    import torch

    from cogvideox.video import read_video

    video = read_video(path, frames + 1, size=size, dtype=torch.uint8, events=events)
    if len(video) != frames:
        found = f"{len(video)}+" if len(video) > frames else len(video)
        raise ValueError(
            f"{short(path, 400)} has {found} frames and the second pass makes {frames}, so the noise would move at "
            "another time than the video. Give the video that the first pass made of this clip, and the same --frames."
        )
    return video


def _open_flow(weights: Path | None, downloads: bool) -> "RaftFlow | None":
    """Open RAFT, with its weights of a file or from where torchvision keeps them.

    Args:
        downloads: whether they are fetched if that is asked for; else there is None then.
    """
    import torch

    from cogvideox.warped_noise import WEIGHTS, WEIGHTS_URL, RaftFlow, require_raft

    require_raft()
    kept = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if weights not in (None, _DOWNLOAD):
        return RaftFlow(weights)
    if not kept.is_file():
        if weights is None:
            raise ValueError(
                f"The second pass's noise follows the optical flow of the first pass's video, and RAFT's weights are "
                f"not in {short(kept, 400)}. Give the file {WEIGHTS} as --flow-model, or --flow-model download."
            )
        if not downloads:
            return None
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(kept), WEIGHTS[-12:-4], progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAFT's weights could not be downloaded from {WEIGHTS_URL} ({reason(error)}). Try again, or fetch "
                "that file otherwise and give it as --flow-model."
            ) from error
    return RaftFlow(kept)
