"""Record findings about how something would run: a verdict, why, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, MISMATCH = "ok", "warning", "mismatch"
_SEVERITY = (OK, WARNING, MISMATCH)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        where: what it is about: a part, a line of a file, a node.
        verdict: ``ok``, ``warning`` (right, but slower or coarser than it could be) or ``mismatch`` (would give a wrong
            picture, or none).
        reason: one sentence.
        remedy: one sentence, or "" where there is nothing to do.
    """

    where: str
    verdict: str
    reason: str
    remedy: str = ""


def worst(findings: Iterable[Finding]) -> str:
    """Return the most severe verdict of ``findings``; ``ok`` where there are none."""
    return max((finding.verdict for finding in findings), key=_SEVERITY.index, default=OK)
