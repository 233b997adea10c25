"""What of a model folder is CogVideoX: each checkpoint, text encoder and VAE once, with what it is, seen in configs and
headers.

What a file is, is remembered by its path, size and time, so that a list that was made once is made again in
milliseconds. One file, as looking, describing and remembering are each a few functions that share what was seen.
"""

import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from ..dtypes import dtype_name
from ..files import open_regular, read_json
from ..variants import PARTS, identify
from ..words import LIMIT, reason, short
from .entries import CONTROL, is_folder
from .folders import (
    holds_shards,
    is_sat_piece,
    is_shard,
    may_be_checkpoint,
    repository_name,
    sat_weights,
    shows_shards,
    snapshot,
    transformer_folders,
)
from .foreign import ForeignError
from .headers import MAX_HEADER, StoredTensor
from .layout import file_kinds, open_checkpoint, open_part
from .lora_files import read_lora
from .lora_places import PICKLES
from .parts import Part

logger = logging.getLogger(__name__)

#: Between the name of an entry and what it is.
SEPARATOR = " · "
# One of these names stands in the header of every CogVideoX file; looking for it costs less than parsing the header.
_MARKERS = (
    b"patch_embed.text_proj.",
    b"encoder.block.0.layer.0.SelfAttention.q.",
    b"norm1.conv_y.conv.weight",
    # llama.cpp's settings of T5 come before its tokens, which are many, and before its tensors.
    b"t5encoder.block_count",
    b"t5.block_count",
    b"enc.blk.0.attn_q.weight",
)
_LISTED = (".safetensors", ".sft", ".gguf", *PICKLES)
#: Bytes at the start of a GGUF file, and of a pickle, that hold the names of its first tensors.
_GGUF_HEAD, _PICKLE_HEAD = 1 << 20, 1 << 17
#: One of these stands in the names of every LoRA, and none of those in one of CogVideoX's: they spare the parsing of
#: other models' LoRAs.
_LORA_MARKERS = (b"lora", b"matrix_A.", b".down.weight")
_OTHER_LORAS = (
    b"attn2",
    b"down_blocks",
    b"up_blocks",
    b"single_transformer_blocks",
    b"double_blocks",
    b"cross_attn",
    b"input_blocks",
    b"add_k_proj",
)
#: How far rounding to a dtype puts weights off, relative to them: measured on random numbers of a normal distribution.
_ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.float16: 0.0002,
    torch.bfloat16: 0.0017,
    torch.float8_e4m3fn: 0.033,
    torch.float8_e5m2: 0.053,
}
#: The same for fp8 with scales, by which it is halfway better; and for GGUF's quantizations, by their bits: twice as
#: much for each bit less.
_ROUNDING_SCALED, _ROUNDING_OF_ONE_BIT = 0.8, 1.37
#: Folders below a root that are looked into: levels, how many, and how often one that links lead to again. Beyond that
#: it is no folder of models.
_DEEPEST, _MOST_FOLDERS, _MOST_VISITS = 64, 20_000, 8
#: The last is where ModelScope keeps a repository until it is downloaded.
_PASSED_OVER = (".git", ".cache", ".locks", ".ipynb_checkpoints", "__pycache__", "._____temp")
#: Files of a folder whose sizes and times are looked at to see whether it changed.
_MOST_FILES = 500
_STEP = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Seen:
    """What a part on disk is, as far as a list tells.

    Attributes:
        what: ``T5 encoder · bf16 · single file``.
        width: numbers a token that a text encoder gives, or a transformer reads; 0 for others.
        rounding: how far its weights are off those of the release, by the dtypes they are stored in.
        is_whole: whether nothing of it is missing.
    """

    what: str
    width: int = 0
    rounding: float = 0.0
    is_whole: bool = True


