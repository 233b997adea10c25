"""Make a video from a prompt, an image or a video with CogVideoX-1.5, without ComfyUI: the same engine as the nodes.

Or make many, inpaint one, take objects out of it or make it larger; check what a checkpoint or config would do,
download or convert one, or migrate a workflow of ComfyUI-CogVideoXWrapper to this pack. It is started as it lies in the
pack's folder.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
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
from cogvideox.files import read_bytes
from cogvideox.languages import ENGLISH, preferred, translate
from cogvideox.words import reason, short
from commands.ranks import AUTO, PROMPTS, SPLITS, FailedAlike, FailedAlone, Place, place_of
from commands.upscale import add_options, check_options, files_read

if TYPE_CHECKING:
    import torch

    from cogvideox.events import Events
    from cogvideox.handles import Handles, Model, TextEncoder
    from cogvideox.modules.sharded import Split
    from cogvideox.precision.hardware import Hardware
    from cogvideox.precision.policy import DtypePlan
    from cogvideox.variants import Variant
    from commands.chain import Parts
    from commands.ranks import Ranks
    from interop.report import ConfigReport

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
#: Where a video goes that is given no name; the next free number is added where it is taken.
DEFAULT_OUTPUT = Path("out.mp4")
#: Bytes of a prompt's file: 226 tokens have about 1,000.
MAX_PROMPT = 1 << 20
#: What was printed already, where no line is to be printed twice.
_said: set[str] | None = None
#: Whether this is not the first of several processes: it prints errors alone.
_quiet = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line: what is wrong with the options, without all of them."""
        said = f"error: {short(message, 1000)}\nSee {self.prog} --help for what there is."
        self.exit(2, f"{_in_words(said)}\n")


class _LineParser(_Parser):
    def error(self, message: str) -> NoReturn:
        """Refuse an option of one line among many."""
        raise ValueError(short(message, 1000))


class _Help(argparse.RawTextHelpFormatter):
    """The help in the terminal's language, where that is not English: each text translated, and lines broken between
    its wide letters."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, f"{_in_words('usage:')} " if prefix is None else prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(heading and _in_words(heading))

    def add_text(self, text: str | None) -> None:
        super().add_text(text and _in_words(text))

    def add_argument(self, action: argparse.Action) -> None:
        shown = copy(action)
        if shown.help:
            shown.help = "\n".join(_lines(_in_words(shown.help), shutil.get_terminal_size().columns - 28))
        super().add_argument(shown)


def _in_words(text: str) -> str:
    """Say a finished English text in the terminal's language."""
    return translate(text, preferred())


def _lines(text: str, width: int) -> Iterator[str]:
    """Break a text into lines of at most ``width`` columns: between words, and between letters two columns wide, but
    for signs that end what is before them."""
    line, columns = "", 0
    for piece in re.findall(r"[!-~]+[，。；：、）]*| +|.[，。；：、）]*", text):
        size = sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in piece)
        if line and columns + size > max(width, 20):
            yield line.rstrip()
            line, columns, piece = "", 0, piece.lstrip()
        line, columns = line + piece, columns + size
    yield line


