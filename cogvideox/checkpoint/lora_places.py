"""Where the file of a LoRA is, of which it or a folder that trainers wrote is given. No weights are opened here."""

import os
from pathlib import Path

from ..words import listed, short
from .entries import cached_repository, names_in, not_cached, subfolders
from .folders import is_checkpoint, sat_weights, snapshot
from .weight_sets import LORAS

_SAFETENSORS, PICKLES = (".safetensors", ".sft"), (".pt", ".pth", ".ckpt", ".bin")
#: What a LoRA in a folder of its own is called, and what its optimizer's and other states are called beside it.
_FILES = tuple(f"{name}{end}" for end in (".safetensors", ".bin") for name in LORAS)
_STATES = ("optimizer", "scheduler", "random_states", "rng_state", "training_args", "scaler", "sampler")
#: Folders below the one that was given that are looked into, and levels of them: trainers write ``checkpoint-500/``.
_MOST_FOLDERS, _LEVELS = 200, 3


def find_lora(path: Path) -> Path:
    """The file of a LoRA, of which it or a folder that trainers wrote is given, or a repository in the Hugging Face
    cache.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if not os.path.exists(path):
        cached = cached_repository(path)
        if cached is None:
            raise ValueError(f"There is no LoRA {short(path, 400)}. Check the path.{not_cached(path)}")
        path = cached
    if not os.path.isdir(path):
        return path
    path = snapshot(path) or path
    if is_checkpoint(path):
        raise ValueError(
            f"{short(path, 400)} is a CogVideoX checkpoint and no LoRA. A model is loaded with CogVideoX-1.5 Model "
            "Loader, or --model."
        )
    folders = [path]
    for _ in range(_LEVELS):
        found = {folder: files for folder in folders if (files := weights_in(folder))}
        if len(found) > 1:
            raise ValueError(
                f"{short(path, 400)} holds {len(found)} LoRAs, in "
                f"{listed(folder.relative_to(path).as_posix() for folder in found)}, and which is meant is not known. "
                "Give the path of one of them."
            )
        for files in found.values():
            if len(files) > 1:
                raise ValueError(
                    f"{short(path, 400)} holds {len(files)} files that can be the LoRA "
                    f"({listed(file.name for file in files)}), and which is meant is not known. Give the path of one "
                    "of them."
                )
            return files[0]
        inside = [inner for folder in folders for inner in subfolders(folder)]
        folders = [inner for inner in inside if os.access(inner, os.R_OK | os.X_OK)][:_MOST_FOLDERS]
    raise ValueError(
        f"{short(path, 400)} is a folder without a LoRA in it: no adapter_model.safetensors, "
        "pytorch_lora_weights.safetensors or other file of weights. Check the path, or give that of the file."
    )


def weights_in(folder: Path) -> list[Path]:
    """The files in a folder that can be the LoRA: the one with a usual name, else those that are no trainer's
    states."""
    usual = next((folder / name for name in _FILES if os.path.isfile(folder / name)), None) or sat_weights(folder)
    if usual is not None:
        return [usual]
    for endings in (_SAFETENSORS, PICKLES):
        found = [
            folder / name
            for name in names_in(folder)
            if name.lower().endswith(endings) and not name.startswith(_STATES) and os.path.isfile(folder / name)
        ]
        if found:
            return found
    return []
