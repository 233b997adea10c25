"""Build a part's module and stream its weights from disk straight into the dtype and device it will run in."""

import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from .checkpoint.architecture import check_tensors
from .checkpoint.configs import known_fields
from .checkpoint.headers import StoredTensor, read_tensor
from .checkpoint.parts import Part
from .dependencies import import_failure
from .dtypes import Precision
from .modules import internals
from .modules.joint import join
from .modules.packed import PackedLinear, PackedWeight
from .modules.quantize import Quantizer
from .modules.range_safe import RangeSafeLinear, ScaledWeight, make_range_safe
from .variants import PARTS
from .words import reason, short

#: Bytes cast at a time, between two reports of progress.
_CHUNK = 32 << 20
#: For a map that may be written to, Windows sets aside memory or page file for every byte, written or not (Microsoft's
#: documentation of MapViewOfFile): a model of 20 GB would not open where 20 GB are not free. Nothing here writes to
#: weights.
_ACCESS = mmap.ACCESS_READ if os.name == "nt" else mmap.ACCESS_COPY


def load_module(
    part: Part,
    precision: Precision,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
    quantizer: Quantizer | None = None,
) -> nn.Module:
    """Build the unmodified diffusers or transformers module of ``part`` and fill it from disk.

    The module is built without memory for its weights. A tensor that stays in the host's memory as it is stored is
    mapped from the file, and read when it is first used; any other is allocated once, in its final dtype and on its
    final device, and cast into place. Peak memory is the loaded part, quantized if it is to be, plus one tensor.

    Args:
        on_progress: called with (bytes read, bytes in all) as files are read.
        quantizer: quantizes the weights that it takes.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape than the config says, one to be quantized
            is not finite, a file is not the one that was opened, or was not written to its end.
    """
    part.check_unchanged()
    part.check_written()
    module, slots, names = empty_module(part)
    quantized = {name for name in part.tensors if quantizer is not None and quantizer.takes(name)}
    plain_fp16 = precision == Precision(torch.float16)
    keep = internals.kept_in_fp32(module) if plain_fp16 else ()
    if precision.range_safe:
        make_range_safe(module)
    else:
        _keep_packed(module, quantized | {name for name, stored in part.tensors.items() if stored.is_packed})
    total, done = sum(tensor.nbytes for tensor in part.tensors.values()), 0
    files = _MappedFiles()

    def report(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for name, stored in sorted(part.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        owners = _owners(module, names[id(slots[name])])
        owner, is_weight = owners[0][0], owners[0][1] == "weight"
        if stored.is_packed:
            scale = read_tensor(part.scales[name]) if name in part.scales else None
            shape = None if stored.quantization is None or stored.raw_shape[0] == stored.shape[0] else stored.shape
            packed = PackedWeight(files.read(stored, stored.dtype, device, report), scale, stored.quantization, shape)
            if is_weight and isinstance(owner, PackedLinear | RangeSafeLinear):
                owner.load_packed(packed)
                continue
            if is_weight and isinstance(owner, ScaledWeight):
                # T5's token embedding, which is looked up and not multiplied.
                owner.load_weight(packed.scaled(torch.float32), device)
                continue
            tensor = packed.scaled(precision.activations).reshape(stored.shape)
        elif quantizer is not None and name in quantized:
            owner.load_packed(
                quantizer.quantize(name, files.read(stored, stored.dtype, torch.device("cpu"), report), device)
            )
            files.give_back(stored)
            continue
        elif is_weight and isinstance(owner, ScaledWeight):
            # It is scaled from what is stored, on the host.
            owner.load_weight(files.read(stored, stored.dtype, torch.device("cpu"), report), device)
            files.give_back(stored)
            continue
        else:
            kept = any(word in name.split(".") for word in keep)
            wanted = (
                torch.float32 if kept else precision.activations if stored.dtype.is_floating_point else stored.dtype
            )
            tensor = files.read(stored, wanted, device, report)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, leaf in owners:
            setattr(owner, leaf, parameter if isinstance(getattr(owner, leaf), nn.Parameter) else tensor)
    if part.kind == "transformer":
        join(module)
    return module.to(device).requires_grad_(False).eval()


def read_wide(part: Part, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read a few tensors of ``part`` to the host, in fp32, whatever they are stored in."""
    found = {}
    for name in names:
        stored = part.tensors[name]
        data = read_tensor(stored)
        if stored.is_packed:
            scale = read_tensor(part.scales[name]) if name in part.scales else None
            data = PackedWeight(data, scale, stored.quantization).scaled(torch.float32)
        found[name] = data.float().reshape(stored.shape)
    return found


def empty_module(part: Part) -> tuple[nn.Module, Mapping[str, torch.Tensor], Mapping[int, list[str]]]:
    """The module of ``part`` without memory for its weights, which are known to be the ones on disk.

    Returns:
        The module; its tensors by name; and the names of each by its ``id``, as tied weights have several, and any of
        them on disk (T5's token embedding).

    Raises:
        ValueError: if tensors are missing, left over, or of another shape than the config says.
    """
    module = _build(part)
    slots = module.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for slot, parameter in slots.items():
        names.setdefault(id(parameter), []).append(slot)
    check_tensors(part, {name: tuple(slot.shape) for name, slot in slots.items()}, names.values())
    return module, slots, names


def _build(part: Part) -> nn.Module:
    # Of any type: what a library finds wrong with a config is told in its own terms, and this one passed
    # ``check_config``.
    try:
        module = build_module(part.kind, part.config)
    except Exception as error:
        if import_failure(error):
            raise
        file = part.source / "config.json" if part.source.is_dir() else part.source
        raise ValueError(
            f"The {PARTS[part.kind][0]} that {short(file, 400)} describes cannot be built ({reason(error)}), so its "
            "weights cannot be used. Download config.json and the weights again from one repository."
        ) from error
    if part.kind == "text_encoder":
        # The empty weights are distinct again: the token embedding has two names and one tensor.
        t5: internals.LibraryModule = module
        t5.encoder.embed_tokens.weight = t5.shared.weight
    return module


def build_module(kind: str, config: Mapping) -> nn.Module:
    """Build the unmodified module of a part, without memory for its weights."""
    from accelerate import init_empty_weights

    known = known_fields(kind, config)
    with init_empty_weights():
        return _text_encoder(known) if kind == "text_encoder" else _from_config(PARTS[kind][1], known)


def _text_encoder(config: dict) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def _from_config(class_name: str, config: dict) -> nn.Module:
    import diffusers

    return getattr(diffusers, class_name).from_config(config)


class _MappedFiles:
    """Files mapped into memory. A page that is written to becomes the process's own (Windows lets none be written to);
    the file never changes."""

    def __init__(self):
        self._maps: dict[Path, tuple[mmap.mmap, torch.Tensor]] = {}

    def read(
        self, stored: StoredTensor, dtype: torch.dtype, device: torch.device, on_read: Callable[[int], None]
    ) -> torch.Tensor:
        """A tensor in ``dtype`` on ``device``. One that is to stay as it is on the host is a view of the file, read
        when it is used."""
        shape = stored.raw_shape
        if not stored.nbytes:
            return torch.empty(shape, dtype=dtype, device=device)
        whole = self._map(stored.file)[1]
        aligned = all(offset % stored.dtype.itemsize == 0 for offset, _ in stored.ranges)
        if dtype == stored.dtype and device.type == "cpu" and aligned and not stored.more:
            on_read(stored.nbytes)
            return whole[stored.offset : stored.offset + stored.nbytes].view(dtype).view(shape)
        target = torch.empty(shape, dtype=dtype, device=device)
        flat, filled = target.view(-1), 0
        for start, nbytes in stored.ranges:
            for offset in range(start, start + nbytes, _CHUNK):
                piece = whole[offset : min(offset + _CHUNK, start + nbytes)]
                piece = (piece if aligned else piece.clone()).view(stored.dtype)
                flat[filled : filled + piece.numel()].copy_(piece)
                filled += piece.numel()
                on_read(piece.nbytes)
        self.give_back(stored)
        return target

    def give_back(self, stored: StoredTensor) -> None:
        """Tell the system that a tensor's pages are not needed: a map counts as the process's memory until then, which
        doubles the peak of a cast. A page that a neighbour shares is read again when that is used."""
        mapped = self._map(stored.file)[0]
        if hasattr(mapped, "madvise"):
            for offset, nbytes in stored.ranges:
                page = offset // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, page, offset + nbytes - page)

    def _map(self, path: Path) -> tuple[mmap.mmap, torch.Tensor]:
        if path not in self._maps:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=_ACCESS)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                self._maps[path] = mapped, torch.frombuffer(mapped, dtype=torch.uint8)
        return self._maps[path]


def _keep_packed(module: nn.Module, names: Iterable[str]) -> None:
    """Put a Linear that keeps its weight packed in the place of each whose weight is one of ``names``."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        linear = module.get_submodule(path)
        if leaf == "weight" and isinstance(linear, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, PackedLinear(linear))


def _owners(module: nn.Module, names: Iterable[str]) -> list[tuple[internals.LibraryModule, str]]:
    """The modules that hold the tensor of these names, and what they call it."""
    paths = [name.rpartition(".") for name in names]
    return [(module.get_submodule(path), leaf) for path, _, leaf in paths]
