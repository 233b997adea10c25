"""One part of a checkpoint on disk, opened but not read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from .headers import StoredTensor


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

    @cached_property
    def stored(self) -> dict[torch.dtype | str, int]:
        """Bytes on disk by dtype (GGUF's quantizations by name), largest first."""
        return stored_bytes(self.tensors)

    @property
    def files(self) -> list[Path]:
        """Every file it is read from."""
        config = {self.source / "config.json"} if os.path.isfile(self.source / "config.json") else set()
        return sorted({tensor.file for tensor in (*self.tensors.values(), *self.lora.values())} | config)


def stored_bytes(tensors: Mapping[str, StoredTensor]) -> dict[torch.dtype | str, int]:
    """Bytes by dtype (GGUF's quantizations by name), largest first."""
    count: dict[torch.dtype | str, int] = {}
    for tensor in tensors.values():
        count[tensor.kind] = count.get(tensor.kind, 0) + tensor.nbytes
    return dict(sorted(count.items(), key=lambda item: -item[1]))
