"""Decide in which dtype each part runs, by what is stored, what was trained and what the device computes in, and give
a verdict."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..checkpoint.layout import Checkpoint
from ..checkpoint.parts import Part
from ..choices import AUTO, FIX, ON_MISMATCH, STOP, check_choice
from ..dtypes import FP8_DTYPES, FP32, RANGE_SAFE_FP16, Precision, dtype_name
from ..variants import PARTS, Variant
from ..words import setting, short, size_text
from .hardware import ABSENT, EMULATED, NATIVE, Hardware
from .verdict import MISMATCH, OK, WARNING, Finding, worst

if TYPE_CHECKING:
    from ..checkpoint.audit import WeightAudit

#: ``choices.DTYPES`` as torch has them; None for ``auto``.
CHOICES: dict[str, torch.dtype | None] = {
    AUTO: None,
    **{dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)},
}


class DtypeMismatch(ValueError):
    """Raised where a dtype that was asked for would give a wrong picture, and that is to stop the run."""


@dataclass(frozen=True)
class PartPlan:
    """One part: bytes on disk by dtype, the dtype it was trained in, how it will run, and what there is to say about
    that.

    Attributes:
        origin: the file it comes from and whose names that has, "" for a folder in diffusers layout.
        changed: what ``fix`` made of the choice, or "".
    """

    kind: str
    stored: Mapping[torch.dtype | str, int]
    trained: torch.dtype
    run: Precision
    origin: str = ""
    findings: tuple[Finding, ...] = ()
    changed: str = ""

    @property
    def verdict(self) -> str:
        return worst(self.findings)

    @property
    def _label(self) -> str:
        return f"{self.verdict}, fixed" if self.changed else self.verdict

    @property
    def line(self) -> str:
        """What matters of it on one short line."""
        stored = " + ".join(dtype_name(dtype) for dtype in self.stored)
        return f"[{self._label}] {PARTS[self.kind][0]}: stored {stored}, runs in {self.run.name}"

    @property
    def text(self) -> str:
        stored = " + ".join(f"{dtype_name(dtype)} ({size_text(count)})" for dtype, count in self.stored.items())
        origin = f" ({self.origin})" if self.origin else ""
        packed = next(
            (
                dtype_name(dtype).split(" (")[0]
                for dtype in self.stored
                if isinstance(dtype, str) or dtype in FP8_DTYPES
            ),
            "",
        )
        kept = f", weights kept in {packed}" if packed else ""
        lines = [
            f"[{self._label}] {PARTS[self.kind][0]}: stored {stored}, trained in {dtype_name(self.trained)}, runs in "
            f"{self.run.name}{kept}{origin}"
        ]
        if self.changed:
            lines.append(f"    changed: {self.changed}")
        for finding in self.findings:
            lines += [f"    why: {finding.reason}"] + ([f"    do: {finding.remedy}"] if finding.remedy else [])
        return "\n".join(lines)


@dataclass(frozen=True)
class DtypePlan:
    """How a whole checkpoint runs on one device. ``text`` is for people, ``as_dict`` for scripts.

    Attributes:
        audits: what a scan of the weights found, where one was made.
        incomplete, notes: of the checkpoint: the parts of it that cannot be used and why, and what was decided where
            its folder left it open.
    """

    variant: str
    hardware: Hardware
    choice: str
    parts: tuple[PartPlan, ...]
    absent: tuple[str, ...]
    audits: tuple["WeightAudit", ...] = ()
    incomplete: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def precision(self, kind: str) -> Precision:
        """Return how a part of the checkpoint runs."""
        return next(part.run for part in self.parts if part.kind == kind)

    @property
    def verdict(self) -> str:
        """The worst verdict of the parts; ``mismatch`` too if a scan found weights that are not finite."""
        damaged = any(audit.damaged for audit in self.audits)
        return MISMATCH if damaged else worst(finding for part in self.parts for finding in part.findings)

    @property
    def text(self) -> str:
        return "\n".join([self._head, *(part.text for part in self.parts), *self._others])

    def short_text(self, memory: str) -> str:
        """Say it for a node, where lines are few: the verdict, ``memory``, a line a part, and each reason once.

        Args:
            memory: a line about what a run takes.
        """
        parts: dict[str, list[str]] = {}
        for part in self.parts:
            for finding in part.findings:
                # The parts' own names stand before it.
                reason = finding.reason.replace(f" {self.variant} was ", " it was ").replace(" T5 was ", " it was ")
                parts.setdefault(f"{reason} {finding.remedy}".rstrip(), []).append(PARTS[part.kind][0])
        reasons = [f"{', '.join(names)}: {told}" for told, names in parts.items()]
        return "\n".join([self._head, memory, *(part.line for part in self.parts), *reasons, *self._others])

    @property
    def _head(self) -> str:
        return f"{self.variant} on {self.hardware.text}, dtype {self.choice}: {self.verdict}"

    @property
    def _others(self) -> list[str]:
        """What there is to say beside the parts that run."""
        lines = [f"[absent] {PARTS[kind][0]}: not here; its output says what to use instead" for kind in self.absent]
        lines += [f"[incomplete] {PARTS[kind][0]}: {why}" for kind, why in self.incomplete.items()]
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, *(audit.text for audit in self.audits)]

    def as_dict(self) -> dict:
        """Give the plan as JSON has it: dtypes by name, sizes in bytes."""
        hardware = self.hardware
        return {
            "variant": self.variant,
            "device": {
                "type": hardware.device.type,
                "name": hardware.name,
                "bf16": hardware.bf16,
                "fp16": hardware.fp16,
                "fp8": hardware.fp8,
            },
            "dtype": self.choice,
            "verdict": self.verdict,
            "parts": [
                {
                    "part": part.kind,
                    "origin": part.origin,
                    "stored": {dtype_name(dtype): count for dtype, count in part.stored.items()},
                    "trained": dtype_name(part.trained),
                    "runs_in": dtype_name(part.run.dtype),
                    "range_safe": part.run.range_safe,
                    "verdict": part.verdict,
                    "findings": [asdict(finding) for finding in part.findings],
                    "changed": part.changed,
                }
                for part in self.parts
            ],
            "absent": list(self.absent),
            "incomplete": dict(self.incomplete),
            "notes": list(self.notes),
            "weights": [audit.as_dict() for audit in self.audits],
        }


def plan_dtypes(checkpoint: Checkpoint, choice: str, hardware: Hardware, on_mismatch: str = FIX) -> DtypePlan:
    """Decide how each part of ``checkpoint`` runs, from headers alone.

    Args:
        choice: one of ``CHOICES``.
        on_mismatch: one of ``ON_MISMATCH``: what to do where the choice would give a wrong picture.

    Raises:
        ValueError: for an unknown choice.
        DtypeMismatch: for a mismatch if ``on_mismatch`` is ``stop``.
    """
    check_choice("dtype", choice, CHOICES)
    check_choice("on_mismatch", on_mismatch, ON_MISMATCH)
    parts = []
    for kind, part in checkpoint.parts.items():
        asked, asker = CHOICES[choice], _Asker(f"dtype {choice} was chosen", "Choose auto")
        if asked is None and kind in hardware.forced:
            asked, flag = hardware.forced[kind]
            asker = _Asker(f"ComfyUI was started with {flag}", f"Start ComfyUI without {flag}")
        plan = _plan_part(kind, part, checkpoint.variant, asked, asker, hardware)
        if plan.changed and asked is not None and on_mismatch != FIX:
            plan = replace(plan, run=Precision(asked), changed="")
        parts.append(plan)
    mismatches = [finding for part in parts for finding in part.findings if finding.verdict == MISMATCH]
    if mismatches and on_mismatch == STOP:
        raise DtypeMismatch(
            f"The dtype does not suit this checkpoint, and {setting('on_mismatch')} is stop.\n"
            + "\n".join(f"{finding.where}: {finding.reason} {finding.remedy}" for finding in mismatches)
        )
    absent = tuple(kind for kind in PARTS if kind not in checkpoint.parts and kind not in checkpoint.incomplete)
    whole = DtypePlan(checkpoint.variant.name, hardware, choice, tuple(parts), absent)
    return replace(whole, incomplete=checkpoint.incomplete, notes=checkpoint.notes)


def scan_parts(
    checkpoint: Checkpoint, plan: DtypePlan, on_progress: Callable[[int, int], None] | None = None
) -> DtypePlan:
    """Read every weight of ``checkpoint`` once and add to its plan what was found, against the dtype each part is to
    run in.

    Args:
        on_progress: called with (bytes read, bytes in all); an exception it raises stops the scan.

    Raises:
        ValueError: for a part that was not written to its end, or whose scales are none.
    """
    from ..checkpoint.audit import scan_weights

    sizes = {
        kind: sum(t.nbytes for t in part.tensors.values() if t.dtype.is_floating_point)
        for kind, part in checkpoint.parts.items()
    }
    total = sum(sizes.values())
    audits, before = [], 0
    for kind, part in checkpoint.parts.items():
        part.check_written()
        report = (
            None if on_progress is None else partial(lambda offset, done, _: on_progress(offset + done, total), before)
        )
        audits.append(scan_weights(part.tensors, plan.precision(kind).dtype, PARTS[kind][0], report))
        before += sizes[kind]
    return replace(plan, audits=tuple(audits))


def safer(kind: str, precision: Precision, hardware: Hardware) -> list[Precision]:
    """List how else a part can run to hold larger values than in ``precision``, the fastest first: range-safe fp16,
    bf16 where native, fp32.

    The VAE's convolutions are not made range-safe: it goes straight to fp32.
    """
    ladder = [FP32]
    if kind != "vae":
        ladder = [RANGE_SAFE_FP16, *([Precision(torch.bfloat16)] if hardware.bf16 == NATIVE else []), FP32]
    if precision in ladder:
        return ladder[ladder.index(precision) + 1 :]
    return ladder if precision.dtype == torch.float16 else [FP32]


@dataclass(frozen=True)
class _Asker:
    """Whose wish a dtype is, and how to take it back."""

    said: str
    undo: str


def _automatic(kind: str, trained: torch.dtype, variant: Variant, hardware: Hardware) -> Precision:
    """Return what ``auto`` runs a part in: the variant's dtype if native, else fp16 if that is, else fp32."""
    dtype = variant.trained_dtype
    if hardware.support(dtype) != NATIVE:
        dtype = torch.float16 if hardware.fp16 == NATIVE else torch.float32
    if dtype == torch.float16 and kind == "vae" and not hardware.half_convolutions:
        dtype = torch.float32
    return Precision(dtype, range_safe=dtype == torch.float16 and kind != "vae" and trained != torch.float16)


