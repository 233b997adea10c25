"""Make a video from a prompt, an image or a video with CogVideoX-1.5, without ComfyUI: the same engine as the nodes.

Or make many, inpaint one, take objects out of it or make it larger; check what a checkpoint or config would do,
download or convert one, or migrate a workflow of ComfyUI-CogVideoXWrapper or VideoX-Fun to this pack. It is started as
it lies in the pack's folder.
"""

# One file, as every option stands beside what it is told to do and which others it goes with; the work is in commands/.
import argparse
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# An interpreter with a ._pth file, as the python_embeded of ComfyUI's Windows portable, does not look beside the
# script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cogvideox.choices import (
    BACKENDS,
    CACHES,
    COMPILE_DEFAULT,
    COMPILE_MODES,
    DTYPES,
    MEMORY,
    ON_BLACK,
    ON_MISMATCH,
    ON_NAN,
    QUANTIZE,
    SCHEDULERS,
)
from cogvideox.languages import preferred
from cogvideox.words import settings_called, short
from commands.job import changed, is_config, open_handles_of, output_of, placed, prepared, rate_of
from commands.passes import make_both
from commands.ranks import AUTO, PROMPTS, SPLITS, place_of
from commands.terminal import (
    OPTIONS,
    complain,
    in_words,
    keep_quiet,
    lines_of,
    mute,
    path_of,
    say,
    terminal_events,
    told,
)
from commands.upscale import add_options, check_options
from commands.video import (
    Work,
    check_team,
    company,
    encoded,
    finish,
    finish_job,
    judge,
    latents_kept,
    make_chain,
    once_for_all,
    sampled,
    say_plan,
    say_skips,
    write_somewhere,
)
from commands.void import BOTH
from commands.void import add_options as add_passes
from commands.void import check_options as check_passes

if TYPE_CHECKING:
    from cogvideox.lora import Lora
    from cogvideox.precision.policy import DtypePlan
    from interop.report import ConfigReport

#: Signals that end a program: of the system, of a terminal that is closed, and of Ctrl+Break on Windows.
_STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]

EXAMPLE = """examples:
  python generate.py --model models/CogVideoX1.5-5B --prompt "A panda plays the guitar." --output panda.mp4
  python generate.py --model models/CogVideoX1.5-5B-I2V --image panda.png --prompt "The panda looks up." \\
    --lora style.safetensors:0.8
  python generate.py --model models/CogVideoX1.5-5B --video clip.mp4 --strength 0.7 --keep-audio \\
    --prompt "The same scene in snow."
  python generate.py --model models/CogVideoX-Fun-V1.5-5b-InP --video clip.mp4 --mask mask.png \\
    --scheduler ddim_origin --prompt "A panda in a red coat."
  python generate.py --model void_pass1.safetensors --video clip.mp4 --void quadmask.mp4 --cfg 1 --steps 30 \\
    --scheduler ddim_origin --prompt "An empty bamboo forest."
  python generate.py --model models/CogVideoX1.5-5B --prompt @panda.txt --output panda.mp4 --overwrite
  python generate.py --check models/CogVideoX1.5-5B --dtype fp16 --scan
  python generate.py --check sat/configs/inference.yaml --fix
  python generate.py --check my_workflow.json --json
  python generate.py --download t2v models
  python generate.py --convert CogVideoX1.5-5B-SAT models/CogVideoX1.5-5B --dtype bf16
  python generate.py --migrate old_workflow.json new_workflow.json

A video of 81 frames, 5 seconds, takes about 16 minutes on an A100 (official figure) and needs a GPU. A run ends with a
verdict on black frames, and a black video is not written (see --on-black). --check ends with status 0 if all is well or
only slower than it could be, and with 3 at a mismatch.
"""
#: Exit status of --check where the checked thing would give a wrong picture.
MISMATCH_STATUS = 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line: what is wrong with the options, without all of them."""
        said = f"error: {short(message, 1000)}\nSee {self.prog} --help for what there is."
        self.exit(2, f"{in_words(said)}\n")


class _LineParser(_Parser):
    def error(self, message: str) -> NoReturn:
        """Refuse an option of one line among many."""
        raise ValueError(short(message, 1000))


class _Help(argparse.RawTextHelpFormatter):
    """The help in the terminal's language: each text translated, and broken into lines as wide as the terminal, in
    Chinese between letters too; examples stay as they are."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, f"{in_words('usage:')} " if prefix is None else prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and in_words(heading))

    def add_text(self, text: str | None) -> None:
        # Lines that begin with a blank are examples; others go on in the next one of their paragraph.
        joined = re.sub(r"(?<=[!-~])\n(?=[!-~])", " ", in_words(text or ""))
        lines = re.sub(r"(?<=[^\n])\n(?=[^ \n])", "", joined).split("\n")
        wide = self._columns() - 2
        broken = [part for line in lines for part in ([line] if line.startswith(" ") else lines_of(line, wide))]
        super().add_text(text and "\n".join(broken))

    def add_argument(self, action: argparse.Action) -> None:
        shown = copy(action)
        if shown.help:
            shown.help = "\n".join(lines_of(in_words(shown.help), self._columns() - 28))
        super().add_argument(shown)

    @staticmethod
    def _columns() -> int:
        return shutil.get_terminal_size().columns


