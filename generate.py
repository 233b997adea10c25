"""Make a video from a prompt with CogVideoX-1.5, without ComfyUI: the same engine as the nodes."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvideox.dependencies import DependencyError, require_dependencies

EXAMPLE = """example:
  python generate.py --model models/CogVideoX1.5-5B --prompt "A panda plays the guitar in a bamboo forest." --output panda.mp4

A 5-second video of 81 frames takes about 16 minutes on an A100 (official figure) and needs a GPU; a run ends with a verdict on black frames,
and a black video is not written (see --on-black)."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", required=True, help="what the video shows, in English, at most 226 tokens")
    what.add_argument("--negative", default="", metavar="PROMPT", help="what it should not show (default: empty)")
    what.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 16 (default: the model card's, 1360 for 1.5)")
    what.add_argument("--height", type=int, metavar="PIXELS", help="a multiple of 16 (default: the model card's, 768 for 1.5)")
    what.add_argument("--frames", type=int, metavar="N", help="16N+1: 81 is 5 s, 161 is 10 s (default: 81 for 1.5)")
    what.add_argument("--seed", type=int, default=0, help="the same seed and settings give the same video (default: 0)")
    what.add_argument("--output", type=Path, default=Path("out.mp4"), metavar="FILE.mp4", help="where to write it (default: out.mp4)")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a CogVideoX checkpoint in diffusers layout")
    how.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50, as the model card)")
    how.add_argument("--cfg", type=float, default=6.0, help="guidance; 1 switches it off (default: 6, as the model card)")
    how.add_argument("--dynamic-cfg", action="store_true", help="change the guidance along a cosine, as the reference's use_dynamic_cfg")
    how.add_argument("--scheduler", choices=["ddim", "dpm"], default="ddim", help="default: ddim")
    how.add_argument(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="auto: what the weights were trained in, where the device computes in it (default)",
    )
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the GPU if there is one)")
    how.add_argument(
        "--on-black",
        choices=["stop", "warn", "pass"],
        default="stop",
        help="if the video came out black: stop without writing it, warn, or only report (default: stop)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        require_dependencies()
        return generate(options)
    except (ValueError, RuntimeError, DependencyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130


def generate(options: argparse.Namespace) -> int:
    """Run one generation; prints the dtype report before, progress bars, and the black-frame verdict after."""
    from cogvideox.black_frames import check_black_frames, enforce
    from cogvideox.geometry import empty_latent
    from cogvideox.handles import open_handles
    from cogvideox.precision.policy import Hardware
    from cogvideox.sampling import plan_steps, sample
    from cogvideox.text import encode_prompt
    from cogvideox.vae import decode
    from cogvideox.video import check_output, write_mp4

    check_output(options.output)
    handles = open_handles(options.model, options.dtype, Hardware.detect(options.device))
    print(handles.plan.text, flush=True)
    variant = handles.model.variant
    width, height = (
        given if given is not None else usual for given, usual in zip((options.width, options.height), variant.default_size, strict=True)
    )
    frames = variant.default_frames if options.frames is None else options.frames
    latent = empty_latent(width, height, frames, frame_step=variant.frame_step)

    plan_steps(handles.model, latent, steps=options.steps, scheduler=options.scheduler)

    prompts = []
    for name, prompt in (("prompt", options.prompt), ("negative", options.negative)):
        encoded = encode_prompt(handles.text_encoder, prompt, on_load=_bar("loading text encoder", "B"))
        prompts.append(encoded.embeddings)
        for note in encoded.notes:
            print(f"{name}: {note}")
    latent = sample(
        handles.model,
        *prompts,
        latent,
        seed=options.seed,
        steps=options.steps,
        cfg=options.cfg,
        scheduler=options.scheduler,
        dynamic_cfg=options.dynamic_cfg,
        on_step=_bar("sampling", "step"),
        on_load=_bar("loading transformer", "B"),
    )
    images = decode(handles.vae, latent, on_chunk=_bar("decoding", "latent frame"), on_load=_bar("loading VAE", "B"))
    report = check_black_frames(images)
    print(report.text)
    enforce(report, options.on_black)
    write_mp4(images, options.output, variant.fps, on_frame=_bar("writing", "frame"))
    print(f"{options.output}: {len(images)} frames of {width}x{height} at {variant.fps} fps")
    return 0


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
    sys.exit(main())