def _plan_part(
    kind: str, part: Part, variant: Variant, asked: torch.dtype | None, asker: _Asker, hardware: Hardware
) -> PartPlan:
    """Plan a part for the dtype asked for (None: ``auto``), with the fix where it does not suit."""
    # T5 was trained in bf16 whatever transformer reads its embeddings.
    trained = torch.bfloat16 if kind == "text_encoder" else variant.trained_dtype
    automatic = _automatic(kind, trained, variant, hardware)
    if asked is None:
        run, findings = automatic, _automatic_findings(kind, automatic, hardware)
    else:
        run, findings = _asked_findings(kind, trained, variant, asked, asker, automatic, hardware)
    changed = "" if asked is None or run == Precision(asked) else f"runs in {run.name} instead of {dtype_name(asked)}"
    origin = "" if part.layout == "diffusers" else f"{short(part.source.name)}, {part.layout}"
    origin = "with a LoRA inside" if part.lora and not origin else origin
    return PartPlan(
        kind, part.stored, trained, run, origin, (*findings, *_stored_findings(kind, part.stored, trained)), changed
    )


def _automatic_findings(kind: str, run: Precision, hardware: Hardware) -> list[Finding]:
    """Say why ``auto`` chose another dtype than the trained one."""
    if run.range_safe:
        why = (
            "was trained in bf16"
            if hardware.bf16 == NATIVE
            else f"was trained in bf16, which {hardware.name} has not natively"
        )
        who = "T5" if kind == "text_encoder" else "It"
        return [
            Finding(
                PARTS[kind][0], OK, f"{who} {why}: range-safe fp16 cannot overflow, and is closer to fp32 than bf16 is."
            )
        ]
    if run == FP32 and kind == "vae" and not hardware.half_convolutions:
        return [Finding(PARTS[kind][0], OK, f"Convolutions in fp16 give NaN on {hardware.name}, so it runs in fp32.")]
    if run == FP32:
        why = (
            f"{hardware.name} computes faster in fp32 than in 16 bits, so fp32 is right; a card with fast bf16 would "
            "take less time."
        )
        return [Finding(PARTS[kind][0], OK, why)]
    return []


