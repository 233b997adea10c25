"""What a check of a config says, and what its readers share."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cogvideox.precision.verdict import Finding, worst

SAT = "SAT inference.yaml"
WORKFLOW = "ComfyUI workflow"
#: Why fp16 is wrong for weights trained in bf16, as the end of a sentence.
BLACK = (
    "activations of a bf16-trained model pass 65504, the largest fp16 number, so they become inf, the next LayerNorm "
    "makes them NaN, and the video comes out black"
)
WHERE = (
    "Choose a SAT inference.yaml (sat/configs/inference.yaml in zai-org/CogVideo is one) or a workflow saved or "
    "exported by ComfyUI as JSON."
)


@dataclass(frozen=True)
class ConfigReport:
    """What ``check_config`` saw.

    Attributes:
        path: the file that was read.
        kind: ``SAT inference.yaml`` or ``ComfyUI workflow``.
        model: which model it runs, in which dtype that was trained, and how this is known.
        findings: in the order of the file.
    """

    path: Path
    kind: str
    model: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of the findings."""
        return worst(self.findings)

    @property
    def text(self) -> str:
        """The report for people: one line a finding, and under it what to do."""
        lines = [f"{self.path} ({self.kind})", f"model: {self.model}"]
        for finding in self.findings:
            lines.append(f"[{finding.verdict}] {finding.where}: {finding.reason}")
            if finding.remedy:
                lines.append(f"    do: {finding.remedy}")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """The report as JSON has it."""
        findings = [asdict(finding) for finding in self.findings]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "verdict": self.verdict,
            "model": self.model,
            "findings": findings,
        }
