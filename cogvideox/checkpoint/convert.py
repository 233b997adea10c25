"""Convert a checkpoint, in whatever layout it was opened from, to a folder in diffusers layout or to one safetensors
file.

The bytes go through one small buffer: every header is computed from shapes before a weight is read, and the weights
follow range by range, cast on the way if another dtype is wanted. So 31 GB take no more memory than 31 MB do. What is
written has another name until all of it is
on the disk: a conversion that stops, for whatever reason, leaves nothing behind.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..modules.packed import PackedWeight
from ..variants import PARTS
from ..words import size_text
from .architecture import check_part
from .audit import TARGETS, WeightAudit, scan_weights
from .headers import DTYPES, StoredTensor, fill, read_tensor
from .layout import Checkpoint
from .parts import Part, stored_bytes
from .tokenizer import has_tokenizer

logger = logging.getLogger(__name__)

#: Bytes of weights in one file of a folder, as diffusers and the official releases have it; a larger tensor has a file
#: of its own.
SHARD_BYTES = 5 * 10**9
#: Bytes read at a time: with the cast of them, all the memory that weights take.
_CHUNK = 16 << 20
#: Bytes that stay free on the disk: a full one stops other programs too.
_SPARE = 10**9
#: What diffusers and transformers call the files of a part.
_WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
#: A tokenizer's files; the folder they are found in can hold others (ComfyUI's models/text_encoders).
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
#: Where a configuration says in which dtype transformers should load the weights.
_CONFIG_DTYPES = ("torch_dtype", "dtype")
#: Endings of weight files that are not written here, so that none of them becomes the name of a folder.
_FOREIGN = {".pt", ".pth", ".ckpt", ".bin", ".gguf", ".sft"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ConvertedPart:
    """One part that was written.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        source, layout: where it came from and in whose layout, as ``Part`` has them.
        files: name, relative to the destination's folder, and size in bytes of each weight file.
        before, after: bytes of weights by dtype in the source and as written.
        audit: what the cast lost; None where nothing was cast. It sees fp8 weights without their scales, and quantized
            ones not at all.
        widened: packed tensors among them: quantized ones (GGUF), and fp8 ones with a scale.
    """

    kind: str
    source: Path
    layout: str
    files: tuple[tuple[str, int], ...]
    before: Mapping[torch.dtype | str, int]
    after: Mapping[torch.dtype, int]
    audit: WeightAudit | None = None
    widened: int = 0

    @property
    def text(self) -> str:
        before, after = (
            " + ".join(f"{dtype_name(dtype)} ({size_text(n)})" for dtype, n in stored.items())
            for stored in (self.before, self.after)
        )
        change = f"{before} cast to {after}" if self.audit or self.widened else f"{after} as stored"
        files = self.files[0][0] if len(self.files) == 1 else f"{len(self.files)} files"
        lines = [f"{PARTS[self.kind][0]}: {change}, in {files}; from {self.source} (layout: {self.layout})"]
        if self.audit:
            lines.append(self.audit.text)
        if self.widened:
            lines.append(
                f"    {self.widened} packed tensors were widened in fp32 and rounded once; what was counted is "
                "without them or their scales."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_checkpoint`` wrote. ``text`` is for people, ``as_dict`` for scripts.

    Attributes:
        destination: the folder or file.
        variant: the model's name.
        nbytes: size of everything written.
        others: the files that hold no weights, relative to the destination.
        left_out: part -> why it was not written.
    """

    destination: Path
    variant: str
    nbytes: int
    parts: tuple[ConvertedPart, ...]
    others: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def text(self) -> str:
        what = "a folder in diffusers layout" if self.others else "one file of the transformer, with diffusers' names"
        lines = [
            f"{self.variant} written to {self.destination}: {what}, {size_text(self.nbytes)}",
            *(part.text for part in self.parts),
        ]
        if self.others:
            lines.append(f"beside them: {', '.join(self.others)}")
        return "\n".join([*lines, *(f"not written: {name}: {why}" for name, why in self.left_out.items())])

    def as_dict(self) -> dict:
        """The report as JSON has it: dtypes by name, sizes in bytes."""
        return {
            "destination": str(self.destination),
            "variant": self.variant,
            "bytes": self.nbytes,
            "parts": [
                {
                    "part": part.kind,
                    "source": str(part.source),
                    "layout": part.layout,
                    "files": dict(part.files),
                    "before": {dtype_name(dtype): count for dtype, count in part.before.items()},
                    "after": {dtype_name(dtype): count for dtype, count in part.after.items()},
                    "audit": part.audit and part.audit.as_dict(),
                    "widened": part.widened,
                }
                for part in self.parts
            ],
            "others": list(self.others),
            "left_out": dict(self.left_out),
        }


