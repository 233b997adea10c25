"""ComfyUI's model folders: what lies in them, and where the file is that was chosen."""

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...cogvideox.files import write_whole
from ...cogvideox.words import listed, reason, short
from . import comfyui

if TYPE_CHECKING:
    from ...cogvideox.checkpoint.catalogue import Entry

logger = logging.getLogger(__name__)

#: The pack's own folder under models/, and the one ComfyUI has for checkpoints in the diffusers layout.
_FOLDERS = ("CogVideo", "diffusers")
_PART_FOLDERS = {"text_encoder": "text_encoders", "vae": "vae"}

if comfyui.IN_COMFYUI:
    comfyui.folder_paths.add_model_folder_path("CogVideo", str(Path(comfyui.folder_paths.models_dir) / "CogVideo"))


def checkpoints() -> "list[Entry]":
    """List the CogVideoX checkpoints in ComfyUI's model folders and in the Hugging Face cache: folders in the layouts
    of diffusers and SAT, and single files."""
    from ...cogvideox.checkpoint.catalogue import list_checkpoints
    from ...cogvideox.checkpoint.folders import hub_cache

    return list_checkpoints(
        [*_roots(*_FOLDERS), *([hub_cache()] if comfyui.IN_COMFYUI else [])],
        _roots("CogVideo", "diffusion_models", "checkpoints"),
    )


def parts(kind: str, beside: "Iterable[Entry] | None" = None) -> "list[Entry]":
    """List the text encoders or VAEs that run with one of the checkpoints that are there, the most exact (the least
    rounded) first, and Flan-T5s, which are others than CogVideoX was trained with, last.

    Args:
        beside: what ``checkpoints`` gave, where it was asked already: looking through large folders takes its time.
    """
    from ...cogvideox.checkpoint.catalogue import list_parts

    widths = {0, *(entry.width for entry in (checkpoints() if beside is None else beside))}
    # Where no checkpoint tells the width it reads, any text encoder may be the right one.
    found = [entry for entry in list_parts(kind, _roots(_PART_FOLDERS[kind])) if widths == {0} or entry.width in widths]
    return sorted(found, key=lambda entry: ("flan" in entry.name.lower(), entry.rounding))


def loras() -> list[str]:
    """List the LoRAs in ComfyUI's folders that may be for CogVideoX, by their path below the folder."""
    from ...cogvideox.checkpoint.catalogue import list_parts

    return [entry.name for entry in list_parts("lora", _lora_roots())]


def checkpoint_path(choice: str) -> Path:
    """Find the checkpoint that was chosen by its label or name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's model folders hold no such checkpoint, or one that cannot run.
    """
    from ...cogvideox.checkpoint.layout import open_checkpoint

    if not comfyui.IN_COMFYUI:
        return _typed(choice, "checkpoint")
    found = checkpoints()
    path = _chosen(choice, found, _roots(*_FOLDERS, "diffusion_models"), open_checkpoint)
    if path is not None:
        return path
    places = _places(_roots(*_FOLDERS))
    if not found:
        raise ValueError(
            "No CogVideoX checkpoint is here, so there is nothing to load. Add the node CogVideoX-1.5 Downloader, "
            "which brings one, or download one yourself, for example zai-org/CogVideoX1.5-5B from huggingface.co: its "
            f"folder goes into {places}, a single file into {_places(_roots('diffusion_models', 'checkpoints'))}. Then "
            "press R to refresh."
        )
    choice = _name(choice)
    raise ValueError(
        f"There is no CogVideoX checkpoint called {short(repr(choice))} in {places}. Choose one that is there "
        f"({listed((entry.name for entry in found), 20)}), or put {short(choice)} there and press R to refresh."
    )


def part_path(kind: str, choice: str) -> Path:
    """Find the text encoder or VAE that was chosen by its label or name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's model folders hold no such file, or one that cannot run.
    """
    from ...cogvideox.checkpoint.layout import open_part

    what = kind.replace("_", " ")
    if not comfyui.IN_COMFYUI:
        return _typed(choice, what)
    found, roots = parts(kind), _roots(_PART_FOLDERS[kind])
    path = _chosen(choice, found, roots, partial(open_part, kind=kind))
    if path is not None:
        return path
    choice = _name(choice)
    raise ValueError(
        f"There is no {what} for CogVideoX called {short(repr(choice))} in {_places(roots)} (there: "
        f"{listed((entry.name for entry in found), 20) or 'none'}). Choose another, or auto."
    )


