"""What of a model folder is CogVideoX: each checkpoint, text encoder and VAE once, with what it is, seen in configs and headers.

What a file is, is remembered by its path, size and time, so that a list that was made once is made again in milliseconds.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..dependencies import DependencyError
from ..files import read_json
from ..precision.hardware import dtype_name
from ..variants import identify
from ..words import reason, short
from .folders import holds_shards, is_shard, may_be_checkpoint, repository_name, sat_weights, snapshot, transformer_folders
from .layout import PARTS, open_checkpoint, read_any_header, stored_bytes
from .naming import find_parts
from .shapes import infer_config

logger = logging.getLogger(__name__)

#: Between the name of an entry and what it is.
SEPARATOR = " · "
# One of these names stands in the header of every CogVideoX file; looking for it costs less than parsing the header.
_MARKERS = (b"patch_embed.text_proj.weight", b"encoder.block.0.layer.0.SelfAttention.q.weight", b"norm1.conv_y.conv.weight")
_LISTED = (".safetensors", ".sft", ".gguf")
#: Folders below a root that are looked into, levels and how many: beyond that it is no folder of models, or a link leads back into it.
_DEEPEST, _MOST_FOLDERS = 8, 20_000
_PASSED_OVER = (".git", ".cache", ".locks", ".ipynb_checkpoints", "__pycache__")
#: Files of a folder whose sizes and times are looked at to see whether it changed.
_MOST_FILES = 500
_STEP = re.compile(r"checkpoint-\d+")
#: Bytes at the start of a GGUF file that hold the names of its first tensors.
_GGUF_HEAD = 1 << 20
#: A layer of a CogVideoX block as a LoRA names it in its header, and what only other models' blocks have (LTX's second attention, U-Nets' levels).
_LORA_LAYER = re.compile(rb'["._](transformer_blocks[._]\d+[._](attn1|ff|norm[12])|blocks[._]\d+[._](q|k|v|attn_out|ff_proj|ff_out))[._][^"]*lora')
_OTHER_LORAS = (b"attn2", b"down_blocks", b"up_blocks", b"single_transformer_blocks")
_known: dict[tuple, dict[str, str]] = {}


@dataclass(frozen=True)
class Entry:
    """A checkpoint or part that can be chosen.

    Attributes:
        name: its path below the folder it was found in, with forward slashes: what is chosen by.
        what: ``CogVideoX1.5-5B-I2V · bf16 · diffusers``, without what the name says already.
        path: where it lies.
    """

    name: str
    what: str
    path: Path

    @property
    def label(self) -> str:
        return f"{self.name}{SEPARATOR}{self.what}" if self.what else self.name


def list_checkpoints(folder_roots: Iterable[Path], file_roots: Iterable[Path]) -> list[Entry]:
    """Every checkpoint below the roots: folders of diffusers and SAT, fine-tunes and caches below any of them, single files below ``file_roots``; the
    first of a name counts."""
    entries: dict[str, Entry] = {}
    folder_roots, file_roots = list(folder_roots), list(file_roots)
    looked = {root: _look(root) for root in dict.fromkeys((*folder_roots, *file_roots))}
    #: Folders of checkpoints that are listed, and what lies in them.
    listed: set[Path] = set()
    for folders, _ in looked.values():
        for name, folder in folders:
            inside = folder.parent in listed
            # The steps of a training are checkpoints of their own, also beside its result.
            found = [] if name in entries or (inside and not _STEP.fullmatch(folder.name)) else _folder_entries(name, folder)
            entries |= {entry.name: entry for entry in found if entry.name not in entries}
            if inside or found or name in entries:
                listed.add(folder)
    for entry in _file_entries((looked[root][1] for root in file_roots), "transformer"):
        entries.setdefault(entry.name, entry)
    return list(entries.values())


def list_parts(kind: str, roots: Iterable[Path]) -> list[Entry]:
    """Every file below the roots that holds a part of ``kind``, or can be a ``lora`` of a CogVideoX transformer, by the names in its header."""
    entries: dict[str, Entry] = {}
    for entry in _file_entries((_look(root)[1] for root in roots), kind):
        entries.setdefault(entry.name, entry)
    return list(entries.values())


def find_entry(entries: Iterable[Entry], chosen: str) -> Entry | None:
    """The entry that was chosen by its label or its name, in whichever system; what it is may have changed since, or the folder it lies in."""
    entries, chosen = list(entries), chosen.strip().replace("\\", "/")
    for name in (chosen, *(chosen[: match.start()] for match in reversed(list(re.finditer(re.escape(SEPARATOR), chosen))))):
        found = [entry for entry in entries if name in (entry.name, entry.label)]
        found = found or [entry for entry in entries if name and f"/{entry.path.as_posix()}".endswith(f"/{name}")]
        if len(found) == 1:
            return found[0]
    return None


def _folder_entries(name: str, folder: Path) -> list[Entry]:
    """The checkpoints of a folder of a name; what cannot be looked at costs itself alone."""
    try:
        inside = snapshot(folder) or folder
        found = transformer_folders(inside)
        # Names that stay when another, such as the other of transformer_T2V/ and transformer_I2V/, comes to lie beside it.
        places = {name if place.name == "transformer" or place == inside else f"{name}/{place.name}": place for place in found}
        if not found and (sat_weights(inside) is not None or holds_shards(inside)):
            places = {name: inside}
        entries = []
        for label, place in places.items():
            # By the folder itself, so that what is newest in a cache is opened; and its other parts belong to it.
            path = folder if label == name else place
            what = _remember(path, _describe_folder, _state(inside)).get("transformer")
            if what:
                entries.append(Entry(label, _without(what, label), path))
        return entries
    except (OSError, ValueError) as error:
        logger.info("%s is passed over: %s", folder, error)
        return []


def _file_entries(looked: Iterable[dict[str, tuple[str, os.stat_result]]], kind: str) -> list[Entry]:
    entries = []
    for files in looked:
        for path, (name, stat) in sorted(files.items()):
            what = _remember(path, _describe_lora if kind == "lora" else _describe_file, (stat.st_size, stat.st_mtime_ns)).get(kind)
            if what:
                entries.append(Entry(name, _without(what, name), Path(path)))
    return entries


def _look(root: Path, endings: tuple[str, ...] = _LISTED) -> tuple[list[tuple[str, Path]], dict[str, tuple[str, os.stat_result]]]:
    """What lies below a root: folders that may be checkpoints, by their names, in their order; and files with one of these endings, less those of
    parts in folders of their own and single shards, with name, size and time from the same look."""
    folders: list[tuple[str, Path]] = []
    files: dict[str, tuple[str, os.stat_result]] = {}
    todo, looked = [(str(root), "", 0)], 0
    while todo:
        path, name, depth = todo.pop()
        looked += 1
        if looked > _MOST_FOLDERS:
            logger.warning("%s has more than %d folders: the rest is not looked into. Move the models to a folder of their own.", root, _MOST_FOLDERS)
            break
        try:
            with os.scandir(path) as found:
                here = sorted(found, key=lambda entry: entry.name)
        except FileNotFoundError:
            # ComfyUI registers folders that need not be there.
            continue
        except OSError as error:
            logger.info("A folder is passed over: %s", error)
            continue
        names = {entry.name for entry in here}
        if depth and "snapshots" in names and os.path.basename(path).startswith(("models--", "datasets--", "spaces--")):
            cached = _cached(Path(path), name)
            if cached is not None:
                folders.append((cached[1], Path(path)))
                todo.append((*cached, depth + 1))
            continue
        if depth and "config.json" in names:
            folders.append((name, Path(path)))
            continue
        below = []
        for entry in here:
            inner = f"{name}/{entry.name}" if name else entry.name
            try:
                if entry.is_dir():
                    if depth < _DEEPEST and entry.name not in _PASSED_OVER and not _leads_back(entry):
                        below.append((entry.path, inner, depth + 1))
                elif entry.name.lower().endswith(endings) and not is_shard(entry.name):
                    files[entry.path] = inner, entry.stat()
            except OSError as error:
                logger.info("%s is passed over: %s", entry.path, error)
        if depth and (below or may_be_checkpoint(names)):
            folders.append((name, Path(path)))
        todo += reversed(below)
    return folders, files


def _cached(folder: Path, name: str) -> tuple[str, str] | None:
    """The files of a repository in the Hugging Face cache, and the name they are known by: that of the repository."""
    try:
        inside = snapshot(folder) if folder.name.startswith("models--") else None
    except (OSError, ValueError) as error:
        logger.info("%s is passed over: %s", folder, error)
        return None
    above = name.rpartition("/")[0]
    return None if inside is None else (str(inside), "/".join(filter(None, (above, repository_name(folder)))))


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a link leads to a folder that it lies in."""
    return entry.is_symlink() and f"{os.path.realpath(os.path.dirname(entry.path))}{os.sep}".startswith(f"{os.path.realpath(entry.path)}{os.sep}")


