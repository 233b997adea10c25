"""Making the video that ``generate.py`` is asked for, by one process or by several together."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox.dependencies import import_failure
from cogvideox.files import stem_of
from cogvideox.words import reason, short
from commands.job import DEFAULT_OUTPUT, Job, open_handles_of, prepared
from commands.ranks import FailedAlike, FailedAlone, Place
from commands.terminal import each_once, say, terminal_events, told
from commands.void import BOTH

if TYPE_CHECKING:
    import torch

    from cogvideox.events import Events
    from cogvideox.handles import Handles
    from cogvideox.modules.sharded import Split
    from cogvideox.precision.hardware import Hardware
    from commands.chain import Parts
    from commands.ranks import Ranks

#: Options that change no part of a long video, or in whose place is what they lead to.
_NOT_OF_PARTS = (
    *("seconds", "output", "overwrite", "fps", "image", "video", "keep_audio", "prompt", "negative"),
    *("debug", "device", "memory", "on_black", "plan", "split"),
)


@contextmanager
def company(options: argparse.Namespace, place: Place) -> "Iterator[Ranks | None]":
    """Join the other processes, if there are any, and something is to be made."""
    if place.count == 1 or options.plan or options.dry_run:
        yield None
        return
    from cogvideox.precision.hardware import Hardware
    from commands.ranks import joined

    with joined(place, Hardware.detect(options.device).device) as ranks:
        yield ranks


def once_for_all(ranks: "Ranks | None", work: "Callable[[], torch.Tensor]") -> "torch.Tensor":
    """Do something where one process does it for all."""
    return work() if ranks is None else ranks.same(work)


def check_team(job: Job, place: Place) -> "Split":
    """Choose how the processes share a video, and refuse what cannot be shared."""
    from cogvideox.requests import check_split
    from cogvideox.variants import full_config
    from commands.ranks import choose_split

    options, heads = job.options, full_config(job.model.weights.config)["num_attention_heads"]
    split = choose_split(options.split, place.count, options.cfg > 1, heads)
    check_split(job.model, split, job.latent.shape)
    return split


def say_plan(job: Job, place: Place) -> None:
    """Say what a video takes, and how much faster several cards are."""
    from cogvideox.memory import memory_text
    from cogvideox.sharing import expected_gain

    shape, guided = tuple(job.latent.shape), job.options.cfg > 1
    if place.count == 1:
        say(memory_text(job.model, shape, guided))
        return
    split = check_team(job, place)
    say(f"each card: {memory_text(job.model, shape, guided and split.guidance == 1, split.sequence)}")
    say(expected_gain(job.model, shape, split, guided, job.model.weights.hardware.name).text)


def say_skips(job: Job) -> None:
    """Say which steps TeaCache skips."""
    from cogvideox.skips import skips_text

    options = job.options
    skips = skips_text(job.model, options.steps, options.scheduler, job.denoise, (options.cfg, *options.cfg_range))
    if skips is not None:
        say(skips)


def encoded(job: Job, name: str, events: "Events") -> "torch.Tensor":
    """Encode the prompt, or the negative one: ``[1, tokens, width]``."""
    from cogvideox.text import encode_prompt

    weights = job.text_encoder.weights
    if weights.method is not None and not weights.is_loaded:
        say(weights.quantization_text(events))
    encoded = encode_prompt(job.text_encoder, job.texts[name], on_nan=job.options.on_nan, events=events)
    for note in encoded.notes:
        say(f"{name}: {note}")
    return encoded.embeddings


def sampled(
    job: Job,
    prompts: "Mapping[str, torch.Tensor]",
    events: "Events",
    ranks: "Ranks | None" = None,
    known: "torch.Tensor | None" = None,
    seed: int | None = None,
) -> "torch.Tensor":
    """Make a video's latents ``[1, 16, T, H/8, W/8]``, together with other processes if there are any.

    Args:
        known: the frames ``[overlap, H, W, 3]`` in 0..1 that a part of a longer video begins with.
        seed: of such a part, in the place of the video's own.
    """
    from cogvideox.sampling import sample
    from cogvideox.vae import encode

    options, source, latent = job.options, job.source, job.latent
    if job.model.weights.method is not None and not job.model.weights.is_loaded:
        say(job.model.weights.quantization_text(events))
    how: dict[str, Any] = dict(on_nan=options.on_nan, events=events)
    noise, device = job.noise, job.model.weights.device
    if job.warp is not None:
        noise = once_for_all(ranks, partial(job.warp.noise, latent, options.seed, device, events))
    clip, source.clip = source.clip, None
    image = None
    if known is not None or job.is_conditioned:
        image = once_for_all(ranks, lambda: _beside(job, clip, known, **how))
    if clip is not None and job.denoise < 1:
        latent = once_for_all(ranks, lambda: encode(job.handles.vae, clip, **how))
    team = None if ranks is None else ranks.team(check_team(job, ranks.place))
    with latents_kept(job.output) if ranks is None or ranks.place.is_first else nullcontext():
        return sample(
            job.model,
            prompts["prompt"],
            prompts.get("negative"),
            latent,
            image_latents=image,
            noise=noise,
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


def _beside(job: Job, clip: "torch.Tensor | None", known: "torch.Tensor | None", **how: Any) -> "torch.Tensor":
    """Make what a model reads beside the noise, ``[1, C, T, H/8, W/8]``, unscaled.

    Args:
        clip: of ``--video``, uint8 ``[frames, H, W, 3]``.
        known: frames in the place of it and of the images, as ``sampled`` has them.
        how: ``on_nan`` and ``events``, as ``vae.encode`` has them.
    """
    from cogvideox.going_on import known_frames
    from cogvideox.pictures import fit_size
    from cogvideox.vae import image_latents
    from commands.inpaint import make_conditioning

    source, vae, size = job.source, job.handles.vae, (job.source.width, job.source.height)
    mask = source.mask
    start, end = (
        None if picture is None else fit_size(picture, *size)
        for picture in (source.start if known is None else known[-1:], source.end)
    )
    if start is not None and job.model.variant.image_to_video:
        return image_latents(vae, start, source.frames, end, **how)
    if known is not None:
        (clip, mask), start = known_frames(known, source.frames, len(known)), None
    return make_conditioning(job.options, vae, clip, source.frames, size, (start, end), mask, **how)


def make_chain(job: Job, parts: "Parts", make: "Callable[..., torch.Tensor]") -> None:
    """Make a long video of parts, those that are kept included, and write it.

    Args:
        make: ``make(known=frames, seed=seed)`` returns the latents of a part.
    """
    from cogvideox.pictures import fit_size
    from commands.chain import make_video, parts_folder

    options, source = job.options, job.source
    start = None if source.start is None else fit_size(source.start, source.width, source.height)
    start = start if job.before is None else job.before[-parts.overlap :]
    settings = {name: value for name, value in vars(options).items() if name not in _NOT_OF_PARTS} | job.texts
    settings |= {"width": source.width, "height": source.height, "frames": source.frames, "overlap": parts.overlap}
    settings = json.loads(json.dumps(settings, default=lambda value: str(value)))
    # Another that has its name since makes other parts.
    loras = ((str(lora.path), lora.path.stat()) for lora in job.model.loras)
    settings["files"] = [
        *job.handles.checkpoint.fingerprint,
        *((name, found.st_size, found.st_mtime_ns) for name, found in loras),
    ]
    settings["pixels"] = hashlib.sha256(b"" if start is None else start.numpy().tobytes()).hexdigest()
    folder = parts_folder(job.output, settings)
    with latents_kept(job.output):
        images = make_video(
            parts,
            folder,
            settings,
            (source.width, source.height),
            job.latent.shape,
            job.before,
            options.seed,
            lambda known, seed: make(known=known, seed=seed),
            lambda latent: decoded(options, job.handles.vae, latent),
            say,
        )
    write(options, images, job.output, source.fps, source.sound)
    say(
        f"The parts are kept in {folder}: with --overwrite and more --seconds they are used again. Delete them when "
        "the video is as wanted."
    )


@contextmanager
def latents_kept(output: Path, latent=None) -> Iterator[None]:
    """Where something fails that follows the sampling, or memory runs out within it, keep the latents in a file, and
    say where.

    Raises:
        RuntimeError: with what failed, and how to go on from there.
    """
    from cogvideox.video import keep_latent

    try:
        yield
    except Exception as error:
        # Whatever it was: what took minutes to make is not to be lost with it.
        latent = getattr(error, "latents", latent)
        if latent is None:
            raise
        cause = import_failure(error) or error
        known = isinstance(cause, ValueError | RuntimeError)
        said = (
            str(cause) if known else f"Something failed after the sampling ({type(error).__name__}: {reason(error)})."
        )
        try:
            path = keep_latent(latent, _folders(output), stem_of(output))
        except ValueError as why:
            raise RuntimeError(f"{said} The latents could not be kept either ({why})") from error
        raise RuntimeError(
            f"{said} The latents are not lost: {short(path, 400)} has them, and --decode with that file and the "
            "same --model makes the video of them; --fps, and --video with --keep-audio, are given again if they were."
        ) from error


def _folders(output: Path) -> tuple[Path, ...]:
    """Return where what was made is kept if it cannot be where it was to go."""
    return output.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())


def finish(options: argparse.Namespace, vae, latent, output: Path, fps: Fraction, sound=None) -> None:
    """Decode latents, look for black frames, and write the video."""
    write(options, decoded(options, vae, latent), output, fps, sound)


def finish_job(job: Job, latent: "torch.Tensor") -> None:
    """Decode a video's latents, and write it; where that fails, keep them."""
    with latents_kept(job.output, latent):
        finish(job.options, job.handles.vae, latent, job.output, job.source.fps, job.source.sound)


