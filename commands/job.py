"""A video that ``generate.py`` is asked for: all that can be wrong with it, told before any weights are read."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.files import decoded, read_bytes
from cogvideox.words import reason, short
from commands.ranks import Place, place_of
from commands.terminal import path_of, say
from commands.upscale import files_read

if TYPE_CHECKING:
    import torch

    from cogvideox.events import Events
    from cogvideox.handles import Handles, Model, TextEncoder
    from cogvideox.precision.hardware import Hardware
    from cogvideox.variants import Variant
    from commands.chain import Parts
    from commands.void import Warp

#: Where a video goes that is given no name; the next free number is added where it is taken.
DEFAULT_OUTPUT = Path("out.mp4")
#: Bytes of a prompt's file: 226 tokens have about 1,000.
MAX_PROMPT = 1 << 20


def read_prompt(given: str, name: str) -> str:
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
                data = read_bytes(path_of(given[1:]), MAX_PROMPT)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ValueError(
                    f"The {name} is to be read from a file, as it begins with @: {error} One that begins so itself is "
                    "given with @@."
                ) from error
        try:
            given = decoded(data).strip()
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
class Job:
    """A video that is checked, and of which nothing is made yet: no weights are read.

    Attributes:
        latent: an empty one of its size and length.
        parts: of a video that is made in several, each as long as ``latent``.
        before: the clip that the first of the parts goes on from, uint8 ``[F, H, W, 3]``, if there is one.
        noise: what it starts from, if it is given.
        warp: what the noise is made of, if it is made of a video.
        is_conditioned: whether the model reads more than the noise.
    """

    options: argparse.Namespace
    output: Path
    denoise: float
    texts: dict[str, str]
    handles: "Handles"
    model: "Model"
    text_encoder: "TextEncoder"
    source: "Source"
    latent: "torch.Tensor"
    parts: "Parts | None" = None
    before: "torch.Tensor | None" = None
    noise: "torch.Tensor | None" = None
    is_conditioned: bool = False
    warp: "Warp | None" = None

    @property
    def size(self) -> str:
        """Size and length, in words."""
        return f"{self.source.width}x{self.source.height}, {self.source.frames} frames"

    @property
    def read(self) -> list[str]:
        """Names of the texts that are read: without guidance the prompt alone."""
        return list(self.texts) if self.options.cfg > 1 else ["prompt"]


def placed(options: argparse.Namespace) -> Place:
    """Find which process this is, and give it a card of its own."""
    from commands.ranks import check_alone, device_of

    place = place_of()
    check_alone(options.split, place)
    if not options.plan:
        options.device = device_of(options.device, place)
    return place


def prepared(
    options: argparse.Namespace,
    events: "Events",
    opened: "Callable[[argparse.Namespace, Hardware], Handles]",
    writes: bool = True,
) -> Job:
    """Check all that can be wrong with a video before any weights are read, the cheapest first.

    Args:
        opened: opens the checkpoint.
        writes: whether this process is to write the video.
    """
    from cogvideox.geometry import empty_latent
    from cogvideox.precision.hardware import Hardware
    from cogvideox.requests import check_noise, plan_steps
    from commands.inpaint import foresee_conditioning, read_noise
    from commands.void import plan_warp

    denoise = check_settings(options)
    output = output_of(options) if writes else options.output or DEFAULT_OUTPUT
    texts = texts_of(options)
    handles = opened(options, Hardware.detect(options.device))
    say(handles.plan.text)
    model, text_encoder = changed(options, handles)
    source = read_source(options, model.variant, output if writes else None, events)
    parts, before = None, None
    if options.seconds is not None:
        parts, before = plan_chain(options, source, model.variant, output if writes else None, events)
    lengths = model.variant.frame_step, model.variant.in_pairs
    latent = empty_latent(source.width, source.height, source.frames, 1, *lengths)
    # Shapes are enough to know the rest.
    image, noise = foresee_conditioning(options, model.variant, latent), read_noise(options)
    if noise is not None:
        check_noise(noise, latent)
    plan_steps(model, latent, image, steps=options.steps, scheduler=options.scheduler, denoise=denoise)
    warp = plan_warp(options, source.frames, (source.width, source.height), events)
    found = handles, model, text_encoder, source, latent, parts, before, noise, image is not None, warp
    return Job(options, output, denoise, texts, *found)


def plan_chain(
    options: argparse.Namespace, source: "Source", variant: "Variant", output: Path | None, events: "Events"
) -> "tuple[Parts, torch.Tensor | None]":
    """Plan the parts of a long video, and say so; read the clip that it goes on from, uint8 ``[F, H, W, 3]``, if there
    is one.

    Args:
        output: where the video is to be written, if it is by this process.

    Raises:
        ValueError: for a model that cannot go on, for a length that cannot be made, written or held, or for several
            processes.
    """
    import torch

    from cogvideox.tensors import check_room as check_host_room
    from cogvideox.video import check_room, read_sound, read_video
    from commands.chain import frames_of, overlap_of, plan_parts

    if place_of().count > 1:
        raise ValueError(
            "--seconds makes one part after the other, each from the frames of the one before, in one process. Start "
            "it without torchrun, or make one clip without --seconds."
        )
    overlap, wanted = overlap_of(options.overlap, variant), frames_of(options.seconds, source.fps)
    parts, before = plan_parts(wanted, source.frames, overlap), None
    if output is not None:
        check_room(output, wanted, source.width, source.height)
    check_host_room(
        3 * source.width * source.height * (wanted + 4 * parts.frames),
        f"A video of {wanted} frames of {source.width}x{source.height}",
        "Give fewer --seconds, or make it smaller.",
    )
    if options.video is not None:
        size = source.width, source.height
        before = read_video(options.video, wanted, fps=source.fps, size=size, dtype=torch.uint8, events=events)
        parts = plan_parts(wanted, source.frames, overlap, len(before))
        if options.keep_audio:
            source.sound = read_sound(options.video, float(len(before) / source.fps), events)
    for text in parts.texts:
        say(text)
    return parts, before


def check_settings(options: argparse.Namespace) -> float:
    """Check the numbers that need no checkpoint; return ``denoise``.

    Raises:
        ValueError: for the first that cannot be run with.
    """
    from cogvideox.geometry import check_side
    from cogvideox.requests import check_guidance, guided_steps
    from cogvideox.schedulers import steps_to_run

    in_parts = options.mask is not None or options.void is not None or options.seconds is not None
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
    check_guidance(options.cfg)
    start, end = options.cfg_range
    guided_steps(options.cfg, start, end, steps_to_run(options.steps, denoise))
    for side in ("width", "height"):
        if getattr(options, side) is not None:
            check_side(side, getattr(options, side))
    return denoise


def texts_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the prompts by name, read from a file or stdin where that was asked for."""
    texts = {
        name: read_prompt(given, name)
        for name in ("prompt", "negative")
        if (given := getattr(options, name)) is not None
    }
    if not texts.get("prompt", "x").strip():
        say("prompt: it is empty, so the model is not told what to show.")
    return texts