def build_parser(kind: type[argparse.ArgumentParser] = _Parser) -> argparse.ArgumentParser:
    parser = kind(
        prog="generate.py",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter if preferred() == ENGLISH else _Help,
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
        type=_path,
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
        type=_path,
        metavar="FILE",
        help="the image the video starts from, for image-to-video and CogVideoX-Fun checkpoints; scaled and cropped",
    )
    what.add_argument(
        "--end-image",
        type=_path,
        metavar="FILE",
        help="the image it ends with, for CogVideoX-Fun and checkpoints fine-tuned for interpolation",
    )
    what.add_argument(
        "--video",
        type=_path,
        metavar="FILE",
        help="the video to start from, for text-to-video checkpoints; scaled and cropped",
    )
    what.add_argument(
        "--mask",
        type=_path,
        metavar="FILE",
        help="of --video: a picture or a clip, white where it is made anew, for CogVideoX-Fun checkpoints",
    )
    what.add_argument(
        "--void",
        type=_path,
        metavar="QUADMASK",
        help=(
            "of --video: a clip of what to take out of it, for VOID's checkpoints: 0 the object, 127 what it affects, "
            "63 where it covers that, 255 the rest; with --cfg 1 --steps 30 --scheduler ddim_origin"
        ),
    )
    what.add_argument(
        "--noise",
        type=_path,
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
        help="a multiple of 16 (default: the model card's, 1360 for 1.5; --image's shape for I2V)",
    )
    what.add_argument(
        "--height",
        type=_whole,
        metavar="PIXELS",
        help="a multiple of 16 (default: the model card's, 768 for 1.5; --image's shape for I2V)",
    )
    what.add_argument(
        "--frames",
        type=_whole,
        metavar="N",
        help=(
            "16N+1: 81 is 5 s, 161 is 10 s (default: 81 for 1.5; with --video, all of it up to the model's longest); "
            "8N+5 for CogVideoX-Fun and VOID (default: 85)"
        ),
    )
    what.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=(
            "with --image, how long the video is to be: in parts of --frames, each from the last frame of the one "
            "before; the parts are kept beside --output, and a run that was stopped goes on from them"
        ),
    )
    what.add_argument(
        "--fps",
        type=_rate,
        metavar="RATE",
        help=(
            "frames per second of the video; --video is read at that rate too, so that a second stays a second "
            "(default: as the model was trained, 16 for 1.5 and 8 for 5b and 2b)"
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
        type=_path,
        metavar="FILE.mp4",
        help="where to write it (default: out.mp4, or the next of out_00002.mp4 … that is free)",
    )
    what.add_argument(
        "--overwrite", action="store_true", help="replace --output if it exists; without, it is refused before the run"
    )
    what.add_argument(
        "--decode",
        type=_path,
        metavar="FILE.latent",
        help=(
            "make the video of latents that were kept because it could not be written, or that Save Latent wrote; "
            "needs --model for its VAE"
        ),
    )
    how = parser.add_argument_group("how to make it")
    how.add_argument(
        "--model",
        type=_path,
        metavar="PATH",
        help="a CogVideoX checkpoint: a folder of diffusers or SAT, or a single safetensors file",
    )
    how.add_argument(
        "--text-encoder",
        type=_path,
        metavar="PATH",
        help="a T5-XXL encoder, file or folder (default: the checkpoint's own)",
    )
    how.add_argument(
        "--vae", type=_path, metavar="PATH", help="a CogVideoX VAE, file or folder (default: the checkpoint's own)"
    )
    how.add_argument(
        "--tokenizer",
        type=_path,
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
            f"{', '.join(BACKENDS)}; all but sage give the same picture up to rounding (default: PyTorch's choice)"
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
            "the memory of one: 161 for 1.5; needs --scheduler ddim"
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
    add_options(parser, _path, _whole)
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
        type=_path,
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
        type=_path,
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
        type=_path,
        metavar=("OLD.json", "NEW.json"),
        help=(
            "write a workflow of ComfyUI-CogVideoXWrapper (text, image or video to video; saved or exported for the "
            "API) with this pack's nodes, by any version of it, and say what could not be carried over; OLD.json "
            "stays as it is"
        ),
    )
    return parser


def _path(text: str) -> Path:
    """A path as people give it: quotes that the shell left around it are taken off, ``~`` is the home folder."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and not os.path.lexists(text):
        text = text[1:-1]
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(
            f"'{short(text)}' is no path: it is empty, or holds a letter that no path may have"
        )
    if text.lower().startswith(("http://", "https://", "ftp://", "s3://", "hf://")):
        raise argparse.ArgumentTypeError(
            f"{short(text, 200)} is an address on the web, and only files on this machine are read: download it first"
        )
    with suppress(RuntimeError):  # A user that is not there: the name as it is, which is then not found.
        return Path(text).expanduser()
    return Path(text)


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{short(text)}' is not a whole number") from None
    if abs(value) > 1_000_000:
        raise argparse.ArgumentTypeError(f"{short(text)} is more than any machine can make")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
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
        return _path(text), 1.0
    try:
        number = float(strength)
    except ValueError:
        if not os.path.exists(_path(path)):
            return _path(text), 1.0
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
    return _path(path), number


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
        if work is not migrate and not (work is check and _is_config(options.check)):
            from cogvideox.dependencies import require_dependencies

            require_dependencies()
        return work(options)
    except KeyboardInterrupt:
        _complain("stopped.")
        return 130
    except BrokenPipeError:
        _mute(sys.stdout)
        return 1
    except Exception as error:
        _complain(_told(error), debug)
        return 1


def _begun(options: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> bool:
    """Say whether this process has something to do: of several, the first alone does what is no video, and shows what
    it does."""
    global _quiet
    makes = work in (generate, make_many)
    if not makes and options.split != AUTO:
        raise ValueError(f"--split {options.split} shares the making of videos. Leave it away.")
    _quiet = not place_of().is_first
    return makes or not _quiet


def _told(error: BaseException) -> str:
    """Say in a sentence what ended a run."""
    if isinstance(error, ValueError | RuntimeError):
        return f"error: {error}" if str(error) else f"error: {type(error).__name__}"
    if isinstance(error, MemoryError):
        return (
            f"error: this machine ran out of memory ({reason(error)}). Close other programs, or make the video "
            "smaller or shorter."
        )
    if isinstance(error, OSError):
        what = (
            f"{short(error.filename, 400)} cannot be read or written"
            if error.filename
            else "Something cannot be read or written"
        )
        return f"error: {what} ({reason(error)}). Check that it is there, your rights, and that the disk is not full."
    # Whatever nobody thought of: a person sees where it is if they want to.
    return (
        f"error: something failed in a way that this program does not know ({type(error).__name__}: "
        f"{reason(error)}). Run it again with --debug to see where, and report that."
    )


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
        parser.error(f"--plan goes with what makes a video, and not with --{asked[0]}")
    if work is decode_latent and options.model is None:
        parser.error("--decode needs --model, whose VAE makes the video")
    check_options(parser, options)
    if work is make_many:
        if options.prompt is not None:
            parser.error("--prompts and --prompt are two things to do: give one of them")
    else:
        _check_partners(parser, options)
    for name in ("scan", "fix", "json"):
        if getattr(options, name) and work is not check:
            parser.error(f"--{name} goes with --check PATH")
    return work


def _check_partners(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where an option lacks the one that it goes with, or has one that it excludes."""
    for name, needed in (
        ("strength", "video"),
        ("keep_audio", "video"),
        ("end_image", "image"),
        ("mask", "video"),
        ("void", "video"),
        ("cache_range", "cache"),
        ("seconds", "image"),
    ):
        if getattr(options, name) not in (None, False) and getattr(options, needed) is None:
            parser.error(f"--{name.replace('_', '-')} goes with --{needed}")
    if options.seconds is not None and options.end_image is not None:
        parser.error("--seconds makes many parts and --end-image is the end of one: give one of them")
    if options.image is not None and options.video is not None:
        parser.error("--image is for image-to-video checkpoints and --video for text-to-video ones: give one of them")
    if options.mask is not None and options.void is not None:
        parser.error("--mask is for CogVideoX-Fun checkpoints and --void for VOID's: give one of them")
    if options.prompt == options.negative == "-":
        parser.error(
            "--prompt and --negative cannot both be read from the standard input: give one of them as a file, @FILE"
        )


def _say(text: str, is_data: bool = False) -> None:
    """Print a line, in the terminal's language unless it is for a program. Where nobody reads any more (``| head``),
    the run goes on without."""
    if _quiet or (_said is not None and text in _said):
        return
    if _said is not None:
        _said.add(text)
    try:
        print(_printable(text if is_data else _in_words(text)), flush=True)
    except BrokenPipeError:
        _mute(sys.stdout)


@contextmanager
def _each_once(said: set[str]) -> Iterator[None]:
    """Have lines that are in ``said``, or were printed before in a ``with`` block, not printed."""
    global _said
    before, _said = _said, said
    try:
        yield
    finally:
        _said = before


def _complain(text: str, debug: bool = False) -> None:
    with suppress(BrokenPipeError):
        if debug:
            traceback.print_exc()
        print(_printable(_in_words(text)), file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """A text whose names of files are no UTF-8, with those bytes escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _mute(stream) -> None:
    """Let a closed pipe's stream end nowhere, so that nothing fails on it again, at exit neither."""
    with open(os.devnull, "w", encoding="utf-8") as null, suppress(OSError, ValueError):
        os.dup2(null.fileno(), stream.fileno())


def _prompt(given: str, name: str) -> str:
    """A prompt as it was given, or from where it says: ``@FILE``, ``-``; ``@@`` begins one with an @.

    Raises:
        ValueError: if it cannot be read, or is no text in UTF-8 (UTF-16 with its mark is read too).
    """
    if given.startswith("@@"):
        given = given[1:]
    elif given == "-" or given.startswith("@"):
        source = "the standard input" if given == "-" else short(given[1:], 400)
        if given == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_PROMPT + 1)
            if len(data) > MAX_PROMPT:
                raise ValueError(
                    f"The {name} from {source} has more than {MAX_PROMPT:,} bytes, and the model reads about 1,000: "
                    "it is something else."
                )
        else:
            try:
                data = read_bytes(_path(given[1:]), MAX_PROMPT)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(
                    f"The {name} is to be read from a file, as it begins with @: {error} One that begins so itself is "
                    "given with @@."
                ) from error
        try:
            given = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The {name} from {source} is not text in UTF-8 ({reason(error)}), so its words are not known. Save "
                "it as UTF-8."
            ) from error
    if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in given):
        raise ValueError(
            f"The {name} ({short(given)}) holds bytes that are no text in UTF-8, so its words are not known: the "
            "terminal or the file is in another encoding. Set the terminal to UTF-8, or save it as UTF-8 and give it "
            "as @FILE."
        )
    return given


