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
from math import prod
from pathlib import Path

import torch

from ..files import open_regular
from ..precision.hardware import dtype_name
from ..variants import identify
from ..words import LIMIT, reason, short
from .headers import MAX_HEADER, StoredTensor
from .layout import Part, file_kinds, open_part, sat_weights, transformer_folders
from .lora_files import read_lora
from .naming import ForeignError

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
_LISTED = (".safetensors", ".gguf")
#: Bytes at the start of a GGUF file that hold the names of its first tensors.
_GGUF_HEAD = 1 << 20
#: Files that ComfyUI lists as LoRAs, and the bytes at the start of a pickle that hold the names of its first tensors.
_LORAS, _PICKLE_HEAD = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".bin", ".ckpt"), 1 << 17
#: One of these stands in the names of every LoRA, and none of those in one of CogVideoX's: they spare the parsing of other models' LoRAs.
_LORA_MARKERS = (b"lora", b"matrix_A.", b".down.weight")
_OTHER_LORAS = (b"attn2", b"down_blocks", b"up_blocks", b"single_transformer_blocks", b"double_blocks", b"cross_attn", b"input_blocks", b"add_k_proj")
#: How far rounding to a dtype puts weights off, relative to them: measured on random numbers of a normal distribution.
_ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.float16: 0.0002,
    torch.bfloat16: 0.0017,
    torch.float8_e4m3fn: 0.033,
    torch.float8_e5m2: 0.053,
}
#: The same for fp8 with scales, by which it is halfway better; and for GGUF's quantizations, by their bits: twice as much for each bit less.
_ROUNDING_SCALED, _ROUNDING_OF_ONE_BIT = 0.8, 1.37


#: Levels of folders that are looked into, and how often one folder is that links lead to again.
_DEEPEST, _MOST_VISITS = 64, 8


@dataclass(frozen=True)
class Seen:
    """What a part on disk is, as far as a list tells.

    Attributes:
        what: ``T5 encoder · bf16 · single file``.
        width: numbers a token that a text encoder gives, or a transformer reads; 0 for others.
        rounding: how far its weights are off those of the release, by the dtypes they are stored in.
    """

    what: str
    width: int = 0
    rounding: float = 0.0


_known: dict[tuple, dict[str, Seen]] = {}
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Entry:
    """A checkpoint or part that can be chosen.

    Attributes:
        name: its path below the folder it was found in, with forward slashes, printable and of up to 80 letters: what is chosen by.
        what: ``CogVideoX1.5-5B-I2V · bf16 · diffusers``, without what the name says already.
        path: where it lies.
        width: numbers a token that a text encoder gives, or a transformer reads; 0 for others.
        rounding: how far its weights are off those of the release, by the dtypes they are stored in.
    """

    name: str
    what: str
    path: Path
    width: int = 0
    rounding: float = 0.0

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
        if (str(path), str(error)) not in _told:
            _told.add((str(path), str(error)))
            logger.info("%s is passed over: %s", short(path, 400), reason(error, 600))
        return otherwise


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
        seen = _remember(weights, _describe_file).get("transformer")
        return [_entry(folder.name, seen, folder)] if seen else []
    entries = []
    for place, transformer in zip(places, found, strict=True):
        name = folder.name if place == folder else f"{folder.name}/{place.name}"
        files = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in os.scandir(transformer)))
        seen = _remember(transformer / "config.json", _describe_folder, also=files).get("transformer")
        if seen:
            entries.append(_entry(name, seen, place))
    return entries


def _entry(name: str, seen: Seen, path: Path) -> Entry:
    return Entry(_shown(name), _without(seen.what, name), path, seen.width, seen.rounding)


def _file_entries(roots: Iterable[Path], kind: str) -> list[Entry]:
    entries = []
    for root in roots:
        for path, found in sorted(_files(root, _LORAS if kind == "lora" else _LISTED).items()):
            seen = _remember(path, _describe_lora if kind == "lora" else _describe_file, found).get(kind)
            if seen:
                entries.append(_entry(Path(path).relative_to(root).as_posix(), seen, Path(path)))
    return entries