_known: dict[tuple, dict[str, Seen]] = {}
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Entry:
    """A checkpoint or part that can be chosen.

    Attributes:
        name: its path below the folder it was found in, with forward slashes, printable and of up to 80 letters: what
            is chosen by.
        what: ``CogVideoX1.5-5B-I2V · bf16 · diffusers``, without what the name says already.
        path: where it lies.
        width: numbers a token that a text encoder gives, or a transformer reads; 0 for others.
        rounding: how far its weights are off those of the release, by the dtypes they are stored in.
        is_whole: whether nothing of it is missing.
    """

    name: str
    what: str
    path: Path
    width: int = 0
    rounding: float = 0.0
    is_whole: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}{SEPARATOR}{self.what}" if self.what else self.name


@dataclass
class _Looked:
    """What lies below a root.

    Attributes:
        folders: those that may be checkpoints or parts, by their names, in their order.
        files: those that may be parts: path -> name, size and time.
        configured: the folders that have a config.json, and whether shards beside it.
    """

    folders: list[tuple[str, Path]] = field(default_factory=list)
    files: dict[str, tuple[str, os.stat_result]] = field(default_factory=dict)
    configured: dict[str, bool] = field(default_factory=dict)


def list_checkpoints(folder_roots: Iterable[Path], file_roots: Iterable[Path]) -> list[Entry]:
    """Every checkpoint below the roots: folders of diffusers and SAT, fine-tunes and caches below any of them, single
    files below ``file_roots``; the first of a name counts."""
    entries: dict[str, Entry] = {}
    folder_roots, file_roots = list(folder_roots), list(file_roots)
    looked = {root: _look(root) for root in dict.fromkeys((*folder_roots, *file_roots))}
    #: Folders of checkpoints that are listed, and what lies in them; and those that are whole.
    listed: set[Path] = set()
    whole: set[Path] = set()
    for each in looked.values():
        for name, folder in each.folders:
            inside = folder.parent in listed
            # The steps of a training are checkpoints of their own, also beside its result.
            passed = name in entries or (inside and not _STEP.fullmatch(folder.name))
            found = [] if passed else _unless_bad(folder, lambda folder, name=name: _folder_entries(name, folder), [])
            entries |= {entry.name: entry for entry in found if entry.name not in entries}
            if inside or found or name in entries:
                listed.add(folder)
            whole |= {entry.path for entry in found if entry.is_whole}
            if passed and (folder.parent in whole or (name in entries and entries[name].is_whole)):
                whole.add(folder)
    for entry in _file_entries((_by_themselves(looked[root], whole) for root in file_roots), "transformer"):
        entries.setdefault(entry.name, entry)
    return list(entries.values())


def list_parts(kind: str, roots: Iterable[Path]) -> list[Entry]:
    """Every file below the roots that holds a part of ``kind``, or can be a ``lora`` of a CogVideoX transformer, by the
    names in its header; and every folder with such a part in shards."""
    entries: dict[str, Entry] = {}
    for looked in map(_look, roots):
        found = _file_entries([looked.files], kind)
        for name, folder in looked.folders if kind != "lora" else ():
            if looked.configured.get(str(folder)):
                found += _unless_bad(folder, lambda folder, name=name: _part_entries(name, folder, kind), [])
        for entry in found:
            entries.setdefault(entry.name, entry)
    return list(entries.values())


def find_entry(entries: Iterable[Entry], chosen: str) -> Entry | None:
    """The entry that was chosen by its label or its name, in whichever system; what it is may have changed since, the
    folder it lies in too, and its name may be one that is cut in the list."""
    entries = list(entries)
    # A workflow that was made on Windows has backslashes; and a letter that cannot be printed is one here.
    texts = [chosen.strip(), chosen.strip().replace("\\", "/")]
    for name in (
        *texts,
        *(text[: match.start()] for text in texts for match in reversed(list(re.finditer(re.escape(SEPARATOR), text)))),
    ):
        found = [entry for entry in entries if name in (entry.name, entry.label)]
        found = found or [entry for entry in entries if name and f"/{entry.path.as_posix()}".endswith(f"/{name}")]
        if len(found) == 1:
            return found[0]
    return None