@dataclass
class _Job:
    """A video that is checked, and of which nothing is made yet: no weights are read.

    Attributes:
        latent: an empty one of its size and length.
        parts: of a video that is made in several, each as long as ``latent``.
        noise: what it starts from, if it is given.
        is_conditioned: whether the model reads more than the noise.
    """

    options: argparse.Namespace
    output: Path
    denoise: float
    texts: dict[str, str]
    handles: "Handles"
    model: "Model"
    text_encoder: "TextEncoder"
    source: "_Source"
    latent: "torch.Tensor"
    parts: "Parts | None" = None
    noise: "torch.Tensor | None" = None
    is_conditioned: bool = False

    @property
    def size(self) -> str:
        """Size and length, in words."""
        return f"{self.source.width}x{self.source.height}, {self.source.frames} frames"


def generate(options: argparse.Namespace) -> int:
    """Run one generation; prints the dtype report before, progress bars, and the black-frame verdict after."""
    place = _placed(options)
    if options.split == PROMPTS:
        raise ValueError("--split prompts shares the lines of --prompts, and this is one video. Take another --split.")
    with _company(options, place) as ranks:
        events = _events()
        job = _prepared(options, events, _open, writes=place.is_first)
        if options.plan:
            _say_plan(job, place)
        _say_skips(job)
        if options.plan:
            return 0
        if ranks is not None:
            split = _check_team(job, place)
            _say(f"{place.count} processes share {split.text}.")
            ranks.meet()
        prompts = {name: _same(ranks, partial(_encoded, job, name, events)) for name in ("prompt", "negative")}
        if job.parts is not None:
            _chain(job, job.parts, partial(_sampled, job, prompts, events))
            return 0
        latent = _sampled(job, prompts, events, ranks)
        if place.is_first:
            with _latents_kept(options, job.output, latent):
                _finish(options, job.handles.vae, latent, job.output, job.source.fps, job.source.sound)
    return 0


def _placed(options: argparse.Namespace) -> Place:
    """Find which process this is, and give it a card of its own."""
    from commands.ranks import check_alone, device_of

    place = place_of()
    check_alone(options.split, place)
    if not options.plan:
        options.device = device_of(options.device, place)
    return place


@contextmanager
def _company(options: argparse.Namespace, place: Place) -> "Iterator[Ranks | None]":
    """Join the other processes, if there are any, and something is to be made."""
    if place.count == 1 or options.plan or options.dry_run:
        yield None
        return
    from cogvideox.precision.hardware import Hardware
    from commands.ranks import joined

    with joined(place, Hardware.detect(options.device).device) as ranks:
        yield ranks