def build_parser(kind: type[argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    """Declare every option, with its help in the terminal's language."""
    parser = kind(
        prog="generate.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=_Help,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--prompt",
        help=(
            "what the video shows, in English, at most 226 tokens; @FILE reads it from a text file, - from the "
            "standard input, @@ stands for an @"
        ),
    )
    what.add_argument(
        "--prompts",
        type=path_of,
        metavar="FILE",
        help=(
            "make many videos: a .txt with a prompt a line, or a .jsonl or .csv with options by name; --output is then "
            "a folder (default: the file's name), where what is there already is not made again"
        ),
    )
    what.add_argument(
        "--negative",
        default="",
        metavar="PROMPT",
        help="what it should not show, given in the same ways (default: empty)",
    )
    what.add_argument(
        "--image",
        "--start-image",
        type=path_of,
        metavar="FILE",
        help="the image the video starts from, for image-to-video and CogVideoX-Fun checkpoints; scaled and cropped",
    )
    what.add_argument(
        "--end-image",
        type=path_of,
        metavar="FILE",
        help="the image it ends with, for CogVideoX-Fun, and with --image for checkpoints fine-tuned for interpolation",
    )
    what.add_argument(
        "--video",
        type=path_of,
        metavar="FILE",
        help="the video to start from, for text-to-video checkpoints; with --seconds to go on from; scaled and cropped",
    )
    what.add_argument(
        "--mask",
        type=path_of,
        metavar="FILE",
        help="of --video: a picture or a clip, white where it is made anew, for CogVideoX-Fun checkpoints",
    )
    what.add_argument(
        "--void",
        type=path_of,
        metavar="QUADMASK",
        help=(
            "of --video: a clip of what to take out of it, for VOID's checkpoints: 0 the object, 127 what it affects, "
            "63 where it covers that, 255 the rest; with --cfg 1 --steps 30 --scheduler ddim_origin"
        ),
    )
    what.add_argument(
        "--noise",
        type=path_of,
        metavar="FILE.latent",
        help="start from this noise in the place of --seed's, as Save Latent wrote it; with --void the second pass",
    )
    what.add_argument(
        "--keep-audio", action="store_true", help="of --video: put its sound into the new video, as long as that is"
    )
    what.add_argument(
        "--strength",
        type=float,
        metavar="SHARE",
        help="of --video: how much is made anew, over 0 to 1 (default: 0.8, as the reference; 1 with --mask, --void)",
    )
    what.add_argument(
        "--width",
        type=_whole,
        metavar="PIXELS",
        help=(
            "a multiple of 16 (default: the model card's, 1360 for 1.5; the image's shape for 1.5-I2V and "
            "CogVideoX-Fun)"
        ),
    )
    what.add_argument(
        "--height",
        type=_whole,
        metavar="PIXELS",
        help=(
            "a multiple of 16 (default: the model card's, 768 for 1.5; the image's shape for 1.5-I2V and CogVideoX-Fun)"
        ),
    )
    what.add_argument(
        "--frames",
        type=_whole,
        metavar="N",
        help=(
            "16N+1: 81 is 5 s, 161 is 10 s (default: 81 for 1.5; of --video without --seconds, all of it up to the "
            "model's longest); 8N+5 for CogVideoX-Fun and VOID (default: 85); 8N+1 for 5b and 2b (default: 49)"
        ),
    )
    what.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=(
            "how long the video is to be, for image-to-video and CogVideoX-Fun checkpoints: in parts of --frames, each "
            "from the end of the one before, the first from --image or the end of --video; the parts are kept beside "
            "--output, and a run that was stopped goes on from them"
        ),
    )
    what.add_argument(
        "--overlap",
        type=_whole,
        metavar="FRAMES",
        help=(
            "of --seconds: frames at the end of what is there with which the next part begins, 4N+1; 1 for "
            "image-to-video checkpoints, which read one image, 5 or 9 for CogVideoX-Fun, which then goes on in the "
            "same movement (default: 1, of CogVideoX-Fun 5)"
        ),
    )
    what.add_argument(
        "--fps",
        type=_rate,
        metavar="RATE",
        help=(
            "frames per second of the video; --video is read at that rate too, so that a second stays a second "
            "(default: as the model was trained, 16 for 1.5, 12 for VOID, 8 for CogVideoX-Fun, 5b and 2b)"
        ),
    )
    what.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="0 to 2**64-1; the same seed and settings give the same video (default: 0)",
    )
    what.add_argument(
        "--output",
        type=path_of,
        metavar="FILE.mp4",
        help="where to write it (default: out.mp4, or the next of out_00002.mp4 … that is free)",
    )
    what.add_argument(
        "--overwrite", action="store_true", help="replace --output if it exists; without, it is refused before the run"
    )
    what.add_argument(
        "--decode",
        type=path_of,
        metavar="FILE.latent",
        help=(
            "make the video of latents that were kept because it could not be written, or that Save Latent wrote; "
            "needs --model for its VAE"
        ),
    )
    how = parser.add_argument_group("how to make it")
    how.add_argument(
        "--model",
        type=path_of,
        metavar="PATH",
        help="a CogVideoX checkpoint: a folder of diffusers or SAT, or a single safetensors or GGUF file",
    )
    how.add_argument(
        "--text-encoder",
        type=path_of,
        metavar="PATH",
        help="a T5-XXL encoder, file or folder (default: the checkpoint's own)",
    )
    how.add_argument(
        "--vae", type=path_of, metavar="PATH", help="a CogVideoX VAE, file or folder (default: the checkpoint's own)"
    )
    how.add_argument(
        "--tokenizer",
        type=path_of,
        metavar="FOLDER",
        help="T5's tokenizer, where neither checkpoint nor text encoder brings one",
    )
    how.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        metavar="PATH[:STRENGTH]",
        help="a LoRA of this model, and how strongly it is applied (default: 1); can be given several times",
    )
    how.add_argument("--steps", type=_whole, default=50, help="denoising steps (default: 50, as the model card)")
    how.add_argument(
        "--cfg", type=float, default=6.0, help="guidance; 1 switches it off (default: 6, as the model card)"
    )
    how.add_argument(
        "--cfg-range",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="shares of the steps between which --cfg acts; the others take half the time (default: 0 1)",
    )
    how.add_argument(
        "--dynamic-cfg",
        action="store_true",
        help="change the guidance along a cosine, as the reference's use_dynamic_cfg",
    )
    how.add_argument("--scheduler", choices=list(SCHEDULERS), default="ddim", help="default: ddim")
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help=(
            "auto: what the weights were trained in where the device has it, else the fastest that gives the same "
            "picture (default)"
        ),
    )
    how.add_argument(
        "--on-mismatch",
        choices=ON_MISMATCH,
        default="fix",
        help=(
            "if the dtype does not suit the weights or the device: run so that the picture is right, run as chosen, "
            "or stop (default: fix)"
        ),
    )
    how.add_argument(
        "--memory",
        choices=MEMORY,
        default="auto",
        help=(
            "where the weights are while they run: all on the GPU, brought to it by blocks or layers (slower, much "
            "less of its memory), or on the CPU (default: the fastest that fits)"
        ),
    )
    how.add_argument(
        "--quantize",
        choices=QUANTIZE,
        metavar="METHOD",
        help=(
            "keep the weights of attention and feed-forward in a byte each: int8_weight_only (any device, nearest to "
            "the original), fp8_weight_only; int8_dynamic and fp8_dynamic multiply in int8 and fp8 too, faster where "
            "the GPU can, and lose more"
        ),
    )
    how.add_argument(
        "--quantize-text-encoder",
        choices=QUANTIZE,
        metavar="METHOD",
        help="the same for T5; with a dynamic method, its weights alone",
    )
    how.add_argument(
        "--on-nan",
        choices=ON_NAN,
        default="heal",
        help=(
            "if something is NaN or Inf on the way: go on from there in a safer precision, or stop and name the "
            "module (default: heal)"
        ),
    )
    how.add_argument(
        "--attention",
        choices=BACKENDS,
        metavar="KERNEL",
        default="auto",
        help=(
            "the kernel of the attention, if this machine has it: "
            f"{', '.join(BACKENDS)}; all but sage and sage_hub give the same picture up to rounding (default: "
            "PyTorch's choice)"
        ),
    )
    how.add_argument(
        "--cache",
        type=_cache,
        metavar="METHOD[:STRENGTH]",
        help=(
            f"reuse what changes little from step to step: {', '.join(CACHES)}, and the share of block evaluations to "
            "skip (default: 0.6); faster, and another video"
        ),
    )
    how.add_argument(
        "--cache-range",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="shares of the steps between which --cache may skip (default: 0.1 0.95)",
    )
    how.add_argument(
        "--compile",
        nargs="?",
        choices=COMPILE_MODES,
        const=COMPILE_DEFAULT,
        help=(
            "compile the transformer's blocks: faster steps, and a first one that takes a minute or two longer "
            "(default mode: default)"
        ),
    )
    how.add_argument(
        "--context-windows",
        type=_windows,
        metavar="FRAMES[:OVERLAP]",
        help=(
            "make a clip of more than FRAMES in windows of FRAMES that share OVERLAP latent frames (default: 4), in "
            "the memory of one: 161 for 1.5; needs --scheduler ddim or ddim_origin"
        ),
    )
    how.add_argument(
        "--split",
        choices=SPLITS,
        default=AUTO,
        help=(
            "under torchrun, what the processes share: the halves of guidance (2 processes), the tokens of the "
            "sequence, both, or the prompts of --prompts; auto: prompts if there are enough, else both (default)"
        ),
    )
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the GPU if there is one)")
    how.add_argument(
        "--on-black",
        choices=ON_BLACK,
        default="stop",
        help="if the video came out black: stop without writing it, warn, or only report (default: stop)",
    )
    how.add_argument("--debug", action="store_true", help="show the traceback of an error too")
    add_options(parser, path_of, _whole)
    add_passes(parser, path_of)
    check = parser.add_argument_group("only check, make nothing")
    check.add_argument(
        "--plan",
        action="store_true",
        help="say how much memory the video would take in each mode of --memory, and stop",
    )
    check.add_argument(
        "--dry-run", action="store_true", help="of --prompts: check all lines, say what would be made, and stop"
    )
    check.add_argument(
        "--check",
        type=path_of,
        metavar="PATH",
        help=(
            "say how a checkpoint folder would run here (with --dtype and --on-mismatch), or whether a SAT "
            "inference.yaml (or its folder) or a ComfyUI workflow JSON would run weights trained in bf16 in fp16"
        ),
    )
    check.add_argument(
        "--scan", action="store_true", help="read every weight too: NaN, Inf, and what an fp16 copy would lose"
    )
    check.add_argument("--fix", action="store_true", help="write the remedy into a SAT inference.yaml, keeping a .bak")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    files = parser.add_argument_group("get and convert checkpoints")
    files.add_argument(
        "--download",
        nargs="+",
        metavar=("t2v|i2v|fun-inp", "DIR"),
        help=(
            "download CogVideoX1.5-5B (t2v), its image-to-video model (i2v) or CogVideoX-Fun-V1.5-5b-InP (fun-inp), 31 "
            "GB, into DIR (default: models); goes on where it stopped"
        ),
    )
    files.add_argument(
        "--convert",
        nargs=2,
        type=path_of,
        metavar=("SRC", "DST"),
        help=(
            "write a checkpoint of any layout as a folder in diffusers layout, or its transformer as one "
            "DST.safetensors; with --dtype, cast"
        ),
    )
    workflows = parser.add_argument_group("bring workflows along")
    workflows.add_argument(
        "--migrate",
        nargs=2,
        type=path_of,
        metavar=("OLD", "NEW.json"),
        help=(
            "write a workflow of ComfyUI-CogVideoXWrapper or of VideoX-Fun's nodes for CogVideoX (text, image or video "
            "to video; saved or exported for the API, or in a picture or video that ComfyUI saved) with this pack's "
            "nodes, by any version of it, and say what could not be carried over; OLD stays as it is"
        ),
    )
    return parser