def _files(root: Path, endings: tuple[str, ...] = _LISTED) -> dict[str, os.stat_result]:
    """Every file with one of these endings below a root, less those of parts in folders of their own, with size and time from the same look."""
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
            if _unless_bad(entry.path, lambda _, entry=entry: entry.is_dir(), False):
                # Links last: where they lead to may be in this tree, and is then called what it is called here.
                (todo.append if entry.is_symlink() else todo.appendleft)((entry.path, (*above, here)))
            elif entry.name.endswith(endings) and not is_part:
                kept = _unless_bad(entry.path, lambda _, entry=entry: entry.stat(), None)
                # A pipe or device that is called so is no file to read.
                if kept is not None and stat.S_ISREG(kept.st_mode):
                    found[entry.path] = kept
    return found


def _scan(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return list(entries)


def _remember(
    path: Path | str, describe: Callable[[Path], dict[str, Seen]], found: os.stat_result | None = None, also: tuple = ()
) -> dict[str, Seen]:
    """What ``describe`` says of a file, by kind; asked once as long as the file, and what is ``also`` looked at, stays the same."""
    found = found or os.stat(path)
    key = (describe.__name__, str(path), found.st_size, found.st_mtime_ns, also)
    if key not in _known:
        # What cannot be read is not offered.
        _known[key] = _unless_bad(Path(path), describe, {})
    return _known[key]


def _describe_folder(config: Path) -> dict[str, Seen]:
    try:
        part = open_part(config.parent, "transformer")
    except ForeignError:
        raise
    except ValueError as error:
        # Offered all the same: to be told what is missing is more use than to look for it in vain.
        logger.info("%s is not whole: %s", config.parent, error)
        config = json.loads(config.read_text(encoding="utf-8"))
        return {"transformer": Seen(SEPARATOR.join([identify(config).name, "incomplete", "diffusers"]))}
    return {"transformer": _seen(part)}


def _describe_file(path: Path) -> dict[str, Seen]:
    """The CogVideoX parts of a file that can run: kind -> what it is."""
    if path.suffix in _LISTED:
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


def _seen(part: Part) -> Seen:
    names = {"transformer": lambda: identify(part.config).name, "vae": lambda: "CogVideoX VAE", "text_encoder": lambda: "T5 encoder"}
    widths = {"transformer": ("patch_embed.text_proj.weight", 1), "text_encoder": ("encoder.final_layer_norm.weight", 0)}
    name, axis = widths.get(part.kind, (None, 0))
    what = SEPARATOR.join([names[part.kind](), _dtypes(part.stored), part.layout.replace("diffusers file", "diffusers")])
    return Seen(what, part.tensors[name].shape[axis] if name else 0, _rounding(part))


def _rounding(part: Part) -> float:
    """How far rounding to the dtypes it is stored in puts a part's weights off, relative to them."""

    def of(name: str, tensor: StoredTensor) -> float:
        if tensor.quantization is not None:
            bits = re.search(r"\d", tensor.kind)
            return _ROUNDING_OF_ONE_BIT / 2 ** int(bits[0]) if bits else 1.0
        return _ROUNDING.get(tensor.dtype, 1.0) * (_ROUNDING_SCALED if name in part.scales else 1.0)

    numbers = {name: prod(tensor.shape) for name, tensor in part.tensors.items()}
    return sum(count * of(name, part.tensors[name]) for name, count in numbers.items()) / max(1, sum(numbers.values()))


def _describe_lora(path: Path) -> dict[str, Seen]:
    """``lora`` for a LoRA that opens; whether its layers have the sizes of a model's is seen when it is applied to one."""
    head = _head(path)
    if not any(mark in head for mark in _LORA_MARKERS) or any(mark in head for mark in _OTHER_LORAS):
        return {}
    read_lora(path)
    return {"lora": Seen("LoRA")}


def _head(path: Path) -> bytes:
    """The bytes at a file's start that hold its tensors' names (of a GGUF file or a pickle, the first of them); none, if they are more than any
    header's."""
    with open_regular(path) as file:
        if path.suffix in (".safetensors", ".sft"):
            length = int.from_bytes(file.read(8), "little")
        else:
            length = _GGUF_HEAD if path.suffix == ".gguf" else _PICKLE_HEAD
        return file.read(length) if length <= MAX_HEADER else b""


def _dtypes(stored: dict[torch.dtype | str, int]) -> str:
    """The dtype that most bytes are in."""
    return dtype_name(next(iter(stored), torch.float32)).split(" (")[0]


def _without(what: str, name: str) -> str:
    """What it is, less what its name says already."""
    first, *rest = what.split(SEPARATOR)
    return SEPARATOR.join(rest if first in name else [first, *rest])