def _same(ranks: "Ranks | None", work: "Callable[[], torch.Tensor]") -> "torch.Tensor":
    """Do something where one process does it for all."""
    return work() if ranks is None else ranks.same(work)


def _check_team(job: _Job, place: Place) -> "Split":
    """Choose how the processes share a video, and refuse what cannot be shared."""
    from cogvideox.requests import check_split
    from cogvideox.variants import full_config
    from commands.ranks import choose_split

    options, heads = job.options, full_config(job.model.weights.config)["num_attention_heads"]
    split = choose_split(options.split, place.count, options.cfg > 1, heads)
    check_split(job.model, split, job.latent.shape)
    return split


def make_many(options: argparse.Namespace) -> int:
    """Make the videos of ``--prompts``; prints what became of each line."""
    from commands.many import Many, of_line, options_of, read_lines, summary
    from commands.ranks import shares

    place = _placed(options)
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

    found, wrong = dict[int, argparse.Namespace](), list[str]()
    for line in lines:
        try:
            found[line.number] = options_of(line, common, parse, folder)
        except ValueError as error:
            wrong.append(of_line(line.number, str(error)))
    if wrong:
        shown = "\n".join(wrong[:20])
        raise ValueError(
            f"{len(wrong)} of {len(lines)} lines cannot be read, so nothing was begun. Correct them:\n{shown}"
        )
    work = _Work(_events(), place)
    many = Many(found, work)
    if options.dry_run:
        work.writes = folder.is_dir()
        return many.list()
    with _company(options, place) as ranks:
        folder.mkdir(exist_ok=True)
        if ranks is None:
            there, made, failed = many.run()
            _say(summary(there, made, failed))
            return int(bool(failed))

        def existing(found: Sequence[int]) -> list[int]:
            return sorted(set().union(*ranks.gathered(list(found))))

        def shared(pending: Sequence[int]) -> list[int]:
            apart = options.split == PROMPTS or (options.split == AUTO and len(pending) >= place.count)
            work.ranks = None if apart else ranks
            if apart:
                _say(f"{place.count} processes share {len(pending)} videos.")
            return shares(pending, place) if apart else list(pending)

        many.existing, many.shared = existing, shared
        there, made, failed = many.run()
        # Of videos that they made together, the first wrote all.
        ended = ranks.gathered((made, failed))[: None if work.ranks is None else 1]
        made, failed = (
            sum(count for count, _ in ended),
            {line: said for _, some in ended for line, said in some.items()},
        )
        _say(summary(there, made, failed))
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