def convert_checkpoint(
    source: Checkpoint,
    destination: Path | str,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write ``source`` to ``destination``: a folder in diffusers layout, or one safetensors file if it ends in
    ``.safetensors``.

    A folder holds every part that the source has, and opens in diffusers' ``from_pretrained``. A single file holds the
    transformer alone, with diffusers' names: text encoder and VAE are files of their own wherever single files are
    used. Its configuration goes into its metadata (``config``, JSON). T5's token embedding, which has two names, is
    written once, as ``shared.weight``.

    Casting reads the weights twice: first to count what the cast loses, so that a cast which spoils them is refused
    before anything is written. Memory is constant: a buffer of 16 MB, its cast, and what ``scan_weights`` takes.

    Args:
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32`` for all floating-point weights, fp8 among
            them; None keeps what is stored. Integers and booleans are always kept. What is packed (GGUF, fp8 with
            scales) needs a dtype to be widened to.
        on_progress: called with (bytes read, bytes to be read), last with both equal. What it raises stops the
            conversion and is passed on.

    Raises:
        ValueError: if the destination exists and is not an empty folder, lies inside the source or is being written; if
            the source is not whole or is damaged; or if the cast would turn finite weights into Inf.
        RuntimeError: if the disk is too small, or reading or writing fails. Whatever is raised, nothing is left behind.
    """
    destination = Path(destination).expanduser().absolute()
    single = destination.suffix.lower() == ".safetensors"
    if dtype is not None and dtype not in TARGETS:
        raise ValueError(
            f"The weights were to be cast to {dtype_name(dtype)}, which no part can run in. Choose "
            f"{', '.join(TARGETS.values())}, or none of them to keep what is stored."
        )
    _check_destination(source, destination, single)
    kinds = [
        kind for kind in PARTS if kind == "transformer" or (not single and kind in (*source.parts, *source.incomplete))
    ]
    plans = [_plan(source.part(kind), dtype, single, destination.name) for kind in kinds]
    others = {} if single else _others(source, plans)
    nbytes = sum(file.size for plan in plans for file in plan.files) + sum(map(len, others.values()))
    _check_space(destination, nbytes)

    progress = _Progress(sum(plan.bytes_to_copy + plan.bytes_to_scan for plan in plans), on_progress)
    audits = {} if dtype is None else {plan.part.kind: _audit(plan, dtype, progress) for plan in plans if plan.to_scan}
    with _disk_errors(destination), _whole_or_nothing(destination, single) as partial:
        for plan in plans:
            for file in plan.files:
                path = partial if single else partial / file.name
                logger.info("writing %s (%s)", file.name, size_text(file.size))
                _write(path, file.content(progress))
        for name, content in others.items():
            _write(partial / name, [content])
    return ConversionReport(
        destination,
        source.variant.name,
        nbytes,
        tuple(plan.converted(audits.get(plan.part.kind)) for plan in plans),
        tuple(others),
        _left_out(source, single, others),
    )


@dataclass(frozen=True)
class _File:
    """A safetensors file to write: its name, relative to the destination, and its tensors in the order they will lie
    in."""

    name: str
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype | None
    scales: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        end = 0
        for name, stored in self.tensors.items():
            wanted, begin = _wanted(stored, self.dtype), end
            end += prod(stored.shape) * wanted.itemsize
            entries[name] = {"dtype": _NAMES[wanted], "shape": list(stored.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        # As the library writes it: the data begin at a multiple of eight bytes, so that every tensor can be mapped
        # where it lies.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        return len(self.header) + sum(_bytes_as(stored, self.dtype) for stored in self.tensors.values())

    def content(self, progress: "_Progress") -> Iterator[bytes | memoryview]:
        """The file's bytes, in pieces that are good until the next one is asked for."""
        yield self.header
        buffer = torch.empty(_CHUNK, dtype=torch.uint8)
        file = None
        try:
            for name, stored in self.tensors.items():
                if file is None or Path(file.name) != stored.file:
                    if file is not None:
                        file.close()
                    with _source_errors(stored.file):
                        file = stored.file.open("rb", buffering=0)
                wanted = _wanted(stored, self.dtype)
                if name in self.scales or stored.quantization is not None:
                    pieces = _widened(name, file, stored, self.scales.get(name), wanted)
                else:
                    pieces = (
                        (piece.view(stored.dtype).to(wanted), piece.nbytes) for piece in _pieces(file, stored, buffer)
                    )
                for values, nbytes in pieces:
                    yield _memory(values)
                    progress.add(nbytes)
        finally:
            if file is not None:
                file.close()


@dataclass(frozen=True)
class _Plan:
    """What is to be written of one part."""

    part: Part
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]
    files: tuple[_File, ...]
    dtype: torch.dtype | None

    @property
    def bytes_to_copy(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    @cached_property
    def to_scan(self) -> dict[str, StoredTensor]:
        """The tensors whose cast can be counted: not those that are quantized."""
        return {
            name: stored
            for name, stored in self.tensors.items()
            if stored.dtype != _wanted(stored, self.dtype) and stored.quantization is None
        }

    @property
    def bytes_to_scan(self) -> int:
        return sum(stored.nbytes for stored in self.to_scan.values())

    def converted(self, audit: WeightAudit | None) -> ConvertedPart:
        after: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            wanted = _wanted(stored, self.dtype)
            after[wanted] = after.get(wanted, 0) + _bytes_as(stored, self.dtype)
        after = dict(sorted(after.items(), key=lambda item: -item[1]))
        files = tuple((file.name, file.size) for file in self.files)
        widened = sum(name in self.scales or stored.quantization is not None for name, stored in self.tensors.items())
        before = stored_bytes(self.tensors)
        return ConvertedPart(self.part.kind, self.part.source, self.part.layout, files, before, after, audit, widened)


def _plan(part: Part, dtype: torch.dtype | None, single: bool, name: str) -> _Plan:
    """Which tensors go into which file. They stay in the order they lie in, so that the source is read from front to
    back."""
    check_part(part)
    if part.lora:
        raise ValueError(
            f"The {PARTS[part.kind][0]} in {part.source} was saved with a LoRA inside ({len(part.lora)} tensors), "
            "which a converted copy would not have: it would be the model before the training. Convert the model it "
            "was trained on, and load this file as a LoRA of it; or run it as it is."
        )
    tensors = dict(sorted(_once(part.kind, part.tensors).items(), key=lambda item: (item[1].file, item[1].offset)))
    scales = {name: scale for name, scale in _once(part.kind, part.scales).items() if name in tensors}
    packed = len(scales) + sum(stored.quantization is not None for stored in tensors.values())
    if packed and dtype is None:
        raise ValueError(
            f"{packed} weights of the {PARTS[part.kind][0]} in {part.source} are packed (GGUF, or fp8 with scales "
            "beside it), and diffusers' layout has no place for that: without the scales every picture would be "
            "noise. Choose a dtype to convert to, such as bf16: that widens them."
        )
    metadata = {"format": "pt"}
    if single:
        metadata["config"] = json.dumps(_config(part, dtype))
        return _Plan(part, tensors, scales, (_File(name, _aligned(tensors, dtype), dtype, scales, metadata),), dtype)
    shards: list[dict[str, StoredTensor]] = [{}]
    room = SHARD_BYTES
    for key, stored in tensors.items():
        room -= _bytes_as(stored, dtype)
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD_BYTES - _bytes_as(stored, dtype)
        shards[-1][key] = stored
    stem, count = f"{part.kind}/{_WEIGHTS[part.kind]}", len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )
    files = tuple(
        _File(name, _aligned(shard, dtype), dtype, scales, metadata) for name, shard in zip(names, shards, strict=True)
    )
    return _Plan(part, tensors, scales, files, dtype)