def lora_path(choice: str) -> Path:
    """Find the LoRA that was chosen by its name; outside ComfyUI ``choice`` is a path.

    Raises:
        ValueError: if ComfyUI's folders hold no such file.
    """
    from ...cogvideox.checkpoint.catalogue import find_entry, list_parts

    if not choice:
        raise ValueError(
            "No LoRA is chosen, so there is none to apply. Put one into models/loras, press R to refresh, and choose "
            "it in lora_name."
        )
    if not comfyui.IN_COMFYUI:
        return _typed(choice, "LoRA")
    roots = _lora_roots()
    # A workflow that was made on Windows has backslashes in the name.
    for name in (choice, choice.replace("\\", "/")):
        path = _below(roots, name, os.path.isfile)
        if path is not None:
            return path
    entry = find_entry(list_parts("lora", roots), choice)
    if entry is not None:
        # The list shows its name cut, or without letters that cannot be printed.
        return entry.path
    raise ValueError(
        f"There is no LoRA called {short(repr(choice))} in {_places(roots)}. Put it there and press R to "
        "refresh, or choose another."
    )


def _typed(choice: str, what: str) -> Path:
    """Read a path that was typed in, outside ComfyUI.

    Raises:
        ValueError: if nothing is there.
    """
    try:
        path = Path(choice)
        os.stat(path)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"There is no {what} at {short(repr(choice), 400)} ({reason(error)}), so it cannot be loaded. Check the "
            "path."
        ) from error
    return path


def _chosen(choice: str, found: "list[Entry]", roots: Iterable[Path], open_it: Callable[[Path], object]) -> Path | None:
    """Find a choice among the files that are offered, else among all that lie in the folders; None if it is nowhere.

    Args:
        open_it: opens a file that lies there without being offered, and raises ValueError saying why it is not.
    """
    from ...cogvideox.checkpoint.catalogue import find_entry

    entry = find_entry(found, choice)
    if entry is not None:
        return entry.path
    path = _below(roots, _name(choice), os.path.exists)
    if path is not None:
        open_it(path)
    return path


def _name(choice: str) -> str:
    """Return the name that a label of a list begins with, without what the file is."""
    from ...cogvideox.checkpoint.catalogue import SEPARATOR

    return choice.split(SEPARATOR)[0]


def _below(roots: Iterable[Path], name: str, is_there: Callable[[Path], bool]) -> Path | None:
    """Find what has this name below one of the folders, never beside them."""
    places = [(root, root / name) for root in roots if name and ".." not in Path(name).parts]
    return next((place for root, place in places if place.is_relative_to(root) and is_there(place)), None)


def _places(roots: list[Path]) -> str:
    return ", ".join(short(root, 400) for root in roots)


def _lora_roots() -> list[Path]:
    return _roots("loras") + [root / "loras" for root in _roots("CogVideo")]


def _roots(*names: str) -> list[Path]:
    """List the folders that ComfyUI registers under these names."""
    if not comfyui.IN_COMFYUI:
        return []
    paths = comfyui.folder_paths
    registered = [
        path for name in names if name in paths.folder_names_and_paths for path in paths.get_folder_paths(name)
    ]
    return list(dict.fromkeys(Path(path) for path in registered))


def download_folder() -> Path:
    """Return the folder that downloaded checkpoints go to: the first of ComfyUI's CogVideo folders, or ``models`` in
    the working directory."""
    return _roots("CogVideo")[0] if comfyui.IN_COMFYUI else Path("models")


def embedding_file(name: str) -> Path:
    """Return where a prompt's embedding of a name is kept, or would be: in the folder ``prompt_embeddings`` of the
    first of ComfyUI's CogVideo folders that has it, or of ``models`` in the working directory."""
    roots = _roots("CogVideo") if comfyui.IN_COMFYUI else [Path("models")]
    places = [root / "prompt_embeddings" / name for root in roots]
    return next((place for place in places if place.is_file()), places[0])


def tokenizer_folder() -> Path | None:
    """Find the T5 tokenizer that ComfyUI ships, for text encoders in files of their own."""
    if not comfyui.IN_COMFYUI:
        return None
    folder = Path(comfyui.comfy.utils.__file__).parent / "text_encoders" / "t5_tokenizer"
    return folder if folder.is_dir() else None


def bring_example_clip() -> None:
    """Copy the clip that the example workflows name into ComfyUI's input folder, where Load Video looks for it, unless
    a file is there by its name. Where it cannot be copied, the example asks for another one."""
    if not comfyui.IN_COMFYUI:
        return
    folder = Path(comfyui.folder_paths.get_input_directory())
    try:
        for clip in (Path(__file__).parents[2] / "example_workflows" / "input").glob("*.mp4"):
            if not os.path.lexists(folder / clip.name):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / clip.name, clip.read_bytes())
    except (OSError, ValueError) as error:
        logger.info("The clip of the example workflows was not copied into %s: %s", folder, reason(error))
