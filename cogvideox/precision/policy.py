"""The dtype policy: what is stored, what was trained, what this device computes in, and what will run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.layout import PARTS, Checkpoint

#: The loader's choices. ``auto`` is the trained dtype where the device can compute in it, else float32.
CHOICES: dict[str, torch.dtype | None] = {
    "auto": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8 (e4m3fn)",
    torch.float8_e5m2: "fp8 (e5m2)",
}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bf16``."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Hardware:
    """The device a model will run on, and the 16-bit dtypes it computes in."""

    device: torch.device
    name: str
    bf16: bool
    fp16: bool = True

    @classmethod
    def detect(cls, device: torch.device | str | None = None) -> "Hardware":
        """Ask torch what ``device`` (default: the GPU if there is one) can compute in."""
        if device is None:
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = accelerator or "cpu"
        device = torch.device(device)
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(device, torch.cuda.get_device_name(device), bf16)
        if device.type == "mps":
            return cls(device, "Apple GPU (MPS)", torch.backends.mps.is_macos_or_newer(14, 0))
        return cls(device, device.type.upper(), True)

    def computes_in(self, dtype: torch.dtype) -> bool:
        return {torch.bfloat16: self.bf16, torch.float16: self.fp16}.get(dtype, True)


@dataclass(frozen=True)
class PartDtypes:
    """One part's dtypes: bytes on disk by dtype, the dtype of the variant's training, and the one it will run in."""

    kind: str
    stored: Mapping[torch.dtype, int]
    trained: torch.dtype
    run: torch.dtype

    @property
    def text(self) -> str:
        stored = " + ".join(f"{dtype_name(dtype)} ({_size(count)})" for dtype, count in self.stored.items())
        return f"{PARTS[self.kind][0]}: stored {stored}, trained in {dtype_name(self.trained)}, runs in {dtype_name(self.run)}"


@dataclass(frozen=True)
class DtypePlan:
    """The dtypes of a whole checkpoint on one device. ``text`` is for people."""

    variant: str
    hardware: Hardware
    parts: tuple[PartDtypes, ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...]

    def run_dtype(self, kind: str) -> torch.dtype:
        return next(part.run for part in self.parts if part.kind == kind)

    @property
    def text(self) -> str:
        lines = [f"{self.variant} on {self.hardware.name}", *(part.text for part in self.parts)]
        lines += [f"{PARTS[kind][0]}: not in this folder" for kind in self.absent]
        return "\n".join([*lines, *self.notes])


def plan_dtypes(checkpoint: Checkpoint, choice: str, hardware: Hardware) -> DtypePlan:
    """Decide in which dtype each part of ``checkpoint`` runs.

    Args:
        choice: one of ``CHOICES``.

    Raises:
        ValueError: for an unknown choice, or a dtype that the device cannot compute in.
    """
    if choice not in CHOICES:
        raise ValueError(f"The dtype is {choice!r}, which is not known here. Choose one of {', '.join(CHOICES)}.")
    trained = checkpoint.variant.trained_dtype
    notes = []
    run = CHOICES[choice]
    if run is None:
        run = trained if hardware.computes_in(trained) else torch.float32
        if run != trained:
            notes.append(f"{hardware.name} cannot compute in {dtype_name(trained)}, so auto runs in fp32: right, and slower.")
    elif not hardware.computes_in(run):
        raise ValueError(f"dtype {choice} was chosen, but {hardware.name} cannot compute in it, so the run would fail or crawl. Choose auto or fp32.")
    if run == torch.float16 and trained != torch.float16:
        notes.append(
            f"WARNING: {checkpoint.variant.name} was trained in {dtype_name(trained)}; in fp16 its activations can pass 65504 and the video "
            "turns black. Choose auto."
        )
    parts = tuple(PartDtypes(kind, part.stored, trained, run) for kind, part in checkpoint.parts.items())
    absent = tuple(kind for kind in PARTS if kind not in checkpoint.parts)
    return DtypePlan(checkpoint.variant.name, hardware, parts, absent, tuple(notes))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