def open_handles_of(options: argparse.Namespace, hardware: "Hardware") -> "Handles":
    """Open the checkpoint. All of its parts have to be there, unless a plan alone is wanted or latents are decoded."""
    from cogvideox.checkpoint.layout import open_checkpoint
    from cogvideox.handles import make_handles

    checkpoint = open_checkpoint(options.model, options.text_encoder, options.vae, options.tokenizer)
    if not options.plan and options.decode is None:
        stored = options.upscale is not None and options.empty_prompt is not None and options.empty_prompt.exists()
        for kind in ("vae",) if stored else ("text_encoder", "vae"):
            checkpoint.part(kind)
    return make_handles(checkpoint, options.dtype, hardware, options.on_mismatch, options.memory)


def changed(options: argparse.Namespace, handles: "Handles") -> "tuple[Model, TextEncoder]":
    """Return the transformer and the text encoder with what the options change about them."""
    from cogvideox.handles import quantized, with_attention, with_cache, with_compile, with_lora, with_windows
    from cogvideox.modules.cache import Cache
    from cogvideox.modules.compiled import Compiled, compile_text
    from cogvideox.windows import Windows

    model, text_encoder = handles.model, handles.text_encoder
    if options.quantize_text_encoder is not None:
        text_encoder = quantized(text_encoder, options.quantize_text_encoder)
    if options.quantize is not None:
        model = quantized(model, options.quantize)
    for lora in model.loras:
        say(lora.text)
    for path, strength in options.lora:
        model = with_lora(model, path, strength)
        say(model.loras[-1].text)
    if options.attention != "auto":
        model = with_attention(model, options.attention)
    if options.cache is not None:
        method, strength = options.cache
        given = {} if strength is None else {"strength": strength}
        if options.cache_range is not None:
            given["start"], given["end"] = options.cache_range
        cache = Cache(method, **given)
        model = with_cache(model, cache)
        say(cache.text)
    if options.compile is not None:
        compiled = Compiled(options.compile)
        model = with_compile(model, compiled)
        say(compile_text(compiled, model.weights.device))
    if options.context_windows is not None:
        length, overlap = options.context_windows
        windows = Windows(length) if overlap is None else Windows(length, overlap)
        model = with_windows(model, windows)
        say(windows.text)
    return model, text_encoder


