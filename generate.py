"""Make a video from a prompt, an image or a video with CogVideoX-1.5, without ComfyUI: the same engine as the nodes.

Or only check what a checkpoint or config would do, download or convert one, or migrate a workflow of ComfyUI-CogVideoXWrapper to this pack.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# An interpreter with a ._pth file, as the python_embeded of ComfyUI's Windows portable, does not look beside the script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cogvideox.choices import BACKENDS, CACHES, COMPILE_MODES, DTYPES, MEMORY, ON_BLACK, ON_MISMATCH, ON_NAN, QUANTIZE, SCHEDULERS

EXAMPLE = """examples:
  python generate.py --model models/CogVideoX1.5-5B --prompt "A panda plays the guitar in a bamboo forest." --output panda.mp4
  python generate.py --model models/CogVideoX1.5-5B-I2V --image panda.png --prompt "The panda looks up." --lora style.safetensors:0.8
  python generate.py --model models/CogVideoX1.5-5B --video clip.mp4 --strength 0.7 --prompt "The same scene in snow."
  python generate.py --check models/CogVideoX1.5-5B --dtype fp16 --scan
  python generate.py --check sat/configs/inference.yaml --fix
  python generate.py --check my_workflow.json --json
  python generate.py --download t2v models
  python generate.py --convert CogVideoX1.5-5B-SAT models/CogVideoX1.5-5B --dtype bf16
  python generate.py --migrate old_workflow.json new_workflow.json