def _config(part: Part, dtype: torch.dtype | None) -> dict:
    """The part's configuration. transformers loads weights in the dtype that it names, so that is the one they now
    have."""
    config = dict(part.config)
    return config | {
        key: str(dtype).removeprefix("torch.") for key in _CONFIG_DTYPES if dtype is not None and key in config
    }


def _once(kind: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by name; T5's token embedding under the name that transformers writes it under, and not twice."""
    tensors = dict(tensors)
    if kind == "text_encoder" and "encoder.embed_tokens.weight" in tensors:
        table = tensors.pop("encoder.embed_tokens.weight")
        tensors.setdefault("shared.weight", table)
    return tensors


def _aligned(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """Wide dtypes first, as the library has it: then each tensor begins at a multiple of its element's size. Otherwise
    the order is kept."""
    return dict(sorted(tensors.items(), key=lambda item: -_wanted(item[1], dtype).itemsize))


def _wanted(stored: StoredTensor, dtype: torch.dtype | None) -> torch.dtype:
    return (
        dtype
        if dtype is not None and (stored.dtype.is_floating_point or stored.quantization is not None)
        else stored.dtype
    )


def _bytes_as(stored: StoredTensor, dtype: torch.dtype | None) -> int:
    return prod(stored.shape) * _wanted(stored, dtype).itemsize


def _pieces(file: FileIO, stored: StoredTensor, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, each piece at the start of ``buffer``."""
    for offset, nbytes in stored.ranges:
        with _source_errors(stored.file):
            file.seek(offset)
        while nbytes:
            piece = buffer[: min(nbytes, len(buffer))]
            with _source_errors(stored.file):
                fill(file, _memory(piece), stored.file)
            nbytes -= piece.nbytes
            yield piece


def _widened(
    name: str, file: FileIO, stored: StoredTensor, scale: StoredTensor | None, wanted: torch.dtype
) -> Iterator[tuple[torch.Tensor, int]]:
    """A packed tensor in ``wanted``, some rows at a time, each with the bytes it was read from.

    Raises:
        ValueError: if a weight is NaN or Inf then. The scan cannot foresee that: it sees the weights without their
            scales.
    """
    rows, done = stored.raw_shape[0], 0
    row = stored.nbytes // rows
    scales = None
    if scale is not None:
        with _source_errors(scale.file):
            scales = read_tensor(scale).flatten()
    # Widening takes many times the memory of what is packed.
    for piece in _pieces(file, stored, torch.empty(row * max(1, _CHUNK // 16 // row), dtype=torch.uint8)):
        data = piece.view(stored.dtype).reshape(piece.nbytes // row, -1)
        some = scales if scales is None or len(scales) == 1 else scales[done : done + len(data)]
        values = PackedWeight(data, some, stored.quantization).scaled(torch.float32).to(wanted).flatten()
        if not values.isfinite().all():
            raise ValueError(
                f"{name} in {stored.file} has weights that are NaN or Inf once they are widened to "
                f"{dtype_name(wanted)}. Every frame made with such a file is black, so it was not written. Convert to "
                "bf16, which has the range of fp32, or download the file again."
            )
        done += len(data)
        yield values, piece.nbytes


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _audit(plan: _Plan, dtype: torch.dtype, progress: "_Progress") -> WeightAudit:
    """Count what the cast loses.

    Raises:
        ValueError: if it would turn finite weights into Inf.
    """
    name, before = PARTS[plan.part.kind][0], progress.done
    with _source_errors(plan.part.source):
        audit = scan_weights(plan.to_scan, dtype, name, lambda done, _: progress.reach(before + done))
    progress.reach(before + plan.bytes_to_scan)
    if audit.overflowed:
        places = ", ".join(f"{tensor} ({what})" for tensor, what in audit.worst)
        remedy = (
            "Convert to bf16, which has the range of fp32, or keep the dtype"
            if dtype == torch.float16
            else "Keep the dtype, or choose fp32"
        )
        raise ValueError(
            f"The cast of the {name} in {plan.part.source} to {dtype_name(dtype)} would turn {audit.overflowed:,} "
            f"finite weights into Inf, beyond {torch.finfo(dtype).max:.5g}{f' (see {places})' if places else ''}. "
            f"Every frame made with such a file is black, so it was not written. {remedy}."
        )
    if audit.damaged:
        logger.warning(
            "%s holds weights that are NaN or Inf, and so will what is converted from it: %s",
            plan.part.source,
            audit.text,
        )
    return audit


def _others(source: Checkpoint, plans: list[_Plan]) -> dict[str, bytes]:
    """Everything of a folder that is not weights: name, relative to the folder -> content."""
    from diffusers import __version__ as diffusers_version

    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if source.variant.image_to_video else "CogVideoXPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", source.scheduler_config.get("_class_name", "CogVideoXDDIMScheduler")],
        # What diffusers writes for a part that is not there.
        **{kind: [None, None] for kind in ("text_encoder", "tokenizer", "vae")},
    }
    files = {"scheduler/scheduler_config.json": _json(source.scheduler_config)}
    if has_tokenizer(source.tokenizer):
        names = [name for name in _TOKENIZER if (source.tokenizer / name).is_file()]
        with _source_errors(source.tokenizer):
            files |= {f"tokenizer/{name}": (source.tokenizer / name).read_bytes() for name in names}
        index["tokenizer"] = ["transformers", "T5Tokenizer" if "spiece.model" in names else "T5TokenizerFast"]
    # The transformer's last: a folder is known as a checkpoint by that file.
    for plan in reversed(plans):
        kind = plan.part.kind
        index[kind] = ["transformers" if kind == "text_encoder" else "diffusers", PARTS[kind][1]]
        if len(plan.files) > 1:
            total = sum(_bytes_as(stored, plan.dtype) for stored in plan.tensors.values())
            places = {name: Path(file.name).name for file in plan.files for name in file.tensors}
            shards = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            files[f"{kind}/{_WEIGHTS[kind]}.safetensors.index.json"] = _json(shards)
        files[f"{kind}/config.json"] = _json(_config(plan.part, plan.dtype))
    return {"model_index.json": _json(index)} | files


def _json(data: Mapping) -> bytes:
    return (json.dumps(dict(data), indent=2) + "\n").encode()


def _left_out(source: Checkpoint, single: bool, others: Mapping[str, bytes]) -> dict[str, str]:
    names = {kind: PARTS[kind][0] for kind in ("text_encoder", "vae")}
    if single:
        why = "a single file holds the transformer only; give a folder as the destination to convert it too"
        return {name: why for kind, name in names.items() if kind in source.parts}
    missing = {name: "the source has none" for kind, name in names.items() if kind not in source.parts}
    if not any(name.startswith("tokenizer/") for name in others):
        missing["tokenizer"] = (
            "the source has none; prompts cannot be encoded without the one of a CogVideoX repository"
        )
    return missing


def _check_destination(source: Checkpoint, destination: Path, single: bool) -> None:
    _check_free(destination, single)
    if destination.suffix.lower() in _FOREIGN:
        raise ValueError(
            f"{destination} has the ending of a file that is not written here: checkpoints are written as a folder or "
            "as one .safetensors file. Choose a name for one of them."
        )
    real = destination.resolve()
    for folder in (source.path, *(part.source for part in source.parts.values())):
        if folder.is_dir() and real.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{destination} lies inside {folder}, which is to be converted: the two would be mixed up, and the "
                "source no longer be what it was. Choose a place outside it."
            )


def _check_free(destination: Path, single: bool) -> None:
    empty = not single and destination.is_dir() and not any(destination.iterdir())
    if os.path.lexists(destination) and not empty:
        raise ValueError(
            f"{destination} is there already, and nothing is overwritten: it may be the only copy. Choose another "
            f"name, or move it away{'' if single else ' (a folder may be there if it is empty)'}."
        )


def _check_space(destination: Path, nbytes: int) -> None:
    place = next(path for path in destination.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < nbytes + _SPARE:
        raise RuntimeError(
            f"{destination} needs {size_text(nbytes)} and {size_text(_SPARE)} to spare, but the disk with {place} has "
            f"only {size_text(free)} free. A full disk would stop the conversion halfway, and other programs with it, "
            "so nothing was written. Make room, choose a place on another disk, or convert to 16 bits."
        )


@contextmanager
def _whole_or_nothing(destination: Path, single: bool) -> Iterator[Path]:
    """A place beside ``destination`` that gets its name when the block ends, and is removed if it fails."""
    partial = destination.with_name(f"{destination.name}.partial")
    made = [folder for folder in destination.parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.touch(exist_ok=False) if single else partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial} is there: another conversion is writing it, or one was killed. Two would spoil each other. If "
            "none is running, delete it and convert again."
        ) from None
    try:
        yield partial
        for folder in [] if single else [*filter(Path.is_dir, partial.iterdir()), partial]:
            _sync(folder)
        _check_free(destination, single)
        if destination.is_dir():
            destination.rmdir()  # Only POSIX lets a folder take the place of an empty one.
        os.rename(partial, destination)
    except BaseException:
        if single:
            partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # Someone else may have put something there.
                folder.rmdir()
        if partial.exists():
            logger.warning("%s could not be removed: it is not whole, so delete it", partial)
        raise
    _sync(destination.parent)


def _write(path: Path, content: Iterator[bytes | memoryview] | list[bytes]) -> None:
    """Write a file and wait until it is on the disk: a full or failing one shows here, and not after the rename."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk too, where the system and the file system can: Windows and some network
    disks cannot."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _source_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be read: {error.strerror or error}. The conversion stopped and left nothing behind. Check "
            "the disk and the permissions, or download it again."
        ) from error


@contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"{destination} cannot be written: {error.strerror or error}. The conversion stopped and what it had "
            "written was removed. Make room on the disk, allow writing there, or choose another place (FAT32 disks "
            "cannot hold files of 5 GB)."
        ) from error


class _Progress:
    """Bytes read so far, of all that are to be read."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None):
        self.done, self._total, self._on_progress = 0, total, on_progress

    def add(self, count: int) -> None:
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        if done > self.done:
            self.done = done
            if self._on_progress is not None:
                self._on_progress(done, self._total)