class _Work:
    """One video after the other, with checkpoints that stay open from one to the next."""

    ends_all: tuple[type[Exception], ...] = (BrokenPipeError, FailedAlone)

    def __init__(self, events: "Events", place: Place):
        self._events, self._place = events, place
        #: The processes that make each video together, if any do.
        self.ranks: Ranks | None = None
        #: Whether there is a folder for the videos: a dry run makes none.
        self.writes = True
        self._open: dict[tuple, Handles] = {}
        # Weights live as long as a handle has them.
        self._handles: list[Any] = []
        self._said = set[str]()

    def say(self, text: str) -> None:
        _say(text)

    def told(self, error: BaseException) -> str:
        return _told(error)

    def prepared(self, options: argparse.Namespace) -> _Job:
        # It is asked again before the video is made; what it says is said once for all lines.
        with _each_once(self._said):
            job = _prepared(options, self._events, self._opened, self.writes)
        if job.parts is not None:
            raise ValueError(
                "--seconds makes one long video in parts, and --prompts makes many videos. Leave --seconds out, or "
                "make the long video by itself."
            )
        self._handles += [job.model, job.text_encoder]
        return job

    def _opened(self, options: argparse.Namespace, hardware: "Hardware") -> "Handles":
        names = ("model", "text_encoder", "vae", "tokenizer", "dtype", "on_mismatch", "memory")
        key = tuple(getattr(options, name) for name in names)
        if key not in self._open:
            self._open[key] = _open(options, hardware)
        return self._open[key]

    def encoded(self, job: _Job, name: str) -> "torch.Tensor":
        return _same(self.ranks, partial(_encoded, job, name, self._events))

    def sampled(self, job: _Job, prompts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        _say_skips(job)
        from cogvideox.sentinel import NonFiniteError

        try:
            return _sampled(job, prompts, self._events, self.ranks)
        except (ValueError, NonFiniteError, FailedAlike):
            raise
        except Exception as error:
            if self.ranks is None:
                raise
            raise FailedAlone(str(error) or type(error).__name__) from error

    def finished(self, job: _Job, latent: "torch.Tensor") -> None:
        if self.ranks is not None and not self._place.is_first:
            return
        with _latents_kept(job.options, job.output, latent):
            _finish(job.options, job.handles.vae, latent, job.output, job.source.fps, job.source.sound)

    def kept(self, job: _Job, latent: "torch.Tensor") -> str:
        from cogvideox.video import write_latent

        path = write_latent(latent, job.output.absolute().parent, job.output.stem[:100])
        return f"{path} has the latents of {job.output}; --decode makes the video of them."

    def decodes_later(self, job: _Job) -> bool:
        return job.model.weights.is_stuck


def _prepared(
    options: argparse.Namespace,
    events: "Events",
    opened: "Callable[[argparse.Namespace, Hardware], Handles]",
    writes: bool = True,
) -> _Job:
    """Check all that can be wrong with a video before any weights are read, the cheapest first.

    Args:
        opened: opens the checkpoint.
        writes: whether this process is to write the video.
    """

    from cogvideox.geometry import empty_latent
    from cogvideox.precision.hardware import Hardware
    from cogvideox.requests import check_noise, plan_steps
    from commands.inpaint import foresee_conditioning, read_noise

    denoise = _check_settings(options)
    output = _output(options) if writes else options.output or DEFAULT_OUTPUT
    texts = _texts(options)
    handles = opened(options, Hardware.detect(options.device))
    _say(handles.plan.text)
    model, text_encoder = _changed(options, handles)
    source = _source(options, model.variant, output if writes else None, events)
    parts = None if options.seconds is None else _parts(options, source, output if writes else None)
    lengths = model.variant.frame_step, model.variant.in_pairs
    latent = empty_latent(source.width, source.height, source.frames, 1, *lengths)
    # Shapes are enough to know the rest.
    image, noise = foresee_conditioning(options, model.variant, latent), read_noise(options)
    if noise is not None:
        check_noise(noise, latent)
    plan_steps(model, latent, image, steps=options.steps, scheduler=options.scheduler, denoise=denoise)
    is_conditioned = image is not None
    return _Job(
        options, output, denoise, texts, handles, model, text_encoder, source, latent, parts, noise, is_conditioned
    )


def _say_plan(job: _Job, place: Place) -> None:
    """Say what a video takes, and how much faster several cards are."""
    from cogvideox.memory import memory_text
    from cogvideox.sharing import expected_gain

    shape, guided = tuple(job.latent.shape), job.options.cfg > 1
    if place.count == 1:
        _say(memory_text(job.model, shape, guided))
        return
    split = _check_team(job, place)
    _say(f"each card: {memory_text(job.model, shape, guided and split.guidance == 1, split.sequence)}")
    _say(expected_gain(job.model, shape, split, guided, job.model.weights.hardware.name).text)


def _say_skips(job: _Job) -> None:
    """Say which steps TeaCache skips."""
    from cogvideox.skips import skips_text

    options = job.options
    skips = skips_text(job.model, options.steps, options.scheduler, job.denoise)
    if skips is not None:
        _say(skips)


def _encoded(job: _Job, name: str, events: "Events") -> "torch.Tensor":
    """Encode the prompt, or the negative one: ``[1, tokens, width]``."""
    from cogvideox.text import encode_prompt

    weights = job.text_encoder.weights
    if weights.method is not None and not weights.is_loaded:
        _say(weights.quantization_text(events))
    encoded = encode_prompt(job.text_encoder, job.texts[name], on_nan=job.options.on_nan, events=events)
    for note in encoded.notes:
        _say(f"{name}: {note}")
    return encoded.embeddings


def _sampled(
    job: _Job,
    prompts: "Mapping[str, torch.Tensor]",
    events: "Events",
    ranks: "Ranks | None" = None,
    start: "torch.Tensor | None" = None,
    seed: int | None = None,
) -> "torch.Tensor":
    """Make a video's latents ``[1, 16, T, H/8, W/8]``, together with other processes if there are any.

    Args:
        start, seed: of a part of a longer video, in the place of the video's own.
    """
    from cogvideox.pictures import fit_size
    from cogvideox.sampling import sample
    from cogvideox.vae import encode, image_latents
    from commands.inpaint import make_conditioning

    options, source, latent, image = job.options, job.source, job.latent, None
    if job.model.weights.method is not None and not job.model.weights.is_loaded:
        _say(job.model.weights.quantization_text(events))
    how: dict[str, Any] = dict(on_nan=options.on_nan, events=events)
    pictures = [
        None if picture is None else fit_size(picture, source.width, source.height)
        for picture in (source.start if start is None else start, source.end)
    ]
    clip, source.clip = source.clip, None
    if pictures[0] is not None and job.model.variant.image_to_video:
        first, last = pictures[0], pictures[1]
        image = _same(ranks, lambda: image_latents(job.handles.vae, first, source.frames, last, **how))
    elif job.is_conditioned:
        size = source.width, source.height
        image = _same(
            ranks,
            lambda: make_conditioning(
                options, job.handles.vae, clip, source.frames, size, (pictures[0], pictures[1]), source.mask, **how
            ),
        )
    if clip is not None and job.denoise < 1:
        latent = _same(ranks, lambda: encode(job.handles.vae, clip, **how))
    team = None if ranks is None else ranks.team(_check_team(job, ranks.place))
    with _latents_kept(options, job.output) if ranks is None or ranks.place.is_first else nullcontext():
        return sample(
            job.model,
            prompts["prompt"],
            prompts["negative"],
            latent,
            image_latents=image,
            noise=job.noise,
            denoise=job.denoise,
            seed=options.seed if seed is None else seed,
            steps=options.steps,
            cfg=options.cfg,
            scheduler=options.scheduler,
            dynamic_cfg=options.dynamic_cfg,
            cfg_start=options.cfg_range[0],
            cfg_end=options.cfg_range[1],
            team=team,
            **how,
        )


def _parts(options: argparse.Namespace, source: "_Source", output: Path | None) -> "Parts":
    """Plan the parts of a long video, and say so.

    Args:
        output: where the video is to be written, if it is by this process.

    Raises:
        ValueError: for a length that cannot be made, written or held, or for several processes.
    """
    from cogvideox.tensors import check_room as check_host_room
    from cogvideox.video import check_room
    from commands.chain import plan_parts

    if place_of().count > 1:
        raise ValueError(
            "--seconds makes one part after the other, each from the frames of the one before, in one process. Start "
            "it without torchrun, or make one clip without --seconds."
        )
    parts = plan_parts(options.seconds, source.fps, source.frames)
    if output is not None:
        check_room(output, parts.wanted, source.width, source.height)
    check_host_room(
        3 * source.width * source.height * (parts.wanted + 4 * parts.frames),
        f"A video of {parts.wanted} frames of {source.width}x{source.height}",
        "Give fewer --seconds, or make it smaller.",
    )
    _say(parts.text)
    return parts


def _chain(job: _Job, parts: "Parts", make: "Callable[..., torch.Tensor]") -> None:
    """Make a long video of parts, those that are kept included, and write it.

    Args:
        make: ``make(start=image, seed=seed)`` returns the latents of a part.
    """
    from cogvideox.pictures import fit_size
    from commands.chain import make_video, parts_folder

    options, source = job.options, job.source
    assert source.start is not None, "--seconds goes with --image"
    start = fit_size(source.start, source.width, source.height)
    # What changes no frame is not among them.
    aside = "seconds output overwrite fps image debug device memory on_black plan prompt negative split".split()
    settings = {name: value for name, value in vars(options).items() if name not in aside} | job.texts
    settings |= {"width": source.width, "height": source.height, "frames": source.frames}
    settings = json.loads(json.dumps(settings, default=lambda value: str(value)))
    settings["pixels"] = hashlib.sha256(start.numpy().tobytes()).hexdigest()
    folder = parts_folder(job.output, settings)
    images = make_video(
        parts,
        folder,
        settings,
        start,
        options.seed,
        lambda image, seed: make(start=image, seed=seed),
        lambda latent: _decoded(options, job.handles.vae, latent),
        _say,
    )
    _write(options, images, job.output, source.fps)
    _say(
        f"The parts are kept in {folder}: with --overwrite and more --seconds they are used again. Delete them when "
        "the video is as wanted."
    )


def _check_settings(options: argparse.Namespace) -> float:
    """Check the numbers that need no checkpoint; return ``denoise``.

    Raises:
        ValueError: for the first that cannot be run with.
    """
    from cogvideox.geometry import check_side
    from cogvideox.requests import check_guidance, check_guidance_range
    from cogvideox.schedulers import steps_to_run

    in_parts = options.mask is not None or options.void is not None
    usual = 1.0 if options.video is None or in_parts else 0.8
    denoise = usual if options.strength is None else options.strength
    if not 0 < denoise <= 1:
        raise ValueError(
            f"--strength is {denoise}, but it is a share over 0 and up to 1: how much of the video is made anew. The "
            "default is 0.8."
        )
    if options.seconds is not None:
        from commands.chain import check_seconds

        check_seconds(options.seconds)
    steps_to_run(options.steps, denoise)
    check_guidance(options.cfg)
    check_guidance_range(*options.cfg_range)
    for side in ("width", "height"):
        if getattr(options, side) is not None:
            check_side(side, getattr(options, side))
    return denoise


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """Return the prompts by name, read from a file or stdin where that was asked for."""
    texts = {
        name: _prompt(given, name) for name in ("prompt", "negative") if (given := getattr(options, name)) is not None
    }
    if not texts.get("prompt", "x").strip():
        _say("prompt: it is empty, so the model is not told what to show.")
    return texts


def _open(options: argparse.Namespace, hardware: "Hardware") -> "Handles":
    """Open the checkpoint. All of its parts have to be there, unless a plan alone is wanted or latents are decoded."""
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.handles import make_handles

    checkpoint = open_checkpoint(options.model, options.text_encoder, options.vae, options.tokenizer)
    if not options.plan and options.decode is None:
        stored = options.upscale is not None and options.empty_prompt is not None and options.empty_prompt.exists()
        for kind in ("vae",) if stored else ("text_encoder", "vae"):
            checkpoint.part(kind)
    return make_handles(checkpoint, options.dtype, hardware, options.on_mismatch, options.memory)


def _changed(options: argparse.Namespace, handles: "Handles") -> "tuple[Model, TextEncoder]":
    """Return the transformer and the text encoder with what the options change about them."""
    from cogvideox.handles import quantized, with_attention, with_cache, with_compile, with_lora, with_windows
    from cogvideox.modules.cache import Cache
    from cogvideox.modules.compiled import Compiled
    from cogvideox.windows import Windows

    model, text_encoder = handles.model, handles.text_encoder
    if options.quantize_text_encoder is not None:
        text_encoder = quantized(text_encoder, options.quantize_text_encoder)
    if options.quantize is not None:
        model = quantized(model, options.quantize)
    for lora in model.loras:
        _say(lora.text)
    for path, strength in options.lora:
        model = with_lora(model, path, strength)
        _say(model.loras[-1].text)
    if options.attention != "auto":
        model = with_attention(model, options.attention)
    if options.cache is not None:
        method, strength = options.cache
        given = {} if strength is None else {"strength": strength}
        if options.cache_range is not None:
            given["start"], given["end"] = options.cache_range
        cache = Cache(method, **given)
        model = with_cache(model, cache)
        _say(cache.text)
    if options.compile is not None:
        compiled = Compiled(options.compile)
        model = with_compile(model, compiled)
        _say(compiled.text)
    if options.context_windows is not None:
        length, overlap = options.context_windows
        windows = Windows(length) if overlap is None else Windows(length, overlap)
        model = with_windows(model, windows)
        _say(windows.text)
    return model, text_encoder


@dataclass
class _Source:
    """What a run starts from, and the size and length of what it makes."""

    width: int
    height: int
    frames: int
    fps: Fraction
    start: "torch.Tensor | None" = None
    end: "torch.Tensor | None" = None
    clip: "torch.Tensor | None" = None
    mask: "torch.Tensor | None" = None
    sound: Any = None


def _source(options: argparse.Namespace, variant: "Variant", output: Path | None, events: "Events") -> _Source:
    """Read the images or the clip that a run starts from.

    Raises:
        ValueError: for what cannot be read, and for a size or length that cannot be made.
    """
    import torch

    from cogvideox.geometry import check_frames, check_video_room
    from cogvideox.pictures import check_images, nearest_length
    from cogvideox.video import check_room, read_image, read_sound, read_video
    from commands.inpaint import fit_parts, read_mask

    if options.frames is not None:
        check_frames(options.frames, variant.frame_step, variant.in_pairs)
    start, end = (
        None if path is None else check_images(read_image(path, events), short(path))
        for path in (options.image, options.end_image)
    )
    usual = variant.default_size if start is None else variant.size_for(start.shape[2], start.shape[1])
    width, height = (
        given if given is not None else side for given, side in zip((options.width, options.height), usual, strict=True)
    )
    frames = options.frames or (variant.default_frames if options.video is None else variant.max_frames)
    source = _Source(width, height, frames, _fps(options, variant), start, end)
    check_video_room(width, height, frames)
    in_parts = options.mask or options.void
    if options.video is not None:
        source.clip = read_video(
            options.video,
            frames,
            fps=source.fps,
            size=(width, height),
            step=None if in_parts is not None else variant.frame_step,
            in_pairs=variant.in_pairs,
            dtype=torch.uint8,
            events=events,
        )
        if in_parts is not None:
            count = len(source.clip)
            source.frames = options.frames or nearest_length(count, variant.frame_step, variant.in_pairs)[0]
            source.frames = frames if options.void is not None else source.frames
            mask = read_mask(in_parts, count, min(count, source.frames), (width, height), source.fps, events)
            source.clip, source.mask = fit_parts(options, source.clip, mask, source.frames)
        source.frames = len(source.clip)
        if options.frames is not None and source.frames < options.frames:
            _say(f"--frames is {options.frames}, and the clip has not so many: the video has {source.frames}.")
        if options.keep_audio:
            source.sound = read_sound(options.video, float(source.frames / source.fps), events)
    if output is not None:
        check_room(output, source.frames, width, height)
    return source


def _is_config(path: Path) -> bool:
    from interop.check import is_config

    return is_config(path)


def decode_latent(options: argparse.Namespace) -> int:
    """Make the video of latents that are in a file."""
    from cogvideox.geometry import check_latent
    from cogvideox.precision.hardware import Hardware
    from cogvideox.video import check_room, read_latent

    output = _output(options)
    hardware = Hardware.detect(options.device)
    latent = read_latent(options.decode)
    check_latent(latent)
    handles = _open(options, hardware)
    _say(handles.plan.text)
    check_room(output, *(side * factor for side, factor in zip(latent.shape[2:], (4, 8, 8), strict=True)))
    _finish(options, handles.vae, latent, output, _fps(options, handles.model.variant))
    return 0


def upscale(options: argparse.Namespace) -> int:
    """Make a video larger."""
    from cogvideox.precision.hardware import Hardware
    from commands.upscale import describe, enlarge, read_request

    output, events = _output(options), _events()
    handles = _open(options, Hardware.detect(options.device))
    _say(handles.plan.text)
    model, text_encoder = _changed(options, handles)
    request = read_request(options, model, output, events)
    if options.plan:
        _say(describe(options, request, model))
        return 0
    with _latents_kept(options, output):
        images = enlarge(options, request, model, text_encoder, handles.vae, events)
    _judge(options, images)
    _write(options, images, output, request.fps, request.sound)
    return 0


def _output(options: argparse.Namespace) -> Path:
    """Where the video goes, tried.

    Raises:
        ValueError: if it cannot be written there, or is taken.
    """
    from cogvideox.video import check_output, free_name

    output = options.output
    if output is None:
        output = DEFAULT_OUTPUT if options.overwrite else free_name(DEFAULT_OUTPUT)
    read = [
        options.image,
        options.end_image,
        options.video,
        options.mask,
        options.void,
        options.noise,
        options.model,
        options.text_encoder,
        options.vae,
        options.decode,
        *files_read(options),
    ]
    return check_output(
        output, options.overwrite, [path for path in (*read, *(path for path, _ in options.lora)) if path is not None]
    )


def _fps(options: argparse.Namespace, variant) -> Fraction:
    fps = options.fps or Fraction(variant.fps)
    if fps != variant.fps:
        _say(
            f"The video is to have {float(fps):.4g} frames a second, and the model was trained at {variant.fps}: what "
            "moves may be too fast or too slow."
        )
    return fps


@contextmanager
def _latents_kept(options: argparse.Namespace, output: Path, latent=None) -> Iterator[None]:
    """Where something fails that follows the sampling, or memory runs out within it, keep the latents in a file, and
    say where.

    Raises:
        RuntimeError: with what failed, and how to go on from there.
    """
    from cogvideox.video import write_latent

    try:
        yield
    except Exception as error:
        # Whatever it was: what took minutes to make is not to be lost with it.
        latent = getattr(error, "latents", latent)
        if latent is None:
            raise
        known = isinstance(error, ValueError | RuntimeError)
        said = (
            str(error) if known else f"Something failed after the sampling ({type(error).__name__}: {reason(error)})."
        )
        failed = []
        for folder in (output.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())):
            try:
                path = write_latent(latent, folder, output.stem[:100])
            except ValueError as why:
                failed.append(str(why))
                continue
            raise RuntimeError(
                f"{said} The latents are not lost: {short(path, 400)} has them, and --decode with that file and the "
                "same --model makes the video of them."
            ) from error
        raise RuntimeError(f"{said} The latents could not be kept either ({' '.join(failed)})") from error


