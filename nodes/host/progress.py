"""ComfyUI's progress bar, its Cancel button and its previews, and the latents that are saved when memory runs out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from . import comfyui
from .page import show

if TYPE_CHECKING:
    from PIL.Image import Image


class VAECallbacks(TypedDict):
    """The callbacks that the engine's encode and decode share."""

    on_chunk: Callable[..., None]
    on_load: Callable[..., None]
    on_heal: Callable[[str], None]
    on_strip: Callable[[], None]


def stop_if_cancelled() -> None:
    """Stop the run here if the user pressed Cancel."""
    if comfyui.IN_COMFYUI:
        comfyui.comfy.model_management.throw_exception_if_processing_interrupted()


def progress() -> Callable[..., None]:
    """Make a callback ``(done, total, ...)`` that moves the node's progress bar, and stops the run if the user pressed
    Cancel."""
    if not comfyui.IN_COMFYUI:
        return lambda done, total, *_: None
    bar = comfyui.comfy.utils.ProgressBar(1)

    def report(done: int, total: int, *_) -> None:
        stop_if_cancelled()
        bar.update_absolute(done, total)

    return report


def sampling_progress(fps: int) -> Callable[[int, int, torch.Tensor], None]:
    """Make ``progress`` for the sampler, with a preview of the video so far, at the model's frames a second, where
    ComfyUI's setting asks for one.

    The preview is an animated PNG: pages that show it as an image play it, others show its first frame.
    """
    if not comfyui.IN_COMFYUI:
        return progress()
    arguments = comfyui.comfy.cli_args
    if arguments.args.preview_method == arguments.LatentPreviewMethod.NoPreviews:
        return progress()
    from ...cogvideox.preview import preview_frames
    from ...cogvideox.variants import TEMPORAL_COMPRESSION

    size, milliseconds = getattr(arguments.args, "preview_size", 512), 1000 * TEMPORAL_COMPRESSION // fps
    bar = comfyui.comfy.utils.ProgressBar(1)

    def report(done: int, total: int, clean: torch.Tensor) -> None:
        stop_if_cancelled()
        frames = preview_frames(clean, size)
        first: Any = frames[0]
        # The server asks the picture to save itself, and knows of one frame only.
        first.save = partial(_save_animation, frames, milliseconds)
        bar.update_absolute(done, total, ("PNG", first, None))

    return report


def _save_animation(frames: "list[Image]", milliseconds: int, file, *_, **__) -> None:
    type(frames[0]).save(
        frames[0], file, "PNG", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, compress_level=1
    )


def vae_callbacks() -> VAECallbacks:
    """Make the callbacks that bring what the engine's encode and decode tell to where a person sees it."""
    return dict(on_chunk=progress(), on_load=progress(), on_heal=show, on_strip=stop_if_cancelled)


@contextmanager
def saving_latents(samples: torch.Tensor | None = None) -> Iterator[None]:
    """Save the latents if memory runs out for good: ``samples``, or those that the error brings. They go where Load
    Latent finds them, and the error says so."""
    from ...cogvideox.sentinel import OutOfMemory
    from ...cogvideox.video import write_latent

    try:
        yield
    except OutOfMemory as error:
        latents = samples if error.latents is None else error.latents
        if latents is None:
            raise
        folder = Path(comfyui.folder_paths.get_input_directory()) if comfyui.IN_COMFYUI else Path(".")
        path = write_latent(latents, folder)
        raise RuntimeError(
            f"{error} The latents are not lost: {path.name} can be opened with Load Latent (it is {path})."
        ) from error