def _int(text: str) -> int:
    # As pandas writes the whole numbers of a column with gaps.
    return int(re.sub(r"(?<=\d)\.0+$", "", text))


def _whole(text: str) -> int:
    try:
        value = _int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{short(text)}' is not a whole number") from None
    if abs(value) > 1_000_000:
        raise argparse.ArgumentTypeError(f"{short(text)} is more than any machine can make")
    return value


def _seed(text: str) -> int:
    try:
        value = _int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{short(text)}' is not a whole number; seeds go from 0 to 2**64-1 (18446744073709551615)"
        ) from None
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(
            f"{short(text)} is outside 0 to 2**64-1 (18446744073709551615), where seeds are"
        )
    return value


def _rate(text: str) -> Fraction:
    """Frames per second: ``24``, ``23.976`` or ``30000/1001``."""
    try:
        value = Fraction(text) if len(text) < 40 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not 1 <= value <= 240:
        raise argparse.ArgumentTypeError(
            f"'{short(text)}' is no frame rate; give a number from 1 to 240, such as 24, 23.976 or 30000/1001"
        )
    return value.limit_denominator(1001)


def _lora(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:STRENGTH``; a colon can also belong to the path, as in ``C:\\style.safetensors``."""
    path, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return path_of(text), 1.0
    try:
        number = float(strength)
    except ValueError:
        if not os.path.exists(path_of(path)):
            return path_of(text), 1.0
        raise argparse.ArgumentTypeError(
            f"the strength '{short(strength)}' is not a number; after a colon one follows, such as :0.8"
        ) from None
    if not path or not math.isfinite(number):
        what = (
            "no LoRA stands before the colon"
            if not path
            else f"the strength '{short(strength)}' would make every frame black"
        )
        raise argparse.ArgumentTypeError(f"{what}; give PATH:STRENGTH, such as style.safetensors:0.8")
    return path_of(path), number


def _cache(text: str) -> tuple[str, float | None]:
    """``METHOD`` or ``METHOD:STRENGTH``."""
    method, colon, strength = text.partition(":")
    if method not in CACHES:
        raise argparse.ArgumentTypeError(f"'{short(method)}' is not one of {', '.join(CACHES)}")
    try:
        return method, float(strength) if colon else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"the strength '{short(strength)}' is not a number") from None


def _windows(text: str) -> tuple[int, int | None]:
    """``FRAMES`` or ``FRAMES:OVERLAP``."""
    length, colon, overlap = text.partition(":")
    return _whole(length), _whole(overlap) if colon else None


@settings_called(OPTIONS)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; whatever happens ends in a sentence and a status, and in a traceback only with
    ``--debug``."""
    debug = False
    try:
        options, work = _parsed(build_parser(), arguments)
        debug = options.debug
        if not _begun(options, work):
            return 0
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        # Configs and workflows are text, for which no package is needed: they are read in a tenth of a second.
        if work is not migrate and not (work is check and is_config(options.check)):
            from cogvideox.dependencies import require_dependencies

            require_dependencies()
        with _stopped_in_order():
            return work(options)
    except KeyboardInterrupt:
        complain("stopped.")
        return 130
    except BrokenPipeError:
        mute(sys.stdout)
        return 1
    except Exception as error:
        complain(told(error), debug)
        return 1


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Have what a system, or a terminal that is closed, stops programs with do in a ``with`` block what Ctrl+C does, so
    that nothing half written stays. Processes that share a video wait for each other in what only their own end
    ends."""
    before: dict[int, Any] = {}
    if place_of().count == 1 and threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in _STOPS}
        # nohup has a closed terminal ignored.
        before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begun(options: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> bool:
    """Say whether this process has something to do: of several, the first alone does what is no video, and shows what
    it does."""
    makes = work in (generate, make_many)
    if not makes and options.split != AUTO:
        raise ValueError(f"--split {options.split} shares the making of videos. Leave it away.")
    is_first = place_of().is_first
    keep_quiet(not is_first)
    return makes or is_first


def _parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], int]]:
    """The options and what they ask for; options that do not go together end the program with a line about it."""
    options = parser.parse_args(arguments)
    return options, _checked(parser, options)


def _checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """What the options ask for.

    Raises:
        SystemExit: where they do not go together; of a line among many, ValueError.
    """
    asked = [name for name in _WORK if getattr(options, name) is not None]
    if len(asked) > 1:
        parser.error(f"--{asked[0]} and --{asked[1]} are two things to do: give one of them")
    work = _WORK[asked[0]] if asked else generate
    if options.dry_run and work is not make_many:
        parser.error("--dry-run goes with --prompts FILE")
    if work is generate:
        for name in ("prompt", "model"):
            if getattr(options, name) is None and not (options.plan and name == "prompt"):
                parser.error(f"--{name} is required to make a video (or give --check PATH to only check something)")
    elif options.plan and work is not upscale:
        _refuse(parser, "plan", asked[0])
    if work is decode_latent and options.model is None:
        parser.error("--decode needs --model, whose VAE makes the video")
    check_options(parser, options)
    if work is make_many:
        if options.prompt is not None:
            parser.error("--prompts and --prompt are two things to do: give one of them")
    else:
        _check_partners(parser, options)
        check_passes(parser, options)
    for name in ("scan", "fix", "json"):
        if getattr(options, name) and work is not check:
            parser.error(f"--{name} goes with --check PATH")
    if asked and asked[0] in _READ:
        _check_read(parser, options, asked[0])
    return work


def _check_read(parser: argparse.ArgumentParser, options: argparse.Namespace, asked: str) -> None:
    """End the program where an option is given that what is asked for, which is no video, does not read."""
    read = (asked, "debug", "split", *_READ[asked])
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    for name in given:
        if name not in read:
            _refuse(parser, name, asked)
    if options.check is not None and is_config(options.check):
        for name in given:
            if name in _OF_CHECKPOINTS:
                option = name.replace("_", "-")
                parser.error(
                    f"--{option} goes with a checkpoint, and {short(options.check, 400)} is a config: what it runs "
                    "with stands in it"
                )


def _refuse(parser: argparse.ArgumentParser, name: str, asked: str) -> NoReturn:
    """End the program where an option is given of which what is asked for would make nothing."""
    option = name.replace("_", "-")
    parser.error(f"--{option} goes with what makes a video, and not with --{asked}")


def _check_partners(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where an option lacks the one that it goes with, or has one that it excludes."""
    for name, needed in (
        ("strength", "video"),
        ("keep_audio", "video"),
        ("mask", "video"),
        ("void", "video"),
        ("cache_range", "cache"),
        ("overlap", "seconds"),
    ):
        given = getattr(options, name)
        # Zero is given, too.
        if given is not None and given is not False and getattr(options, needed) is None:
            parser.error(f"--{name.replace('_', '-')} goes with --{needed}")
    if options.seconds is not None and options.end_image is not None:
        parser.error("--seconds makes many parts and --end-image is the end of one: give one of them")
    if options.seconds is not None and options.noise is not None:
        parser.error("--seconds makes many parts and --noise is the noise of one: give one of them")
    for name in ("mask", "void", "strength"):
        if options.seconds is not None and getattr(options, name) is not None:
            parser.error(f"--seconds goes on from --video and --{name} changes what is there: give one of them")
    for name in ("image", "end_image"):
        if options.video is not None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} and --video are two things that a video is made of: give one")
    if options.mask is not None and options.void is not None:
        parser.error("--mask is for CogVideoX-Fun checkpoints and --void for VOID's: give one of them")
    if options.prompt == options.negative == "-":
        parser.error(
            "--prompt and --negative cannot both be read from the standard input: give one of them as a file, @FILE"
        )