def _finish(options: argparse.Namespace, vae, latent, output: Path, fps: Fraction, sound=None) -> None:
    """Decode latents, look for black frames, and write the video."""
    _write(options, _decoded(options, vae, latent), output, fps, sound)


def _decoded(options: argparse.Namespace, vae, latent) -> "torch.Tensor":
    """Return the frames of latents, in which black ones were looked for."""
    from cogvideox.vae import decode

    images = decode(vae, latent, on_nan=options.on_nan, events=_events())
    _judge(options, images)
    return images


def _judge(options: argparse.Namespace, images: "torch.Tensor") -> None:
    """Look for black frames, and do about them what the options say."""
    from cogvideox.black_frames import check_black_frames, enforce

    report = check_black_frames(images)
    _say(report.text)
    enforce(report, options.on_black)


def _write(options: argparse.Namespace, images: "torch.Tensor", output: Path, fps: Fraction, sound=None) -> None:
    from cogvideox.video import free_name, write_mp4

    if options.output is None and not options.overwrite:
        # Another run may have taken the name meanwhile.
        output = free_name(DEFAULT_OUTPUT)
    write_mp4(images, output, fps, events=_events(), overwrite=options.overwrite, sound=sound)
    _say(f"{output}: {len(images)} frames of {images.shape[2]}x{images.shape[1]} at {float(fps):.5g} fps")


