"""What of a model folder is CogVideoX: each checkpoint, text encoder and VAE once, with what it is, seen in configs and headers.

What a file is, is remembered by its path, size and time, so that a list that was made once is made again in milliseconds.
"""

import hashlib
import json
import logging
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import open_regular
from ..precision.hardware import dtype_name
from ..variants import identify
from ..words import LIMIT, reason, short
from .headers import MAX_HEADER
from .layout import open_part, read_any_header, sat_weights, stored_bytes, transformer_folders
from .naming import find_parts
from .shapes import infer_config

logger = logging.getLogger(__name__)

#: Between the name of an entry and what it is.
SEPARATOR = " · "
# One of these names stands in the header of every CogVideoX file; looking for it costs less than parsing the header.
_MARKERS = (b"patch_embed.text_proj.", b"encoder.block.0.layer.0.SelfAttention.q.", b"norm1.conv_y.conv.weight")
_LISTED = (".safetensors", ".gguf")
#: Bytes at the start of a GGUF file that hold the names of its first tensors.
_GGUF_HEAD = 1 << 20
#: A layer of a CogVideoX block as a LoRA names it in its header, and what only other models' blocks have (LTX's second attention, U-Nets' levels).
_LORA_LAYER = re.compile(
    rb'["._](transformer_blocks[._]\d{1,4}[._](attn1|ff|norm[12])|blocks[._]\d{1,4}[._](q|k|v|attn_out|ff_proj|ff_out))[._][^"]{0,200}lora'
)
_OTHER_LORAS = (b"attn2", b"down_blocks", b"up_blocks", b"single_transformer_blocks")
#: Levels of folders that are looked into, and how often one folder is that links lead to again.
_DEEPEST, _MOST_VISITS = 64, 8
_known: dict[tuple[str, str, int, int], dict[str, str]] = {}
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Entry:
    """A checkpoint or part that can be chosen.

    Attributes:
        name: its path below the folder it was found in, with forward slashes, printable and of up to 80 letters: what is chosen by.
        what: ``CogVideoX1.5-5B-I2V · bf16 · diffusers``, without what the name says already.
        path: where it lies.
        size: its bytes, of a file.
    """

    name: str
    what: str
    path: Path
    size: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}{SEPARATOR}{self.what}" if self.what else self.name


def list_checkpoints(folder_roots: Iterable[Path], file_roots: Iterable[Path]) -> list[Entry]:
    """Every checkpoint below the roots: folders of diffusers and SAT one level below ``folder_roots``, single files anywhere below
    ``file_roots``; the first of a name counts."""
    entries: dict[str, Entry] = {}
    for root in folder_roots:
        for folder in _subfolders(root):
            for entry in _unless_bad(folder, _folder_entries, []):
                entries.setdefault(entry.name, entry)
    for entry in _file_entries(file_roots, "transformer"):
        entries.setdefault(entry.name, entry)
    return list(entries.values())


def list_parts(kind: str, roots: Iterable[Path]) -> list[Entry]:
    """Every file below the roots that holds a part of ``kind``, or can be a ``lora`` of a CogVideoX transformer, by the names in its header."""
    entries: dict[str, Entry] = {}
    for entry in _file_entries(roots, kind):
        entries.setdefault(entry.name, entry)
    return list(entries.values())


def find_entry(entries: Iterable[Entry], chosen: str) -> Entry | None:
    """The entry that was chosen by its label or its name; what it is may have changed since, and its name may be one that is cut in the list."""
    entries = list(entries)
    same = [entry for entry in entries if entry.label == chosen]
    same = same or [entry for entry in entries if f"{chosen}{SEPARATOR}".startswith(f"{entry.name}{SEPARATOR}")]
    same = same or [entry for entry in entries if entry.path.as_posix().endswith(f"/{chosen.split(SEPARATOR)[0]}")]
    return max(same, key=lambda entry: len(entry.name), default=None)


def _unless_bad(path: Path | str, look: Callable, otherwise):
    """What ``look`` says of a path; ``otherwise``, and a line in the log, where it cannot be looked at: one that is bad takes no other away."""
    try:
        return look(path)
    except Exception as error:
        # Of any kind: what lies in a models folder is not the list's to vouch for, and opening it would say what is wrong with it.
        _pass_over(path, error)
        return otherwise


def _pass_over(path: Path | str, error: Exception) -> None:
    """Say once in the log why something is not listed."""
    if (str(path), str(error)) not in _told:
        _told.add((str(path), str(error)))
        logger.info("%s is passed over: %s", short(path, 400), reason(error, 600))


def _shown(name: str) -> str:
    """A name as it stands in a list: one that is long or cannot be printed is cut, and ends in a number of its own."""
    if len(name) <= LIMIT and name.isprintable():
        return name
    number = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{short(name, LIMIT - len(number) - 1)}~{number}"