def generate(options: argparse.Namespace) -> int:
    """Run one generation; prints the dtype report before, progress bars, and the black-frame verdict after."""
    place = placed(options)
    if options.split == PROMPTS:
        raise ValueError("--split prompts shares the lines of --prompts, and this is one video. Take another --split.")
    if options.stage == BOTH:
        return make_both(options, place)
    with company(options, place) as ranks:
        events = terminal_events()
        job = prepared(options, events, open_handles_of, writes=place.is_first)
        if options.plan:
            say_plan(job, place)
        say_skips(job)
        if options.plan:
            return 0
        if ranks is not None:
            split = check_team(job, place)
            say(f"{place.count} processes share {split.text}.")
            ranks.meet()
        prompts = {name: once_for_all(ranks, partial(encoded, job, name, events)) for name in job.read}
        if job.parts is not None:
            make_chain(job, job.parts, partial(sampled, job, prompts, events))
            return 0
        latent = sampled(job, prompts, events, ranks)
        if place.is_first:
            finish_job(job, latent)
    return 0


def make_many(options: argparse.Namespace) -> int:
    """Make the videos of ``--prompts``; prints what became of each line."""
    from commands.many import Many, options_by_line, read_lines, summary
    from commands.ranks import shares

    place = placed(options)
    if options.dry_run and not place.is_first:
        return 0
    lines = read_lines(options.prompts)
    folder = _folder_of(options)
    parser = build_parser(_LineParser)
    common = copy(options)
    common.prompts, common.dry_run = None, False

    def parse(words: list[str], found: argparse.Namespace) -> argparse.Namespace:
        parser.parse_args(words, found)
        _checked(parser, found)
        return found

    work = Work(terminal_events(), place)
    many = Many(options_by_line(lines, common, parse, folder), work)
    if options.dry_run:
        with _tried(folder):
            return many.list()
    with company(options, place) as ranks:
        folder.mkdir(exist_ok=True)
        if ranks is None:
            there, made, failed = many.run()
            say(summary(there, made, failed))
            return int(bool(failed))

        def existing(found: Sequence[int]) -> list[int]:
            return sorted(set().union(*ranks.gathered(list(found))))

        def shared(pending: Sequence[int]) -> list[int]:
            ranks.meet()
            apart = options.split == PROMPTS or (options.split == AUTO and len(pending) >= place.count)
            work.ranks = None if apart else ranks
            work.writes = apart or place.is_first
            if apart:
                say(f"{place.count} processes share {len(pending)} videos.")
            return shares(pending, place) if apart else list(pending)

        many.existing, many.shared = existing, shared
        there, made, failed = many.run()
        # Of videos that they made together, the first wrote all.
        ended = ranks.gathered((made, failed))[: None if work.ranks is None else 1]
        made, failed = (
            sum(count for count, _ in ended),
            {line: said for _, some in ended for line, said in some.items()},
        )
        say(summary(there, made, failed))
        return int(bool(failed))


