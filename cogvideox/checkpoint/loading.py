"""Build a part's module and stream its weights from disk straight into the dtype and device it will run in."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..precision.packed import PackedLinear, PackedWeight
from ..precision.policy import Precision
from ..precision.range_safe import RangeSafeLinear, ScaledWeight, make_range_safe
from .headers import StoredTensor, fill
from .layout import PARTS, Part

#: Bytes read at a time where stored and target dtype differ: all the memory that a cast needs beside the target.
_CHUNK = 16 << 20


def load_module(part: Part, precision: Precision, device: torch.device, on_progress: Callable[[int, int], None] | None = None) -> nn.Module:
    """Build the unmodified diffusers or transformers module of ``part`` and fill it from disk.

    The module is built without memory for its weights; each tensor is then allocated once, in its final dtype and on its final
    device, and read into place. Peak memory is the loaded part plus one small buffer; where weights are made range-safe, plus one tensor.

    Args:
        on_progress: called with (bytes read, bytes in all) as files are read.

    Returns:
        The module in eval mode, without gradients.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape than the config says.
    """
    module = _empty_module(part)
    slots = module.state_dict(keep_vars=True)
    # Tied weights have several names in the module and any of them on disk (T5's token embedding).
    names: dict[int, list[str]] = {}
    for slot, parameter in slots.items():
        names.setdefault(id(parameter), []).append(slot)
    _check_names(part, slots, names.values())
    # Modules that transformers itself keeps in float32 when a model runs in float16 (T5's `wo`, which overflows there).
    plain_fp16 = precision == Precision(torch.float16)
    keep = tuple(getattr(module, "_keep_in_fp32_modules", None) or ()) if plain_fp16 else ()
    if precision.range_safe:
        make_range_safe(module)
    else:
        _keep_packed(module, part)
    total, done = sum(tensor.nbytes for tensor in part.tensors.values()), 0
    with _open_files() as open_file:
        for name, stored in sorted(part.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            owners = _owners(module, names[id(slots[name])])
            owner, is_weight = owners[0][0], owners[0][1] == "weight"
            # What is packed is read as it is; so is what range-safe layers scale for themselves.
            as_stored = stored.is_packed or not stored.dtype.is_floating_point or (is_weight and isinstance(owner, ScaledWeight))
            kept = any(word in name.split(".") for word in keep)
            wanted = stored.dtype if as_stored else torch.float32 if kept else precision.activations
            target = torch.empty(stored.raw_shape, dtype=wanted, device="cpu" if as_stored else device)
            for count in _read_into(open_file(stored.file), stored, target):
                done += count
                if on_progress is not None:
                    on_progress(done, total)
            if stored.is_packed:
                scale = _read(part.scales[name]) if name in part.scales else None
                packed = PackedWeight(target.to(device), scale, stored.quantization)
                if is_weight and isinstance(owner, PackedLinear):
                    owner.packed = packed
                    continue
                if is_weight and isinstance(owner, RangeSafeLinear):
                    owner.load_packed(packed)
                    continue
                target = packed.scaled(precision.activations).reshape(stored.shape)
            if is_weight and isinstance(owner, ScaledWeight):
                owner.load_weight(target, device)
                continue
            parameter = nn.Parameter(target, requires_grad=False)
            for owner, leaf in owners:
                if leaf in owner._parameters:
                    owner._parameters[leaf] = parameter
                else:
                    owner._buffers[leaf] = target
    return module.to(device).requires_grad_(False).eval()


def _empty_module(part: Part) -> nn.Module:
    from accelerate import init_empty_weights

    if part.kind == "text_encoder":
        from transformers import T5Config, T5EncoderModel

        with init_empty_weights():
            module = T5EncoderModel(T5Config.from_dict(dict(part.config)))
        # The empty weights are distinct again: the token embedding has two names and one tensor.
        module.encoder.embed_tokens.weight = module.shared.weight
        return module
    import diffusers

    with init_empty_weights():
        return getattr(diffusers, PARTS[part.kind][1]).from_config(dict(part.config))


def _check_names(part: Part, slots: Mapping[str, torch.Tensor], groups: Iterable[list[str]]) -> None:
    missing = sorted(group[0] for group in groups if not any(name in part.tensors for name in group))
    unknown = sorted(set(part.tensors) - set(slots))
    wrong = sorted(n for n in set(part.tensors) & set(slots) if part.tensors[n].shape != tuple(slots[n].shape))
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if problems:
        origin = "config.json" if part.layout == "diffusers" else "shapes"
        raise ValueError(
            f"The weights in {part.source} (layout: {part.layout}) are not those of the {PARTS[part.kind][0]} that its {origin} would make: of "
            f"{len(slots)} tensors, {'; '.join(problems)}. The model would not be the one that was trained. Download it again, whole, from one "
            "repository."
        )


@contextmanager
def _open_files() -> Iterator[Callable]:
    """Keep the file being read open, closing it when the next begins: tensors are read in the order they lie in."""
    current: list = [None, None]

    def open_file(path):
        if current[0] != path:
            if current[1] is not None:
                current[1].close()
            current[:] = [path, path.open("rb", buffering=0)]
        return current[1]

    try:
        yield open_file
    finally:
        if current[1] is not None:
            current[1].close()


def _read_into(file, stored: StoredTensor, target: torch.Tensor) -> Iterator[int]:
    """Fill ``target`` with the stored tensor, cast as it comes; yields the bytes of each piece read.

    Plain reads and not a memory map: a map counts as the process's memory until the system takes it back, which doubles the
    peak of a cast.
    """
    flat, done = target.view(-1), 0
    in_place = stored.dtype == target.dtype and target.device.type == "cpu"
    step = flat.numel() if in_place else max(1, _CHUNK // stored.dtype.itemsize)
    buffer = None if in_place else torch.empty(min(step, flat.numel()), dtype=stored.dtype)
    for offset, nbytes in stored.ranges:
        file.seek(offset)
        end = done + nbytes // stored.dtype.itemsize
        while done < end:
            count = min(step, end - done)
            piece = flat[done : done + count] if buffer is None else buffer[:count]
            fill(file, _bytes(piece), stored.file)
            if buffer is not None:
                flat[done : done + count].copy_(piece)
            done += count
            yield piece.nbytes


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _keep_packed(module: nn.Module, part: Part) -> None:
    """Put a Linear that keeps its weight packed in the place of each whose weight is stored so."""
    for name, stored in part.tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and stored.is_packed and isinstance(module.get_submodule(path), nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, PackedLinear(module.get_submodule(path)))


def _read(stored: StoredTensor) -> torch.Tensor:
    """A small tensor, on the host."""
    target = torch.empty(stored.shape, dtype=stored.dtype)
    with stored.file.open("rb", buffering=0) as file:
        for _ in _read_into(file, stored, target):
            pass
    return target


def _owners(module: nn.Module, names: Iterable[str]) -> list[tuple[nn.Module, str]]:
    """The modules that hold the tensor of these names, and what they call it."""
    paths = [name.rpartition(".") for name in names]
    return [(module.get_submodule(path), leaf) for path, _, leaf in paths]