def _state(folder: Path) -> tuple:
    """What changes when a file of a checkpoint does: name, size and time of each. A transformer's folder is one of its checkpoint's."""
    state, todo = [], [(str(folder.parent if folder.name.startswith("transformer") else folder), 0)]
    while todo and len(state) < _MOST_FILES:
        path, depth = todo.pop()
        with os.scandir(path) as found:
            for entry in found:
                if depth < 2 and entry.is_dir():
                    todo.append((entry.path, depth + 1))
                elif os.path.exists(entry.path):
                    stat = entry.stat()
                    state.append((entry.path, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(state))


def _remember(path: Path | str, describe: Callable[[Path], dict[str, str]], state: tuple) -> dict[str, str]:
    """What ``describe`` says of a file or folder, by kind; asked once as long as its ``state`` stays the same."""
    key = (describe.__name__, str(path), state)
    if key not in _known:
        try:
            _known[key] = describe(Path(path))
        except (OSError, ValueError, DependencyError) as error:
            # What cannot be read is not offered; opening it would say why.
            logger.info("%s is passed over: %s", path, error)
            _known[key] = {}
        except Exception as error:
            # Nothing should come here. But one file that was not thought of is to take no others away: without the list no model can be chosen.
            logger.warning("%s is passed over: %s: %s", short(path, 400), type(error).__name__, reason(error))
            _known[key] = {}
    return _known[key]


def _describe_folder(place: Path) -> dict[str, str]:
    try:
        checkpoint = open_checkpoint(place)
    except ValueError as error:
        transformer = next(iter(transformer_folders(snapshot(place) or place)), None)
        if transformer is None:
            raise
        # Offered all the same: to be told what is missing is more use than to look for it in vain.
        logger.info("%s is not whole: %s", place, error)
        return {"transformer": SEPARATOR.join([short(identify(read_json(transformer / "config.json")).name), "incomplete", "diffusers"])}
    transformer = checkpoint.part("transformer")
    incomplete = [f"{PARTS[kind][0]} incomplete" for kind in checkpoint.incomplete]
    return {"transformer": SEPARATOR.join([checkpoint.variant.name, _dtypes(transformer.stored), transformer.layout, *incomplete])}


def _describe_file(path: Path) -> dict[str, str]:
    """The CogVideoX parts of a file: kind -> what it is."""
    if path.suffix.lower() in _LISTED:
        head = _head(path)
        if not any(marker in head for marker in _MARKERS):
            return {}
    described = {}
    for part in find_parts(read_any_header(path), path):
        stored = stored_bytes(part.tensors)
        names = {"transformer": lambda part=part: identify(infer_config("transformer", part.tensors, path)).name, "vae": lambda: "CogVideoX VAE"}
        name = names.get(part.kind, lambda: "T5 encoder")()
        described.setdefault(part.kind, SEPARATOR.join([name, _dtypes(stored), part.layout]))
    return described


def _describe_lora(path: Path) -> dict[str, str]:
    """``lora`` for a LoRA whose layers are called as CogVideoX's; whether their sizes fit is seen when it is applied to a model."""
    head = _head(path) if path.suffix.lower() in (".safetensors", ".sft") else b""
    return {"lora": "LoRA"} if _LORA_LAYER.search(head) and not any(mark in head for mark in _OTHER_LORAS) else {}


def _head(path: Path) -> bytes:
    """The bytes at a file's start that hold its tensors' names (of a GGUF file, the first of them)."""
    with path.open("rb") as file:
        length = _GGUF_HEAD if path.suffix.lower() == ".gguf" else int.from_bytes(file.read(8), "little")
        return file.read(min(length, 100_000_000))


def _dtypes(stored: dict[torch.dtype | str, int]) -> str:
    """The dtype that most bytes are in."""
    return dtype_name(next(iter(stored), torch.float32)).split(" (")[0]


def _without(what: str, name: str) -> str:
    """What it is, less what its name says already."""
    first, *rest = what.split(SEPARATOR)
    return SEPARATOR.join(rest if first in name else [first, *rest])