def _folder_of(options: argparse.Namespace) -> Path:
    """The folder where ``--prompts`` puts its videos.

    Raises:
        ValueError: for one that is none, or in a folder that is not there.
    """
    folder = options.output or Path(options.prompts.stem)
    if (folder.exists() and not folder.is_dir()) or folder.suffix.lower() == ".mp4":
        raise ValueError(
            f"--output is {short(folder, 400)}, and with --prompts it is the folder of all videos. Give a name of one."
        )
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"The folder {short(folder.absolute().parent, 400)} does not exist. Make it, or give another.")
    return folder


@contextmanager
def _tried(folder: Path) -> Iterator[None]:
    """Have a folder in a ``with`` block, in which it can be tried whether videos can be written."""
    is_new = not folder.is_dir()
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def decode_latent(options: argparse.Namespace) -> int:
    """Make the video of latents that are in a file."""
    from cogvideox.geometry import check_latent
    from cogvideox.precision.hardware import Hardware
    from cogvideox.video import check_room, read_latent, read_sound

    output = output_of(options)
    hardware = Hardware.detect(options.device)
    latent = read_latent(options.decode)
    check_latent(latent)
    handles = open_handles_of(options, hardware)
    say(handles.plan.text)
    frames, height, width = (side * factor for side, factor in zip(latent.shape[2:], (4, 8, 8), strict=True))
    check_room(output, frames, width, height)
    fps, sound = rate_of(options, handles.model.variant), None
    if options.keep_audio:
        sound = read_sound(options.video, float(frames / fps), terminal_events())
    finish(options, handles.vae, latent, output, fps, sound)
    return 0