def decoded(options: argparse.Namespace, vae, latent) -> "torch.Tensor":
    """Return the frames of latents, in which black ones were looked for."""
    from cogvideox.vae import decode

    images = decode(vae, latent, on_nan=options.on_nan, events=terminal_events())
    judge(options, images)
    return images


def judge(options: argparse.Namespace, images: "torch.Tensor") -> None:
    """Look for black frames, and do about them what the options say."""
    from cogvideox.black_frames import check_black_frames, enforce

    report = check_black_frames(images)
    say(report.text)
    enforce(report, options.on_black)


def write(options: argparse.Namespace, images: "torch.Tensor", output: Path, fps: Fraction, sound=None) -> None:
    """Write the frames ``[F, H, W, 3]``, and say where they are.

    Args:
        output: where, unless no place was asked for and this one was taken meanwhile.
        sound: as ``write_mp4`` takes it.

    Raises:
        ValueError: if the place is taken.
        RuntimeError: if writing fails.
    """
    from cogvideox.video import free_name, write_mp4

    if options.output is None and not options.overwrite:
        # Another run may have taken the name meanwhile.
        output = free_name(DEFAULT_OUTPUT)
    write_mp4(images, output, fps, events=terminal_events(), overwrite=options.overwrite, sound=sound)
    say(f"{output}: {len(images)} frames of {images.shape[2]}x{images.shape[1]} at {float(fps):.5g} fps")


