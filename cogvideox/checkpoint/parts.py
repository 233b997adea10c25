"""One part of a checkpoint on disk, opened but not read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ..files import unreadable
from ..variants import PARTS
from ..words import listed, short
from .headers import StoredTensor, is_blank, read_tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a checkpoint on disk: its config and the place of every tensor. Nothing of the weights is read.

    Attributes:
        kind: ``transformer``, ``text_encoder`` or ``vae``.
        source: the folder or file it comes from.
        layout: ``diffusers`` (a folder), or whose names a file has: ``diffusers file``, ``ComfyUI``, ``SAT``,
            ``llama.cpp``, ``single file`` (T5).
        config: its ``config.json``, or what its shapes say.
        tensors: every tensor, by the name that the module has for it.
        scales: what fp8 weights are to be multiplied by, by the weight's name.
        lora: the halves of a LoRA that was being trained on it when it was saved, by the names they have in the file: a
            part of the model.
        note: which files were read where others lay beside them, in a sentence, or nothing.
    """

    kind: str
    source: Path
    layout: str
    config: Mapping
    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    lora: Mapping[str, StoredTensor] = field(default_factory=dict)
    note: str = ""
    _sizes: Mapping[Path, int] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_sizes", {file: _size(file) for file in self._weight_files})

    def check_unchanged(self) -> None:
        """Refuse to read what is no longer what was opened: where a tensor lies is known of that file alone.

        Raises:
            ValueError: if a file is gone, or has another size than when its header was read.
        """
        for file, opened in self._sizes.items():
            if (size := _size(file)) != opened:
                raise ValueError(
                    f"{short(file, 400)} had {opened:,} bytes when it was opened and has {size:,} now, so where its "
                    "weights lie is not known any more. Run again once the file is whole."
                )

    def check_written(self) -> None:
        """Refuse weights that nobody wrote: a file has its full size before a download or a copy is done, or after the
        power failed, and holds zeros there, with which a part runs and makes another picture.

        Raises:
            ValueError: for matrices of zeros alone, and for scales of fp8 weights that are zero, NaN or Inf.
        """
        blank = blank_of(self.tensors)
        if blank:
            raise ValueError(
                f"{short(self.tensors[blank[0]].file, 400)} is not whole: {len(blank):,} of the {len(self.tensors):,} "
                f"weights of the {PARTS[self.kind][0]} ({listed(blank)}) are zeros throughout, as where a download or "
                "a copy was not finished. The video would be noise or grey: delete the file and download it again."
            )
        for name, stored in self.scales.items():
            scale = read_tensor(stored).float()
            if not scale.any() or not scale.isfinite().all():
                raise ValueError(
                    f"{short(stored.file, 400)}: the scale of {short(name)} is zero, NaN or Inf, so the "
                    f"{PARTS[self.kind][0]} would give noise or black. The file is damaged, or was badly converted: "
                    "download it again, or another one."
                )

    @cached_property
    def stored(self) -> dict[torch.dtype | str, int]:
        """Bytes on disk by dtype (GGUF's quantizations by name), largest first."""
        return stored_bytes(self.tensors)

    @property
    def files(self) -> list[Path]:
        """Every file it is read from."""
        config = {self.source / "config.json"} if os.path.isfile(self.source / "config.json") else set()
        return sorted(self._weight_files | config)

    @property
    def _weight_files(self) -> set[Path]:
        return {tensor.file for tensor in (*self.tensors.values(), *self.lora.values())}


def blank_of(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """List the matrices that are zeros throughout, in the order they lie in: no trained model has one. (What has one
    dimension, a bias, may be.)"""
    matrices = sorted((stored.file, stored.offset, name) for name, stored in tensors.items() if len(stored.shape) > 1)
    return [name for *_, name in matrices if is_blank(tensors[name])]


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise ValueError(unreadable(file, error)) from error


def stored_bytes(tensors: Mapping[str, StoredTensor]) -> dict[torch.dtype | str, int]:
    """Bytes by dtype (GGUF's quantizations by name), largest first."""
    count: dict[torch.dtype | str, int] = {}
    for tensor in tensors.values():
        count[tensor.kind] = count.get(tensor.kind, 0) + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1]))