def upscale(options: argparse.Namespace) -> int:
    """Make a video larger."""
    from cogvideox.precision.hardware import Hardware
    from commands.upscale import describe, enlarge, read_request

    output, events = output_of(options), terminal_events()
    handles = open_handles_of(options, Hardware.detect(options.device))
    say(handles.plan.text)
    model, text_encoder = changed(options, handles)
    request = read_request(options, model, output, events)
    if options.plan:
        say(describe(options, request, model))
        return 0
    with latents_kept(output):
        images = enlarge(options, request, model, text_encoder, handles.vae, events)
    judge(options, images)
    write_somewhere(options, images, output, request.fps, request.sound)
    return 0


def check(options: argparse.Namespace) -> int:
    """Check a checkpoint, a SAT config or a workflow; prints the report."""
    from cogvideox.precision.verdict import MISMATCH

    backup, incomplete = None, list[str]()
    loras: list[Lora] = []
    report: ConfigReport | DtypePlan
    if is_config(options.check):
        # Nothing that imports torch: a config is text.
        from interop.check import check_config, fix_config

        if options.scan:
            raise ValueError(
                f"{options.check} is a config and holds no weights to scan. Give --scan with a checkpoint's folder."
            )
        report, backup = fix_config(options.check) if options.fix else (check_config(options.check), None)
    else:
        # What is not there is refused by name, as it is without --fix.
        if options.fix and Path(options.check).expanduser().exists():
            raise ValueError(
                f"{options.check} is not a SAT config, and --fix rewrites only those. For a checkpoint choose another "
                "--dtype."
            )
        from cogvideox.checkpoint.layout import open_checkpoint
        from cogvideox.lora import open_lora
        from cogvideox.precision.hardware import Hardware
        from cogvideox.precision.policy import plan_dtypes, scan_parts

        checkpoint = open_checkpoint(options.check, options.text_encoder, options.vae, options.tokenizer)
        loras = [open_lora(path, checkpoint.part("transformer"), strength) for path, strength in options.lora]
        incomplete = list(checkpoint.incomplete.values())
        report = plan = plan_dtypes(checkpoint, options.dtype, Hardware.detect(options.device), options.on_mismatch)
        if options.scan:
            report = scan_parts(checkpoint, plan, on_progress=terminal_events().counter("reading weights", "B"))
    say(json.dumps(report.as_dict(), indent=2) if options.json else report.text, is_data=options.json)
    for lora in loras if not options.json else ():
        say(lora.text)
    if backup is not None and not options.json:
        say(f"written; the file as it was is {backup}")
    if incomplete:
        raise ValueError("\n".join(incomplete))
    return MISMATCH_STATUS if report.verdict == MISMATCH else 0


