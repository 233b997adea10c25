"""Convert a checkpoint, in whatever layout it was opened from, to a folder in diffusers layout or to one safetensors
file.

What is written has another name until all of it is on the disk: a conversion that stops, for whatever reason, leaves
nothing behind. ``shards`` knows the files and their bytes.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..dtypes import dtype_name
from ..files import check_space, disk_errors, write_synced
from ..variants import PARTS
from ..words import short, size_text
from .audit import TARGETS, WeightAudit, scan_weights
from .layout import Checkpoint
from .parts import stored_bytes
from .shards import WEIGHTS, Plan, Progress, bytes_as, part_config, plan_part, source_errors, wanted_dtype
from .tokenizer import has_tokenizer

logger = logging.getLogger(__name__)

#: A tokenizer's files; the folder they are found in can hold others (ComfyUI's models/text_encoders).
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_STOPPED = (
    "The conversion stopped and what it had written was removed. Make room on the disk, allow writing there, or choose "
    "another place (FAT32 disks cannot hold files of 5 GB)."
)
#: Endings of weight files that are not written here, so that none of them becomes the name of a folder.
_FOREIGN = {".pt", ".pth", ".ckpt", ".bin", ".gguf", ".sft"}


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
        change = f"cast from {before} to {after}" if self.audit or self.widened else f"{after} as stored"
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
    for kind in kinds:
        with source_errors(source.part(kind).source):
            source.part(kind).check_written()
    plans = [plan_part(source.part(kind), dtype, single, destination.name) for kind in kinds]
    others = {} if single else _others(source, plans)
    nbytes = sum(file.size for plan in plans for file in plan.files) + sum(map(len, others.values()))
    check_space(
        destination,
        nbytes,
        f"{short(destination, 400)} needs {size_text(nbytes)}",
        "the conversion halfway, and other programs with it, so nothing was written",
        "Make room, choose a place on another disk, or convert to 16 bits.",
    )

    progress = Progress(sum(plan.bytes_to_copy + plan.bytes_to_scan for plan in plans), on_progress)
    audits = {} if dtype is None else {plan.part.kind: _audit(plan, dtype, progress) for plan in plans if plan.to_scan}
    with disk_errors(destination, _STOPPED), _whole_or_nothing(destination, single) as partial:
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
        tuple(_converted(plan, audits.get(plan.part.kind)) for plan in plans),
        tuple(others),
        _left_out(source, single, others),
    )


def _converted(plan: Plan, audit: WeightAudit | None) -> ConvertedPart:
    after: dict[torch.dtype, int] = {}
    for stored in plan.tensors.values():
        wanted = wanted_dtype(stored, plan.dtype)
        after[wanted] = after.get(wanted, 0) + bytes_as(stored, plan.dtype)
    after = dict(sorted(after.items(), key=lambda item: -item[1]))
    files = tuple((file.name, file.size) for file in plan.files)
    widened = sum(name in plan.scales or stored.quantization is not None for name, stored in plan.tensors.items())
    before = stored_bytes(plan.tensors)
    return ConvertedPart(plan.part.kind, plan.part.source, plan.part.layout, files, before, after, audit, widened)


def _audit(plan: Plan, dtype: torch.dtype, progress: "Progress") -> WeightAudit:
    """Count what the cast loses.

    Raises:
        ValueError: if it would turn finite weights into Inf.
    """
    name, before = PARTS[plan.part.kind][0], progress.done
    with source_errors(plan.part.source):
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
            f"The cast of the {name} in {short(plan.part.source, 400)} to {dtype_name(dtype)} would turn "
            f"{audit.overflowed:,} finite weights into Inf, beyond "
            f"{torch.finfo(dtype).max:.5g}{f' (see {places})' if places else ''}. Every frame made with such a file is "
            f"black, so it was not written. {remedy}."
        )
    if audit.damaged:
        logger.warning(
            "%s holds weights that are NaN or Inf, and so will what is converted from it: %s",
            plan.part.source,
            audit.text,
        )
    return audit


def _others(source: Checkpoint, plans: list[Plan]) -> dict[str, bytes]:
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
        with source_errors(source.tokenizer):
            files |= {f"tokenizer/{name}": (source.tokenizer / name).read_bytes() for name in names}
        index["tokenizer"] = ["transformers", "T5Tokenizer" if "spiece.model" in names else "T5TokenizerFast"]
    # The transformer's last: a folder is known as a checkpoint by that file.
    for plan in reversed(plans):
        kind = plan.part.kind
        index[kind] = ["transformers" if kind == "text_encoder" else "diffusers", PARTS[kind][1]]
        if len(plan.files) > 1:
            total = sum(bytes_as(stored, plan.dtype) for stored in plan.tensors.values())
            places = {name: Path(file.name).name for file in plan.files for name in file.tensors}
            shards = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            files[f"{kind}/{WEIGHTS[kind]}.safetensors.index.json"] = _json(shards)
        files[f"{kind}/config.json"] = _json(part_config(plan.part, plan.dtype))
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
            f"{short(destination, 400)} has the ending of a file that is not written here: checkpoints are written as "
            "a folder or as one .safetensors file. Choose a name for one of them."
        )
    real = destination.resolve()
    for folder in (source.path, *(part.source for part in source.parts.values())):
        if folder.is_dir() and real.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{short(destination, 400)} lies inside {short(folder, 400)}, which is to be converted: the two would "
                "be mixed up, and the source no longer be what it was. Choose a place outside it."
            )


def _check_free(destination: Path, single: bool) -> None:
    empty = not single and destination.is_dir() and not any(destination.iterdir())
    if os.path.lexists(destination) and not empty:
        raise ValueError(
            f"{short(destination, 400)} is there already, and nothing is overwritten: it may be the only copy. Choose "
            f"another name, or move it away{'' if single else ' (a folder may be there if it is empty)'}."
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
            f"{short(partial, 400)} is there: another conversion is writing it, or one was killed. Two would spoil "
            "each other. If none is running, delete it and convert again."
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
    path.parent.mkdir(exist_ok=True)
    write_synced(path, content)


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