def _by_themselves(looked: _Looked, whole: Iterable[Path]) -> dict[str, tuple[str, os.stat_result]]:
    """The files below a root that are no weights of checkpoints in folders, which are ``whole`` ones."""
    folders = {str(folder) for folder in whole}

    def belongs(path: str) -> bool:
        folder = os.path.dirname(path)
        # SAT's weights lie two folders below their checkpoint, and beside no config.
        above = map(str, Path(path).parents) if path.lower().endswith(PICKLES) else ()
        return (folder in folders and folder in looked.configured) or not folders.isdisjoint(above)

    return {path: kept for path, kept in looked.files.items() if not belongs(path)}


def _unless_bad(path: Path | str, look: Callable, otherwise):
    """What ``look`` says of a path; ``otherwise``, and a line in the log, where it cannot be looked at: one that is bad
    takes no other away."""
    try:
        return look(path)
    except Exception as error:
        # Of any kind: what lies in a models folder is not the list's to vouch for, and opening it would say what is
        # wrong with it.
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


def _folder_entries(name: str, folder: Path) -> list[Entry]:
    """The checkpoints of a folder of a name."""
    inside = snapshot(folder) or folder
    found = transformer_folders(inside)
    # Names that stay when another, such as the other of transformer_T2V/ and transformer_I2V/, comes to lie beside it.
    places = {
        name if place.name == "transformer" or place == inside else f"{name}/{place.name}": place for place in found
    }
    if not found and (sat_weights(inside) is not None or holds_shards(inside)):
        places = {name: inside}
    entries = []
    for label, place in places.items():
        # By the folder itself, so that what is newest in a cache is opened; and its other parts belong to it.
        path = folder if label == name else place
        seen = _remember(path, _describe_folder, _state(inside)).get("transformer")
        if seen:
            entries.append(_entry(label, seen, path))
    return entries


def _part_entries(name: str, folder: Path, kind: str) -> list[Entry]:
    """The part of a kind that a folder of a name holds in shards."""
    seen = _remember(folder, _describe_part, _state(folder)).get(kind)
    return [_entry(name, seen, folder)] if seen else []


def _entry(name: str, seen: Seen, path: Path) -> Entry:
    return Entry(_shown(name), _without(seen.what, name), path, seen.width, seen.rounding, seen.is_whole)


def _file_entries(looked: Iterable[dict[str, tuple[str, os.stat_result]]], kind: str) -> list[Entry]:
    entries = []
    for files in looked:
        for path, (name, found) in sorted(files.items()):
            describe = _describe_lora if kind == "lora" else _describe_file
            seen = _remember(path, describe, (found.st_size, found.st_mtime_ns)).get(kind)
            if seen:
                entries.append(_entry(name, seen, Path(path)))
    return entries