def check(options: argparse.Namespace) -> int:
    """Check a checkpoint, a SAT config or a workflow; prints the report."""
    from cogvideox.precision.verdict import MISMATCH

    backup, incomplete = None, list[str]()
    report: ConfigReport | DtypePlan
    if _is_config(options.check):
        # Nothing that imports torch: a config is text.
        from interop.check import check_config, fix_config

        if options.scan:
            raise ValueError(
                f"{options.check} is a config and holds no weights to scan. Give --scan with a checkpoint's folder."
            )
        report, backup = fix_config(options.check) if options.fix else (check_config(options.check), None)
    else:
        if options.fix:
            raise ValueError(
                f"{options.check} is not a SAT config, and --fix rewrites only those. For a checkpoint choose another "
                "--dtype."
            )
        from cogvideox.checkpoint.layout import open_checkpoint
        from cogvideox.precision.hardware import Hardware
        from cogvideox.precision.policy import plan_dtypes, scan_parts

        checkpoint = open_checkpoint(options.check, options.text_encoder, options.vae, options.tokenizer)
        incomplete = list(checkpoint.incomplete.values())
        report = plan = plan_dtypes(checkpoint, options.dtype, Hardware.detect(options.device), options.on_mismatch)
        if options.scan:
            report = scan_parts(checkpoint, plan, on_progress=_events().counter("reading weights", "B"))
    _say(json.dumps(report.as_dict(), indent=2) if options.json else report.text, is_data=options.json)
    if backup is not None and not options.json:
        _say(f"written; the file as it was is {backup}")
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
    told = _events().counter("downloading", "B")
    _say(f"complete: {download_checkpoint(which, Path(*folder or ['models']), on_progress=told)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint; prints what was written and what a cast lost."""
    from cogvideox.checkpoint.convert import convert_checkpoint
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.precision.policy import CHOICES

    source, destination = options.convert
    checkpoint = open_checkpoint(source, options.text_encoder, options.vae, options.tokenizer)
    told = _events().counter("converting", "B")
    _say(convert_checkpoint(checkpoint, destination, CHOICES[options.dtype], on_progress=told).text)
    return 0


def migrate(options: argparse.Namespace) -> int:
    """Migrate a workflow; prints what became of it."""
    from interop.migrate import migrate_workflow

    source, target = options.migrate
    _say(migrate_workflow(source, target, preferred()).text)
    return 0


_WORK = {
    "prompts": make_many,
    "check": check,
    "download": download,
    "convert": convert,
    "migrate": migrate,
    "decode": decode_latent,
    "upscale": upscale,
}


def _events() -> "Events":
    """What a run tells, in a terminal: a bar for each kind of work, and sentences."""
    from tqdm import tqdm

    from cogvideox.events import Events

    class Terminal(Events):
        def __init__(self) -> None:
            self._bars: dict[str, Any] = {}

        def note(self, text: str, level: int = logging.WARNING) -> None:
            _say(text)

        def progress(self, what: str, done: int, total: int, unit: str) -> None:
            if _quiet:
                return
            try:
                if what not in self._bars:
                    self._bars[what] = tqdm(total=total, desc=_in_words(what), unit=unit, unit_scale=unit == "B")
                bar = self._bars[what]
                bar.total = total
                bar.update(done - bar.n)
                if done == total:
                    # The next of its kind has a bar of its own.
                    self._bars.pop(what).close()
            except BrokenPipeError:
                _mute(sys.stderr)

    return Terminal()


if __name__ == "__main__":
    # A console or a file in an old encoding, as on Windows, has not every sign of a report or a path: it gets \u2192
    # for an arrow, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
