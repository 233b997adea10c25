"""Make a clip larger with DOVE or SparkVSR: ``generate.py --upscale VIDEO``."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.choices import AUTO, STOP, SUPER_RESOLUTION
from cogvideox.words import listed, short

if TYPE_CHECKING:
    import torch

    from cogvideox.events import Events
    from cogvideox.handles import VAE, Model, TextEncoder

#: Options of ``--upscale`` alone, as they are where they are not given.
_USUAL = {"scale": 4, "kind": AUTO, "reference_frames": "", "reference_guidance": 1.0}
#: Options that say what a new video is to be, where here the clip does.
_OF_NEW_VIDEOS = ("prompt", "image", "end_image", "video", "width", "height", "frames", "seconds", "noise")
#: Options that say how one is made, where here there is one step, without a prompt.
_UNREAD = (
    *("negative", "steps", "cfg", "cfg_range", "dynamic_cfg", "scheduler"),
    *("cache", "cache_range", "context_windows"),
)


def add_options(parser: argparse.ArgumentParser, path: Callable[[str], Path], whole: Callable[[str], int]) -> None:
    """Add the options of ``--upscale``, read by the program's own ``path`` and ``whole``."""
    group = parser.add_argument_group("make a video larger")
    group.add_argument(
        "--upscale",
        type=path,
        metavar="VIDEO",
        help=(
            "the video, of any size and length, made larger and clearer in one step; --model is DOVE or SparkVSR; it "
            "keeps its rate and its sound"
        ),
    )
    group.add_argument(
        "--scale",
        type=whole,
        metavar="N",
        help="how many times as wide and high it becomes, 1 to 8 (default: 4, as the models were trained)",
    )
    group.add_argument(
        "--kind",
        choices=SUPER_RESOLUTION,
        help="what --model is (default: by its input channels and its name)",
    )
    group.add_argument(
        "--references",
        type=path,
        nargs="+",
        metavar="FILE",
        help="SparkVSR only: images of some frames as they should be, of any size",
    )
    group.add_argument(
        "--reference-frames",
        metavar="N,N",
        help="which frames they are, counted from 0, each 4 or more after the one before: 0,24,48",
    )
    group.add_argument(
        "--reference-guidance",
        type=float,
        metavar="FACTOR",
        help="how strictly they are followed (default: 1, as trained; others take twice the time)",
    )
    group.add_argument(
        "--empty-prompt",
        type=path,
        metavar="FILE",
        help=(
            "a safetensors file of the empty prompt's embedding: read if it is there, so that no text encoder is "
            "needed, and else written"
        ),
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where options of ``--upscale`` do not go with others; set those that were not given, and those
    that it does not read, whose names are ``options.unread`` then."""
    if options.upscale is None:
        for name in ("references", "empty_prompt", *_USUAL):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} goes with --upscale VIDEO")
        return
    for name, usual in _USUAL.items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    if options.model is None:
        parser.error("--upscale needs --model, which is DOVE or SparkVSR")
    for name in _OF_NEW_VIDEOS:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            parser.error(f"--{option} makes a new video, and --upscale takes all from the one it is given")
    usual = {name: parser.get_default(name) for name in _UNREAD}
    options.unread = [f"--{name.replace('_', '-')}" for name in _UNREAD if getattr(options, name) != usual[name]]
    vars(options).update(usual)


def files_read(options: argparse.Namespace) -> list[Path | None]:
    """List the files that ``--upscale`` reads."""
    return [options.upscale, options.empty_prompt, *(options.references or ())]


@dataclass
class Request:
    """A clip to be made larger, checked and read, and nothing computed.

    Attributes:
        images: ``[F, H, W, 3]``, uint8.
        references: ``[n, h, w, 3]`` in 0..1.
        sound: of the clip, as ``write_mp4`` takes it.
    """

    images: "torch.Tensor"
    kind: str
    references: "torch.Tensor | None"
    fps: Fraction
    sound: Any


def read_request(options: argparse.Namespace, model: "Model", output: Path, events: "Events") -> Request:
    """Check what can be checked without weights, and read the clip.

    Raises:
        ValueError: for what cannot be made larger, or not by this checkpoint.
    """
    import torch

    from cogvideox.black_frames import check_black_frames
    from cogvideox.clip_files import read_rate
    from cogvideox.pictures import check_images, fit_size
    from cogvideox.super_resolution import (
        check_enlarged,
        check_reference_guidance,
        check_references,
        check_scale,
        find_kind,
    )
    from cogvideox.video import check_room, read_image, read_sound, read_video

    if options.unread:
        events.note(
            f"--upscale takes a clip in one step, without a prompt, and does not read {listed(options.unread, 10)}."
        )
    kind = find_kind(model, options.kind)
    check_scale(options.scale)
    check_reference_guidance(options.reference_guidance)
    paths = options.references or []
    check_references(kind, len(paths), options.reference_frames)
    fps = options.fps or read_rate(options.upscale)
    images = read_video(options.upscale, fps=fps, dtype=torch.uint8, events=events)
    frames, height, width = images.shape[:3]
    check_references(kind, len(paths), options.reference_frames, frames)
    check_enlarged(kind, frames, height, width, options.scale)
    check_room(output, frames, options.scale * width, options.scale * height)
    # The others are not looked at once there is one that is not.
    if options.on_black == STOP and all(check_black_frames(frame[None] / 255).black_frames for frame in images):
        raise ValueError(
            f"{short(options.upscale, 400)} is black in all of its frames, so the larger video would be, too, and not "
            "be written. Give another clip, or --on-black warn."
        )
    shown = [check_images(read_image(path, events), short(path)) for path in paths]
    size = (options.scale * width, options.scale * height)
    references = torch.cat([fit_size(image, *size) for image in shown]) if shown else None
    return Request(images, kind, references, fps, read_sound(options.upscale, float(frames / fps), events))


def enlarge(
    options: argparse.Namespace,
    request: Request,
    model: "Model",
    text_encoder: "TextEncoder",
    vae: "VAE",
    events: "Events",
) -> "torch.Tensor":
    """Return the larger frames, ``[F, H, W, 3]`` in 0..1, H and W even as a video needs them."""
    from cogvideox.super_resolution import upscale

    images = upscale(
        model,
        vae,
        request.images,
        _empty_prompt(options, model, text_encoder, events),
        scale=options.scale,
        seed=options.seed,
        kind=request.kind,
        references=request.references,
        reference_frames=options.reference_frames,
        reference_guidance=options.reference_guidance,
        on_nan=options.on_nan,
        events=events,
    )
    height, width = images.shape[1:3]
    if height % 2 or width % 2:
        events.note(
            f"{width}x{height} pixels are odd, and a video's sides are even: a row or column at the end is cut."
        )
    return images[:, : height - height % 2, : width - width % 2]


def describe(options: argparse.Namespace, request: Request, model: "Model") -> str:
    """Say in what pieces, and in what memory, the clip would be made larger, after what a run would note."""
    from cogvideox.super_resolution import describe_plan, notes_of

    frames, height, width = request.images.shape[:3]
    refers = request.references is not None
    notes = notes_of(model, request.kind, refers, options.reference_guidance)
    guidance = options.reference_guidance if refers else 1.0
    return "\n".join((*notes, describe_plan(model, frames, height, width, options.scale, request.kind, guidance)))


def _empty_prompt(
    options: argparse.Namespace, model: "Model", text_encoder: "TextEncoder", events: "Events"
) -> "torch.Tensor":
    """Read the empty prompt's embedding from its file, or make it, and keep it where it can be written.

    Raises:
        ValueError: if there is neither the file nor a text encoder, or either is another model's.
    """
    from cogvideox.text import encode_prompt, read_embeddings, write_embeddings
    from cogvideox.variants import full_config

    path = options.empty_prompt
    if path is not None and path.exists():
        return read_embeddings(path, full_config(model.weights.config)["text_embed_dim"])
    embeddings = encode_prompt(text_encoder, "", options.on_nan, events).embeddings
    if path is not None:
        try:
            write_embeddings(embeddings, path)
        except ValueError as error:
            # It is made, and only the next run would be spared loading T5.
            events.note(str(error))
            return embeddings
        events.note(f"The empty prompt's embedding is now in {short(path, 400)}: with it no text encoder is needed.")
    return embeddings