def _look(root: Path) -> _Looked:
    """What lies below a root: folders that may be checkpoints, and files that may be parts or LoRAs, less single
    shards and downloads that are not finished; size and time are from the same look."""
    looked_at = _Looked()
    folders, files = looked_at.folders, looked_at.files
    visits: dict[int, int] = {}
    # ComfyUI registers folders that need not be there.
    todo, looked = [(str(root), "", 0)] if os.path.isdir(root) else [], 0
    while todo:
        path, name, depth = todo.pop()
        looked += 1
        if looked > _MOST_FOLDERS:
            logger.warning(
                "%s has more than %d folders: the rest is not looked into. Move the models to a folder of their own.",
                root,
                _MOST_FOLDERS,
            )
            break
        number = _unless_bad(path, os.stat, None)
        if number is None:
            continue
        # A link may lead to a folder that others lead to. Some network drives number no folders.
        visits[number.st_ino] = visits.get(number.st_ino, 0) + 1
        if number.st_ino and visits[number.st_ino] > _MOST_VISITS:
            continue
        here = _unless_bad(path, _scan, [])
        names = {entry.name for entry in here}
        if depth and "snapshots" in names and os.path.basename(path).startswith(("models--", "datasets--", "spaces--")):
            cached = _unless_bad(path, lambda folder, name=name: _cached(Path(folder), name), None)
            if cached is not None:
                folders.append((cached[1], Path(path)))
                todo.append((*cached, depth + 1))
            continue
        if "config.json" in names:
            looked_at.configured[path] = shows_shards(names)
        below = []
        for entry in here:
            inner = f"{name}/{entry.name}" if name else entry.name
            try:
                if entry.is_dir():
                    if depth < _DEEPEST and entry.name not in _PASSED_OVER and not _leads_back(entry):
                        below.append((entry.is_symlink(), (entry.path, inner, depth + 1)))
                elif (
                    entry.name.lower().endswith(_LISTED)
                    and not is_shard(entry.name)
                    and f"{entry.name}{CONTROL}" not in names
                    and not is_sat_piece(entry.name, names)
                ):
                    kept = entry.stat()
                    # A pipe or device that is called so is no file to read.
                    if stat.S_ISREG(kept.st_mode):
                        files[entry.path] = inner, kept
            except OSError as error:
                _pass_over(entry.path, error)
        if depth and (below or may_be_checkpoint(names)):
            folders.append((name, Path(path)))
        # Links last: where they lead to may be in this tree, and is then called what it is called here.
        todo += [place for is_link, place in reversed(below) if not is_link]
        todo = [place for is_link, place in reversed(below) if is_link] + todo
    return looked_at


def _cached(folder: Path, name: str) -> tuple[str, str] | None:
    """The files of a repository in the Hugging Face cache, and the name they are known by: that of the repository."""
    inside = snapshot(folder) if folder.name.startswith("models--") else None
    above = name.rpartition("/")[0]
    return None if inside is None else (str(inside), "/".join(filter(None, (above, repository_name(folder)))))


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a link leads to a folder that it lies in."""
    return entry.is_symlink() and f"{os.path.realpath(os.path.dirname(entry.path))}{os.sep}".startswith(
        f"{os.path.realpath(entry.path)}{os.sep}"
    )


def _state(folder: Path) -> tuple:
    """What changes when a file of a checkpoint does: name, size and time of each. A transformer's folder is one of its
    checkpoint's."""
    state: list[tuple] = []
    todo = [(str(folder.parent if folder.name.startswith("transformer") else folder), 0)]
    while todo and len(state) < _MOST_FILES:
        path, depth = todo.pop()
        for entry in _unless_bad(path, _scan, []):
            if depth < 2 and is_folder(entry):
                todo.append((entry.path, depth + 1))
            elif os.path.exists(entry.path):
                seen = entry.stat()
                state.append((entry.path, seen.st_size, seen.st_mtime_ns))
    return tuple(sorted(state))