def _asked_findings(
    kind: str,
    trained: torch.dtype,
    variant: Variant,
    asked: torch.dtype,
    asker: _Asker,
    automatic: Precision,
    hardware: Hardware,
) -> tuple[Precision, list[Finding]]:
    """Judge a dtype that somebody asked for, and say how to run instead where it would give a wrong picture."""
    where, dtype, support = PARTS[kind][0], dtype_name(asked), hardware.support(asked)
    undo = f"{asker.undo}: then it runs in {automatic.name} here."
    if support == ABSENT:
        return automatic, [
            Finding(where, MISMATCH, f"{asker.said}, but {hardware.name} has no {dtype}: it would fail or crawl.", undo)
        ]
    if asked == torch.float16 and kind == "vae" and not hardware.half_convolutions:
        return FP32, [
            Finding(where, MISMATCH, f"{asker.said}, but convolutions in fp16 give NaN on {hardware.name}.", undo)
        ]
    run, findings = Precision(asked), []
    if asked == torch.float16 and kind == "vae":
        findings.append(
            Finding(where, OK, "Every chunk of frames is checked, and one that is not finite is decoded again in fp32.")
        )
    elif asked == torch.float16 and trained != torch.float16:
        who = "T5" if kind == "text_encoder" else variant.name
        reason = (
            f"{asker.said}, but {who} was trained in {dtype_name(trained)}: in plain fp16 its activations can pass "
            "65504, become Inf, then NaN, and the video turns black."
        )
        remedy = f"{asker.undo}, or leave {setting('on_mismatch')} at fix: range-safe fp16 cannot overflow."
        run, findings = RANGE_SAFE_FP16, [Finding(where, MISMATCH, reason, remedy)]
    elif asked == torch.bfloat16 and trained == torch.float16 and kind == "transformer":
        reason = (
            f"{variant.name} was trained in fp16, and bf16 keeps 8 of its 11 significant bits: the video is finite, "
            "but coarser."
        )
        findings.append(Finding(where, WARNING, reason, undo))
    if support == EMULATED:
        findings.append(Finding(where, WARNING, f"{hardware.name} only emulates {dtype}: right, but slow.", undo))
    return run, findings