def _subfolders(root: Path) -> list[Path]:
    # By name: paths themselves compare differently on Windows, and the first of the list is the loader's default.
    names = _unless_bad(root, os.listdir, []) if os.path.isdir(root) else []
    return [root / name for name in sorted(names) if os.path.isdir(root / name)]


def _folder_entries(folder: Path) -> list[Entry]:
    found = transformer_folders(folder)
    # A name that stays when the other of transformer_T2V/ and transformer_I2V/ comes to lie beside it.
    places = [folder] if [transformer.name for transformer in found] == ["transformer"] else found
    if not found:
        weights = sat_weights(folder)
        if weights is None:
            return []
        what = _remember(weights, _describe_file).get("transformer")
        return [Entry(_shown(folder.name), _without(what, folder.name), folder)] if what else []
    entries = []
    for place, transformer in zip(places, found, strict=True):
        name = folder.name if place == folder else f"{folder.name}/{place.name}"
        what = _remember(transformer / "config.json", _describe_folder).get("transformer", "")
        entries.append(Entry(_shown(name), _without(what, name), place))
    return entries


def _file_entries(roots: Iterable[Path], kind: str) -> list[Entry]:
    entries = []
    for root in roots:
        for path, seen in sorted(_files(root).items()):
            what = _remember(path, _describe_lora if kind == "lora" else _describe_file, seen).get(kind)
            if what:
                name = Path(path).relative_to(root).as_posix()
                entries.append(Entry(_shown(name), _without(what, name), Path(path), seen.st_size))
    return entries


def _files(root: Path) -> dict[str, os.stat_result]:
    """Every safetensors and GGUF file below a root, less those of parts in folders of their own, with size and time from the same look."""
    found, visits = {}, {}
    # ComfyUI registers folders that need not be there.
    todo = deque([(str(root), ())] if os.path.isdir(root) else [])
    while todo:
        folder, above = todo.popleft()
        seen = _unless_bad(folder, os.stat, None)
        if seen is None:
            continue
        here = (seen.st_dev, seen.st_ino)
        visits[here] = visits.get(here, 0) + 1
        # A link may lead to a folder that it lies in, or two to each other's. Some network drives number no folders.
        if len(above) == _DEEPEST or (seen.st_ino and (here in above or visits[here] > _MOST_VISITS)):
            continue
        entries = {entry.name: entry for entry in _unless_bad(folder, _scan, [])}
        is_part = "config.json" in entries and bool(above)
        for entry in entries.values():
            try:
                if entry.is_dir():
                    # Links last: where they lead to may be in this tree, and is then called what it is called here.
                    (todo.append if entry.is_symlink() else todo.appendleft)((entry.path, (*above, here)))
                elif entry.name.endswith(_LISTED) and not is_part:
                    kept = entry.stat()
                    # A pipe or device that is called so is no file to read.
                    if stat.S_ISREG(kept.st_mode):
                        found[entry.path] = kept
            except OSError as error:
                _pass_over(entry.path, error)
    return found


def _scan(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return list(entries)


def _remember(path: Path | str, describe: Callable[[Path], dict[str, str]], seen: os.stat_result | None = None) -> dict[str, str]:
    """What ``describe`` says of a file, by kind; asked once as long as the file stays the same."""
    seen = seen or os.stat(path)
    key = (describe.__name__, str(path), seen.st_size, seen.st_mtime_ns)
    if key not in _known:
        # What cannot be read is not offered.
        _known[key] = _unless_bad(Path(path), describe, {})
    return _known[key]


def _describe_folder(config: Path) -> dict[str, str]:
    variant = identify(json.loads(config.read_text(encoding="utf-8"))).name
    try:
        stored = open_part(config.parent, "transformer").stored
    except ValueError:
        # Offered all the same: to be told what is missing is more use than to look for it in vain.
        return {"transformer": SEPARATOR.join([variant, "incomplete", "diffusers"])}
    return {"transformer": SEPARATOR.join([variant, _dtypes(stored), "diffusers"])}


def _describe_file(path: Path) -> dict[str, str]:
    """The CogVideoX parts of a file: kind -> what it is."""
    if path.suffix in _LISTED:
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
    head = _head(path) if path.suffix == ".safetensors" else b""
    return {"lora": "LoRA"} if _LORA_LAYER.search(head) and not any(mark in head for mark in _OTHER_LORAS) else {}


def _head(path: Path) -> bytes:
    """The bytes at a file's start that hold its tensors' names (of a GGUF file, the first of them); none, if they are more than any header's."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else _GGUF_HEAD
        return file.read(length) if length <= MAX_HEADER else b""


def _dtypes(stored: dict[torch.dtype | str, int]) -> str:
    """The dtype that most bytes are in."""
    return dtype_name(next(iter(stored), torch.float32)).split(" (")[0]


def _without(what: str, name: str) -> str:
    """What it is, less what its name says already."""
    first, *rest = what.split(SEPARATOR)
    return SEPARATOR.join(rest if first in name else [first, *rest])