A 5-second video of 81 frames takes about 16 minutes on an A100 (official figure) and needs a GPU; a run ends with a verdict on black frames,
and a black video is not written (see --on-black). --check ends with status 0 if all is well or only slower than it could be, 3 at a mismatch.
"""
#: Exit status of --check where the checked thing would give a wrong picture.
MISMATCH_STATUS = 3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", help="what the video shows, in English, at most 226 tokens")
    what.add_argument("--negative", default="", metavar="PROMPT", help="what it should not show (default: empty)")
    what.add_argument(
        "--image", type=Path, metavar="FILE", help="the image the video starts from, for image-to-video checkpoints; scaled and cropped"
    )
    what.add_argument("--end-image", type=Path, metavar="FILE", help="the image it ends with, for checkpoints fine-tuned for interpolation")
    what.add_argument("--video", type=Path, metavar="FILE", help="the video to start from, for text-to-video checkpoints; scaled and cropped")
    what.add_argument(
        "--strength", type=float, metavar="SHARE", help="of --video: how much is made anew, over 0 to 1 (default: 0.8, as the reference)"
    )
    what.add_argument(
        "--width", type=int, metavar="PIXELS", help="a multiple of 16 (default: the model card's, 1360 for 1.5; --image's shape for I2V)"
    )
    what.add_argument(
        "--height", type=int, metavar="PIXELS", help="a multiple of 16 (default: the model card's, 768 for 1.5; --image's shape for I2V)"
    )
    what.add_argument("--frames", type=int, metavar="N", help="16N+1: 81 is 5 s, 161 is 10 s (default: 81 for 1.5; with --video, all of it)")
    what.add_argument("--seed", type=int, default=0, help="the same seed and settings give the same video (default: 0)")
    what.add_argument("--output", type=Path, default=Path("out.mp4"), metavar="FILE.mp4", help="where to write it (default: out.mp4)")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--model", type=Path, metavar="PATH", help="a CogVideoX checkpoint: a folder of diffusers or SAT, or a single safetensors file")
    how.add_argument("--text-encoder", type=Path, metavar="PATH", help="a T5-XXL encoder, file or folder (default: the checkpoint's own)")
    how.add_argument("--vae", type=Path, metavar="PATH", help="a CogVideoX VAE, file or folder (default: the checkpoint's own)")
    how.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="T5's tokenizer, where neither checkpoint nor text encoder brings one")
    how.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        metavar="PATH[:STRENGTH]",
        help="a LoRA of this model, and how strongly it is applied (default: 1); can be given several times",
    )
    how.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50, as the model card)")
    how.add_argument("--cfg", type=float, default=6.0, help="guidance; 1 switches it off (default: 6, as the model card)")
    how.add_argument("--dynamic-cfg", action="store_true", help="change the guidance along a cosine, as the reference's use_dynamic_cfg")
    how.add_argument("--scheduler", choices=list(SCHEDULERS), default="ddim", help="default: ddim")
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto: what the weights were trained in where the device has it, else the fastest that gives the same picture (default)",
    )
    how.add_argument(
        "--on-mismatch",
        choices=ON_MISMATCH,
        default="fix",
        help="if the dtype does not suit the weights or the device: run so that the picture is right, run as chosen, or stop (default: fix)",
    )
    how.add_argument(
        "--memory",
        choices=MEMORY,
        default="auto",
        help="where the weights are while they run: all on the GPU, brought to it by blocks or layers (slower, much less of its memory), or on the "
        "CPU (default: the fastest that fits)",
    )
    how.add_argument(
        "--quantize",
        choices=QUANTIZE,
        metavar="METHOD",
        help="keep the weights of attention and feed-forward in a byte each: int8_weight_only (any device, nearest to the original), fp8_weight_only;"
        " int8_dynamic and fp8_dynamic multiply in int8 and fp8 too, faster where the GPU can, and lose more",
    )
    how.add_argument("--quantize-text-encoder", choices=QUANTIZE, metavar="METHOD", help="the same for T5; with a dynamic method, its weights alone")
    how.add_argument(
        "--on-nan",
        choices=ON_NAN,
        default="heal",
        help="if something is NaN or Inf on the way: go on from there in a safer way to run, or stop and name the module (default: heal)",
    )
    how.add_argument(
        "--attention",
        choices=BACKENDS,
        default="auto",
        help="the kernel of the attention, if this machine has it; all but sage give the same picture up to rounding (default: PyTorch's choice)",
    )
    how.add_argument(
        "--cache",
        type=_cache,
        metavar="METHOD[:STRENGTH]",
        help=f"reuse what changes little from step to step: {', '.join(CACHES)}, and the share of block evaluations to skip (default: 0.6); faster, "
        "and another video",
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
        const=COMPILE_MODES[0],
        help="compile the transformer's blocks: faster steps, and a first one that takes a minute or two longer (default mode: default)",
    )
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the GPU if there is one)")
    how.add_argument(
        "--on-black",
        choices=ON_BLACK,
        default="stop",
        help="if the video came out black: stop without writing it, warn, or only report (default: stop)",
    )
    check = parser.add_argument_group("only check, make nothing")
    check.add_argument("--plan", action="store_true", help="say how much memory the video would take in each mode of --memory, and stop")
    check.add_argument(
        "--check",
        type=Path,
        metavar="PATH",
        help="say how a checkpoint folder would run here (with --dtype and --on-mismatch), or whether a SAT inference.yaml (or its folder) or a "
        "ComfyUI workflow JSON would run weights trained in bf16 in fp16",
    )
    check.add_argument("--scan", action="store_true", help="read every weight too: NaN, Inf, and what an fp16 copy would lose")
    check.add_argument("--fix", action="store_true", help="write the remedy into a SAT inference.yaml, keeping a .bak")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    files = parser.add_argument_group("get and convert checkpoints")
    files.add_argument(
        "--download",
        nargs="+",
        metavar=("t2v|i2v", "DIR"),
        help="download CogVideoX1.5-5B (t2v) or its image-to-video model (i2v), 31 GB, into DIR (default: models); goes on where it stopped",
    )
    files.add_argument(
        "--convert",
        nargs=2,
        type=Path,
        metavar=("SRC", "DST"),
        help="write a checkpoint of any layout as a folder in diffusers layout, or its transformer as one DST.safetensors; with --dtype, cast",
    )
    workflows = parser.add_argument_group("bring workflows along")
    workflows.add_argument(
        "--migrate",
        nargs=2,
        type=Path,
        metavar=("OLD.json", "NEW.json"),
        help="write a workflow of ComfyUI-CogVideoXWrapper (text, image or video to video; saved or exported for the API) with this pack's nodes, "
        "by any version of it, and say what could not be carried over; OLD.json stays as it is",
    )
    return parser


def _lora(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:STRENGTH``; a colon that no number follows belongs to the path, as in ``C:\\style.safetensors``."""
    path, colon, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if colon and path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _cache(text: str) -> tuple[str, float | None]:
    """``METHOD`` or ``METHOD:STRENGTH``."""
    method, colon, strength = text.partition(":")
    if method not in CACHES:
        raise argparse.ArgumentTypeError(f"{method!r} is not one of {', '.join(CACHES)}")
    try:
        return method, float(strength) if colon else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"the strength {strength!r} is not a number") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    work = next((work for name, work in _WORK.items() if getattr(options, name) is not None), generate)
    if work is generate:
        for name in ("prompt", "model"):
            if getattr(options, name) is None and not (options.plan and name == "prompt"):
                parser.error(f"--{name} is required to make a video (or give --check PATH to only check something)")
    for name, needed in (("strength", "video"), ("end_image", "image"), ("cache_range", "cache")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            parser.error(f"--{name.replace('_', '-')} goes with --{needed}")
    if options.image is not None and options.video is not None:
        parser.error("--image is for image-to-video checkpoints and --video for text-to-video ones: give one of them")
    for name in ("scan", "fix", "json"):
        if getattr(options, name) and work is not check:
            parser.error(f"--{name} goes with --check PATH")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        # Configs and workflows are text, for which no package is needed: they are read in a tenth of a second.
        if work is not migrate and not (work is check and _is_config(options.check)):
            from cogvideox.dependencies import require_dependencies

            require_dependencies()
        return work(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def generate(options: argparse.Namespace) -> int:
    """Run one generation; prints the dtype report before, progress bars, and the black-frame verdict after."""
    import torch

    from cogvideox.black_frames import check_black_frames, enforce
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.geometry import empty_latent
    from cogvideox.handles import make_handles, quantized, with_attention, with_cache, with_compile, with_lora
    from cogvideox.memory import memory_text
    from cogvideox.pictures import check_images, fit_length, fit_size
    from cogvideox.precision.hardware import Hardware
    from cogvideox.sampling import plan_steps, sample
    from cogvideox.speed.cache import Cache
    from cogvideox.speed.compiled import Compiled
    from cogvideox.text import encode_prompt
    from cogvideox.vae import decode, encode, image_latents
    from cogvideox.video import check_output, read_image, read_video, write_mp4

    # What a cache skipped and how long compiling took is no warning, and is to be seen.
    logging.getLogger("cogvideox.sampling").setLevel(logging.INFO)
    check_output(options.output)
    checkpoint = open_checkpoint(options.model, options.text_encoder, options.vae, options.tokenizer)
    handles = make_handles(checkpoint, options.dtype, Hardware.detect(options.device), options.on_mismatch, options.memory)
    print(handles.plan.text, flush=True)
    model, text_encoder, variant = handles.model, handles.text_encoder, handles.model.variant
    if options.quantize_text_encoder is not None:
        text_encoder = quantized(text_encoder, options.quantize_text_encoder)
    if options.quantize is not None:
        model = quantized(model, options.quantize)
    for path, strength in options.lora:
        model = with_lora(model, path, strength)
        print(model.loras[-1].text)
    if options.attention != "auto":
        model = with_attention(model, options.attention)
    if options.cache is not None:
        method, strength = options.cache
        given = {} if strength is None else {"strength": strength}
        if options.cache_range is not None:
            given["start"], given["end"] = options.cache_range
        model = with_cache(model, Cache(method, **given))
        print(model.cache.text)
    if options.compile is not None:
        model = with_compile(model, Compiled(options.compile))
        print(model.compiled.text)

    start, end = (None if path is None else check_images(read_image(path), str(path)) for path in (options.image, options.end_image))
    usual = variant.default_size if start is None else variant.size_for(start.shape[2], start.shape[1])
    width, height = (given if given is not None else side for given, side in zip((options.width, options.height), usual, strict=True))
    clip, frames = None, variant.default_frames if options.frames is None else options.frames
    if options.video is not None:
        clip, note = fit_length(read_video(options.video, options.frames), variant.frame_step)
        clip, frames = fit_size(clip, width, height), len(clip)
        if note:
            print(note)
    latent = empty_latent(width, height, frames, frame_step=variant.frame_step)
    denoise = 1.0 if clip is None else 0.8 if options.strength is None else options.strength
    # All that can be wrong is told now: shapes are enough to know it.
    image = None if start is None else torch.zeros_like(latent)
    plan_steps(model, latent, image, steps=options.steps, scheduler=options.scheduler, denoise=denoise)

    if options.plan:
        print(memory_text(model, tuple(latent.shape), options.cfg > 1))
        return 0

    for handle, name in ((text_encoder, "text encoder"), (model, "transformer")):
        if handle.weights.method is not None:
            print(handle.weights.quantization_text(_bar(f"quantizing {name}", "B")), flush=True)
    how = dict(on_nan=options.on_nan, on_load=_bar("loading VAE", "B"))
    if start is not None:
        start, end = (None if picture is None else fit_size(picture, width, height) for picture in (start, end))
        image = image_latents(handles.vae, start, frames, end, **how)
    if clip is not None:
        latent = encode(handles.vae, clip, on_chunk=_bar("encoding the video", "frame"), **how)
    prompts = []
    for name, prompt in (("prompt", options.prompt), ("negative", options.negative)):
        encoded = encode_prompt(text_encoder, prompt, on_nan=options.on_nan, on_load=_bar("loading text encoder", "B"))
        prompts.append(encoded.embeddings)
        for note in encoded.notes:
            print(f"{name}: {note}")
    latent = sample(
        model,
        *prompts,
        latent,
        image_latents=image,
        denoise=denoise,
        seed=options.seed,
        steps=options.steps,
        cfg=options.cfg,
        scheduler=options.scheduler,
        dynamic_cfg=options.dynamic_cfg,
        on_nan=options.on_nan,
        on_step=_bar("sampling", "step"),
        on_load=_bar("loading transformer", "B"),
    )
    images = decode(handles.vae, latent, on_nan=options.on_nan, on_chunk=_bar("decoding", "latent frame"), on_load=_bar("loading VAE", "B"))
    report = check_black_frames(images)
    print(report.text)
    enforce(report, options.on_black)
    write_mp4(images, options.output, variant.fps, on_frame=_bar("writing", "frame"))
    print(f"{options.output}: {len(images)} frames of {width}x{height} at {variant.fps} fps")
    return 0


def _is_config(path: Path) -> bool:
    from cogvideox.configs.check import is_config

    return is_config(path)


def check(options: argparse.Namespace) -> int:
    """Check a checkpoint, a SAT config or a workflow; prints the report."""
    from cogvideox.precision.verdict import MISMATCH

    backup = None
    if _is_config(options.check):
        # Nothing that imports torch: a config is text.
        from cogvideox.configs.check import check_config, fix_config

        if options.scan:
            raise ValueError(f"{options.check} is a config and holds no weights to scan. Give --scan with a checkpoint's folder.")
        report, backup = fix_config(options.check) if options.fix else (check_config(options.check), None)
    else:
        if options.fix:
            raise ValueError(f"{options.check} is not a SAT config, and --fix rewrites only those. For a checkpoint choose another --dtype.")
        from cogvideox.checkpoint.layout import open_checkpoint
        from cogvideox.precision.hardware import Hardware
        from cogvideox.precision.policy import plan_dtypes, scan_parts

        checkpoint = open_checkpoint(options.check, options.text_encoder, options.vae, options.tokenizer)
        report = plan_dtypes(checkpoint, options.dtype, Hardware.detect(options.device), options.on_mismatch)
        if options.scan:
            report = scan_parts(checkpoint, report, on_progress=_bar("reading weights", "B"))
    print(json.dumps(report.as_dict(), indent=2) if options.json else report.text)
    if backup is not None and not options.json:
        print(f"written; the file as it was is {backup}")
    return MISMATCH_STATUS if report.verdict == MISMATCH else 0


def download(options: argparse.Namespace) -> int:
    """Download a checkpoint; prints where it is."""
    from cogvideox.checkpoint.download import download_checkpoint

    which, *folder = options.download
    if len(folder) > 1:
        raise ValueError(f"--download takes what to download and at most one folder, but {len(folder)} were given. Quote a folder with spaces.")
    print(f"complete: {download_checkpoint(which, Path(*folder or ['models']), on_progress=_bar('downloading', 'B'))}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint; prints what was written and what a cast lost."""
    from cogvideox.checkpoint.convert import convert_checkpoint
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.precision.policy import CHOICES

    source, destination = options.convert
    checkpoint = open_checkpoint(source, options.text_encoder, options.vae, options.tokenizer)
    print(convert_checkpoint(checkpoint, destination, CHOICES[options.dtype], on_progress=_bar("converting", "B")).text)
    return 0


def migrate(options: argparse.Namespace) -> int:
    """Migrate a workflow; prints what became of it."""
    from cogvideox.configs.migrate import migrate_workflow

    print(migrate_workflow(*options.migrate).text)
    return 0


_WORK = {"check": check, "download": download, "convert": convert, "migrate": migrate}


def _bar(label: str, unit: str) -> Callable[..., None]:
    """A progress callback ``(done, total, ...)`` that draws a bar when it is first called."""
    from tqdm import tqdm

    bar = None

    def report(done: int, total: int, *_) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B")
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


if __name__ == "__main__":
    # A console or a file in an old encoding, as on Windows, has not every sign of a report or a path: it gets \u2192 for an arrow, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