def _stored_findings(kind: str, stored: Mapping[torch.dtype | str, int], trained: torch.dtype) -> list[Finding]:
    """Say what an earlier cast of the file has already cost."""
    name = PARTS[kind][0]
    quantized = ", ".join(dtype for dtype in stored if isinstance(dtype, str))
    if quantized:
        reason = (
            f"The file is a quantized copy ({quantized}): the rest of its weights' precision is lost, whatever they "
            "run in."
        )
        return [Finding(name, WARNING, reason, "For full quality download the original weights.")]
    if any(dtype in FP8_DTYPES for dtype in stored):
        bits = min(4 if dtype == torch.float8_e4m3fn else 3 for dtype in stored if dtype in FP8_DTYPES)
        return [
            Finding(
                name,
                WARNING,
                f"The file is an fp8 copy: its weights keep {bits} significant bits and lost the rest, whatever they "
                "run in.",
                "For full quality download the original weights.",
            )
        ]
    if torch.float16 in stored and trained == torch.bfloat16 and kind == "transformer":
        return [
            Finding(
                name,
                WARNING,
                "The file is an fp16 copy of weights trained in bf16: magnitudes under 5.96e-8 became zero and those "
                "over 65504 Inf, and that is lost whatever they run in.",
                "Usually little is lost; scan_weights tells, and the original file is in bf16.",
            )
        ]
    return []