@dataclass
class Source:
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


def read_source(options: argparse.Namespace, variant: "Variant", output: Path | None, events: "Events") -> Source:
    """Read the images or the clip that a run starts from; of the clip that ``--seconds`` goes on from, its size alone.

    Raises:
        ValueError: for what cannot be read, and for a size or length that cannot be made.
    """
    import torch

    from cogvideox.conditioning import check_parts, fit_area
    from cogvideox.geometry import check_frames, check_video_room
    from cogvideox.pictures import check_images, nearest_length
    from cogvideox.variants import INPAINT
    from cogvideox.video import check_room, read_image, read_shape, read_sound, read_video
    from commands.inpaint import fit_parts, read_mask

    if options.end_image is not None and options.image is None and variant.reads != INPAINT:
        raise ValueError(
            f"--end-image alone is for CogVideoX-Fun checkpoints, and this is {variant.name}. Give the image that the "
            "video starts from too, with --image, or leave --end-image away."
        )
    if options.frames is not None:
        check_frames(options.frames, variant.frame_step, variant.in_pairs)
    start, end = (
        None if path is None else check_images(read_image(path, events), short(path))
        for path in (options.image, options.end_image)
    )
    shape = next(((image.shape[2], image.shape[1]) for image in (start, end) if image is not None), None)
    clip = None if options.seconds is not None else options.video
    if options.seconds is not None and options.video is not None:
        shape = read_shape(options.video)
    usual = variant.default_size if shape is None else variant.size_for(*shape)
    width, height = (
        given if given is not None else side for given, side in zip((options.width, options.height), usual, strict=True)
    )
    frames = options.frames or (variant.default_frames if clip is None else variant.max_frames)
    source = Source(width, height, frames, rate_of(options, variant), start, end)
    check_video_room(width, height, frames)
    check_parts(frames, clip is not None, options.mask is not None, start is not None and end is not None)
    in_parts = options.mask or options.void
    if clip is not None:

        def fit(frame: torch.Tensor) -> torch.Tensor:
            # At its size already it stays in bytes, a quarter of the memory.
            same = frame.shape[:2] == (height, width)
            return frame if same else fit_area(frame[None] / 255, width, height)[0]

        source.clip = read_video(
            clip,
            frames,
            fps=source.fps,
            size=None if variant.in_pairs else (width, height),
            step=None if in_parts is not None else variant.frame_step,
            in_pairs=variant.in_pairs,
            dtype=torch.uint8,
            # CogVideoX-Fun and VOID scale otherwise than by the filter of the reader.
            fit=fit if variant.in_pairs else None,
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
            say(f"--frames is {options.frames}, and the clip has not so many: the video has {source.frames}.")
        if options.keep_audio:
            source.sound = read_sound(clip, float(source.frames / source.fps), events)
    if output is not None:
        check_room(output, source.frames, width, height)
    return source


def is_config(path: Path) -> bool:
    """Ask ``interop.check.is_config``, which is not imported before that."""
    from interop.check import is_config

    return is_config(path)


def output_of(options: argparse.Namespace) -> Path:
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
        options.first_pass,
        options.model,
        options.text_encoder,
        options.vae,
        options.decode,
        *files_read(options),
    ]
    return check_output(
        output, options.overwrite, [path for path in (*read, *(path for path, _ in options.lora)) if path is not None]
    )


def rate_of(options: argparse.Namespace, variant) -> Fraction:
    """Return the frames a second of the video: what was asked for, or else the model's own. Another is told of."""
    fps = options.fps or Fraction(variant.fps)
    if fps != variant.fps:
        say(
            f"The video is to have {float(fps):.4g} frames a second, and the model was trained at {variant.fps}: what "
            "moves may be too fast or too slow."
        )
    return fps
