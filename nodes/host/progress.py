"""ComfyUI's progress bar, its Cancel button and its previews, and the latents that are saved when memory runs out."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...cogvideox.events import Events
from . import comfyui, page

if TYPE_CHECKING:
    from PIL.Image import Image


class NodeEvents(Events):
    """What the engine tells, to where a person sees it: the node's progress bar, its text and its preview.

    Progress stops the run where the user pressed Cancel.
    """

    def __init__(self, fps: int = 0):
        """Args:
        fps: frames a second of the video that steps are shown of.
        """
        self._fps = fps
        self._bars: dict[str, Any] = {}

    def check_cancelled(self) -> None:
        if comfyui.IN_COMFYUI:
            comfyui.comfy.model_management.throw_exception_if_processing_interrupted()

    def note(self, text: str, level: int = logging.WARNING) -> None:
        super().note(text, level)
        page.show(text)

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        self._update(what, done, total)

    def step(self, done: int, total: int, clean: torch.Tensor) -> None:
        """Show a preview of the video so far, where ComfyUI's setting asks for one.

        It is an animated PNG: pages that show it as an image play it, others show its first frame.
        """
        preview = None
        if comfyui.IN_COMFYUI:
            self.check_cancelled()
            arguments = comfyui.comfy.cli_args
            if arguments.args.preview_method != arguments.LatentPreviewMethod.NoPreviews:
                preview = _preview(clean, self._fps, getattr(arguments.args, "preview_size", 512))
        self._update("sampling", done, total, preview)

    def _update(self, what: str, done: int, total: int, preview: tuple | None = None) -> None:
        self.check_cancelled()
        if comfyui.IN_COMFYUI:
            if what not in self._bars:
                self._bars[what] = comfyui.comfy.utils.ProgressBar(1)
            self._bars[what].update_absolute(done, total, preview)


def _preview(clean: torch.Tensor, fps: int, size: int) -> tuple:
    """Make what ComfyUI's progress bar sends to the page of predicted clean latents."""
    from ...cogvideox.preview import preview_frames
    from ...cogvideox.variants import TEMPORAL_COMPRESSION

    frames = preview_frames(clean, size)
    first: Any = frames[0]
    # The server asks the picture to save itself, and knows of one frame only.
    first.save = partial(_save_animation, frames, 1000 * TEMPORAL_COMPRESSION // fps)
    return ("PNG", first, None)


def _save_animation(frames: "list[Image]", milliseconds: int, file, *_, **__) -> None:
    type(frames[0]).save(
        frames[0], file, "PNG", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, compress_level=1
    )


@contextmanager
def saving_latents(samples: torch.Tensor | None = None) -> Iterator[None]:
    """Save the latents if memory runs out for good: ``samples``, or those that the error brings. They go where Load
    Latent finds them, or else where they can be written, and the error says so.

    Raises:
        RuntimeError: with what ran out, and where the latents are, or why they are nowhere.
    """
    from ...cogvideox.sentinel import OutOfMemory
    from ...cogvideox.video import keep_latent

    try:
        yield
    except OutOfMemory as error:
        latents = samples if error.latents is None else error.latents
        if latents is None:
            raise
        said, folders = str(error), _latent_folders()
        try:
            path = keep_latent(latents, folders)
        except ValueError as why:
            raise RuntimeError(f"{said} The latents could not be kept either ({why})") from error
        if path.parent == folders[0]:
            raise RuntimeError(
                f"{error} The latents are not lost: {path.name} can be opened with Load Latent (it is {path})."
            ) from error
        raise RuntimeError(
            f"{said} The latents are not lost: they are in {path}. Move that file to ComfyUI's input folder, "
            "which cannot be written to now, and Load Latent opens it."
        ) from error


def _latent_folders() -> list[Path]:
    """List where latents can be saved; Load Latent looks into the first."""
    if not comfyui.IN_COMFYUI:
        return [Path("."), Path(tempfile.gettempdir())]
    paths = comfyui.folder_paths
    return [
        Path(folder)
        for folder in (paths.get_input_directory(), paths.get_output_directory(), paths.get_temp_directory())
    ]