def _scan(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _remember(path: Path | str, describe: Callable[[Path], dict[str, Seen]], state: tuple) -> dict[str, Seen]:
    """What ``describe`` says of a file or folder, by kind; asked once as long as its ``state`` stays the same."""
    key = (describe.__name__, str(path), state)
    if key not in _known:
        # What cannot be read is not offered.
        _known[key] = _unless_bad(Path(path), describe, {})
    return _known[key]


def _describe_folder(place: Path) -> dict[str, Seen]:
    try:
        checkpoint = open_checkpoint(place)
    except ForeignError:
        raise
    except ValueError as error:
        transformer = next(iter(transformer_folders(snapshot(place) or place)), None)
        if transformer is None:
            raise
        # Offered all the same: to be told what is missing is more use than to look for it in vain.
        logger.info("%s is not whole: %s", place, error)
        return {
            "transformer": Seen(
                SEPARATOR.join(
                    [short(identify(read_json(transformer / "config.json")).name), "incomplete", "diffusers"]
                ),
                is_whole=False,
            )
        }
    seen = _seen(checkpoint.part("transformer"))
    incomplete = [f"{PARTS[kind][0]} incomplete" for kind in checkpoint.incomplete]
    return {"transformer": replace(seen, what=SEPARATOR.join([seen.what, *incomplete]))}


def _describe_file(path: Path) -> dict[str, Seen]:
    """The CogVideoX parts of a file that can run: kind -> what it is."""
    head = _head(path)
    if not any(marker in head for marker in _MARKERS):
        return {}
    described = {}
    for kind in file_kinds(path):
        try:
            described[kind] = _seen(open_part(path, kind))
        except ValueError as error:
            logger.info("%s is not offered: %s", path, error)
    return described


def _describe_part(folder: Path) -> dict[str, Seen]:
    """The text encoder or VAE of a folder of its own."""
    config = read_json(folder / "config.json")
    kind = {None: "text_encoder", PARTS["vae"][1]: "vae"}.get(config.get("_class_name"))
    return {kind: _seen(open_part(folder, kind))} if kind else {}


def _seen(part: Part) -> Seen:
    names = {
        "transformer": lambda: identify(part.config).name,
        "vae": lambda: "CogVideoX VAE",
        "text_encoder": lambda: "T5 encoder",
    }
    widths = {
        "transformer": ("patch_embed.text_proj.weight", 1),
        "text_encoder": ("encoder.final_layer_norm.weight", 0),
    }
    name, axis = widths.get(part.kind, (None, 0))
    what = SEPARATOR.join(
        [names[part.kind](), _dtypes(part.stored), part.layout.replace("diffusers file", "diffusers")]
    )
    return Seen(what, part.tensors[name].shape[axis] if name else 0, _rounding(part))


def _rounding(part: Part) -> float:
    """How far rounding to the dtypes it is stored in puts a part's weights off, relative to them."""

    def of(name: str, tensor: StoredTensor) -> float:
        if tensor.quantization is not None:
            bits = re.search(r"\d", str(tensor.kind))
            return _ROUNDING_OF_ONE_BIT / 2 ** int(bits[0]) if bits else 1.0
        return _ROUNDING.get(tensor.dtype, 1.0) * (_ROUNDING_SCALED if name in part.scales else 1.0)

    numbers = {name: prod(tensor.shape) for name, tensor in part.tensors.items()}
    return sum(count * of(name, part.tensors[name]) for name, count in numbers.items()) / max(1, sum(numbers.values()))


def _describe_lora(path: Path) -> dict[str, Seen]:
    """``lora`` for a LoRA that opens; whether its layers have the sizes of a model's is seen when it is applied to
    one."""
    head = _head(path)
    if not any(mark in head for mark in _LORA_MARKERS) or any(mark in head for mark in _OTHER_LORAS):
        return {}
    read_lora(path)
    return {"lora": Seen("LoRA")}


def _head(path: Path) -> bytes:
    """The bytes at a file's start that hold its tensors' names (of a GGUF file or a pickle, the first of them); none,
    if they are more than any header's."""
    with open_regular(path) as file:
        if path.suffix.lower() in (".safetensors", ".sft"):
            length = int.from_bytes(file.read(8), "little")
        else:
            length = _GGUF_HEAD if path.suffix.lower() == ".gguf" else _PICKLE_HEAD
        return file.read(length) if length <= MAX_HEADER else b""


def _dtypes(stored: dict[torch.dtype | str, int]) -> str:
    """The dtype that most bytes are in."""
    return dtype_name(next(iter(stored), torch.float32)).split(" (")[0]


def _without(what: str, name: str) -> str:
    """What it is, less what its name says already."""
    first, *rest = what.split(SEPARATOR)
    return SEPARATOR.join(rest if first in name else [first, *rest])