def write_somewhere(
    options: argparse.Namespace, images: "torch.Tensor", output: Path, fps: Fraction, sound=None
) -> None:
    """Write frames of which there are no latents, as ``write`` does, or else in another folder.

    Raises:
        RuntimeError: with why they are not where they were to go, and where they are.
    """
    from cogvideox.video import free_name, write_mp4

    try:
        write(options, images, output, fps, sound)
    except (ValueError, RuntimeError) as error:
        for folder in _folders(output):
            other = free_name(folder / f"{stem_of(output)}.mp4")
            try:
                write_mp4(images, other, fps, events=terminal_events(), sound=sound)
            except (ValueError, RuntimeError):
                continue
            raise RuntimeError(f"{error} The video is not lost: it is in {short(other, 400)}.") from error
        raise


class Work:
    """Makes one video after the other, with checkpoints that stay open from one to the next."""

    #: What is raised where no other video can be made either.
    ends_all: tuple[type[Exception], ...] = (BrokenPipeError, FailedAlone)

    def __init__(self, events: "Events", place: Place):
        self._events, self._place = events, place
        #: The processes that make each video together, if any do.
        self.ranks: Ranks | None = None
        #: Whether this process tries whether videos can be written: not where another does.
        self.writes = place.is_first
        self._open: dict[tuple, Handles] = {}
        # Weights live as long as a handle has them.
        self._handles: list[Any] = []
        self._said = set[str]()

    def prepared(self, options: argparse.Namespace) -> Job:
        """Check all of a video; no weights are read."""
        # It is asked again before the video is made; what it says is said once for all lines.
        with each_once(self._said):
            job = prepared(options, self._events, self._opened, self.writes)
        if job.parts is not None:
            raise ValueError(
                "--seconds makes one long video in parts, and --prompts makes many videos. Leave --seconds out, or "
                "make the long video by itself."
            )
        if options.stage == BOTH:
            raise ValueError(
                "--stage both makes two videos, and --prompts one of each line. Give --stage first, and then --stage "
                "second with a first_pass in each line."
            )
        self._handles += [job.model, job.text_encoder]
        return job

    def agreed(self, options: argparse.Namespace) -> Job:
        """Check it once more, before it is made, and fail where another process that makes it, too, does."""
        if self.ranks is None:
            return self.prepared(options)
        job: Job | None = None
        failed: Exception | None = None
        try:
            job = self.prepared(options)
        except Exception as error:
            failed = error
        # What one alone fails of, all leave: they would wait for it.
        said = next(filter(None, self.ranks.gathered("" if failed is None else told(failed))), "")
        if job is None or said:
            raise FailedAlike(said.removeprefix("error: ")) from failed
        return job

    def _opened(self, options: argparse.Namespace, hardware: "Hardware") -> "Handles":
        names = ("model", "text_encoder", "vae", "tokenizer", "dtype", "on_mismatch", "memory")
        key = tuple(getattr(options, name) for name in names)
        if key not in self._open:
            self._open[key] = open_handles_of(options, hardware)
        return self._open[key]

    def encoded(self, job: Job, name: str) -> "torch.Tensor":
        """Encode the prompt, or the negative one."""
        return once_for_all(self.ranks, partial(encoded, job, name, self._events))

    def sampled(self, job: Job, prompts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """Make the latents."""
        from cogvideox.sentinel import NonFiniteError

        say_skips(job)
        try:
            return sampled(job, prompts, self._events, self.ranks)
        except (ValueError, NonFiniteError, FailedAlike):
            raise
        except Exception as error:
            if self.ranks is None:
                raise
            raise FailedAlone(str(error) or type(error).__name__) from error

    def finished(self, job: Job, latent: "torch.Tensor") -> None:
        """Decode, check and write them, where this process is the one that does."""
        if self.ranks is None or self._place.is_first:
            finish_job(job, latent)

    def kept(self, job: Job, latent: "torch.Tensor") -> str:
        """Write latents that are not to be decoded now; say where they are."""
        from cogvideox.video import write_latent

        path = write_latent(latent, job.output.absolute().parent, stem_of(job.output))
        return f"{path} has the latents of {job.output}; --decode makes the video of them."

    def decodes_later(self, job: Job) -> bool:
        """Say whether the VAE has to wait until all videos are sampled, as the transformer cannot make way for it."""
        return job.model.weights.is_stuck