def download(options: argparse.Namespace) -> int:
    """Download a checkpoint; prints where it is."""
    from cogvideox.checkpoint.download import download_checkpoint

    which, *folder = options.download
    if len(folder) > 1:
        raise ValueError(
            f"--download takes what to download and at most one folder, but {len(folder)} were given. Quote a folder "
            "with spaces."
        )
    told = terminal_events().counter("downloading", "B")
    say(f"complete: {download_checkpoint(which, path_of(*folder or ['models']), on_progress=told)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint; prints what was written and what a cast lost."""
    from cogvideox.checkpoint.convert import convert_checkpoint
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.precision.policy import CHOICES

    source, destination = options.convert
    if options.lora:
        raise ValueError(
            "--lora is given with --convert, which copies the weights as they are: no LoRA is merged into them. Leave "
            "it away, and give the LoRA with the copy when it runs."
        )
    checkpoint = open_checkpoint(source, options.text_encoder, options.vae, options.tokenizer)
    told = terminal_events().counter("converting", "B")
    say(convert_checkpoint(checkpoint, destination, CHOICES[options.dtype], on_progress=told).text)
    return 0


def migrate(options: argparse.Namespace) -> int:
    """Migrate a workflow; prints what became of it."""
    from interop.migrate import migrate_workflow

    source, target = options.migrate
    say(migrate_workflow(source, target, preferred()).text)
    return 0


#: What --check reads of a checkpoint, and not of a config.
_OF_CHECKPOINTS = ("dtype", "on_mismatch", "device", "lora", "text_encoder", "vae", "tokenizer")
#: What is no video, and the options that it reads.
_READ = {
    "check": (*_OF_CHECKPOINTS, "scan", "fix", "json"),
    "convert": ("dtype", "lora", "text_encoder", "vae", "tokenizer"),
    "download": (),
    "migrate": (),
}
_WORK = {
    "prompts": make_many,
    "check": check,
    "download": download,
    "convert": convert,
    "migrate": migrate,
    "decode": decode_latent,
    "upscale": upscale,
}


if __name__ == "__main__":
    # A console or a file in an old encoding, as on Windows, has not every sign of a report or a path: it gets \u2192
    # for an arrow, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
