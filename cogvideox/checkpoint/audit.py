"""The weight audit: what lies in a checkpoint's weights that a dtype cannot hold. Every weight is read once.

The scan is nearly as quick as reading the file (``benchmarks/scan.py``): a few workers take turns at reading, block by
block in the order the weights lie in, and each looks at its block while the next one reads. Everything is decided on
bit patterns: without its sign, a float's pattern read as an integer is ordered as its magnitude, so every question
("does fp16 flush it?") is a compare with one integer. Those integers are found by asking torch's own cast, not written
down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from math import prod

import numpy as np
import torch

from ..words import short
from .audit_blocks import Block, Progress, Reader, runs_of
from .audit_ruler import SIGNED, UNSIGNED, Ruler, ruler_of
from .headers import StoredTensor

#: The dtypes a part can run in, and what to call them.
TARGETS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

#: Bytes read at a time. Small enough that a block is still in the processor's cache when it is looked at, large enough
#: that a worker seldom has to wait for the interpreter while another holds it.
_BLOCK = 1 << 22
#: Values of a block looked at alone where something rare was seen in them. At most torch's grain (32768): more would
#: start its own threads.
_TILE = 1 << 15
_STARTS = np.arange(0, _BLOCK, _TILE)
#: Reading is one at a time, so more workers than this only wait.
_MOST_WORKERS = 4
#: Tensors named in an audit.
_NAMED = 5


@dataclass(frozen=True)
class WeightAudit:
    """What one part's weights hold. Counts are of single weights, of either sign; a weight that is ±0 is in none of
    them.

    Attributes:
        name: the part, for people (``transformer``).
        target: the dtype the part is to run in.
        values: floating-point weights read.
        nan, inf: weights that are NaN or ±Inf as stored.
        beyond_fp16: finite weights beyond 65504, the largest fp16 number. (Up to 65520 a cast rounds to it, from there
            on to Inf.)
        flushed: weights that a cast to fp16 turns to zero: up to 2^-25, half the smallest fp16 number (a tie goes to
            the even zero).
        subnormal: weights that are subnormal in fp16: not zero but below 2^-14, with fewer than its 11 bits of
            precision left.
        overflowed, vanished: finite weights that the cast to ``target`` turns to Inf, and weights that it turns to
            zero.
        rounding: the largest relative error ``|cast(w) - w| / |w|`` that the cast to ``target`` can have for weights
            like those that it keeps finite and not zero (the others are counted above): a constant of the two dtypes,
            another where weights become subnormal; 0.0 if the cast is exact.
        unread: weights in GGUF's blocks, which are not looked at.
        worst: (tensor, what is wrong with it) of the first few tensors with NaN or Inf, then of those beyond fp16.
    """

    name: str
    target: torch.dtype
    values: int = 0
    nan: int = 0
    inf: int = 0
    beyond_fp16: int = 0
    flushed: int = 0
    subnormal: int = 0
    overflowed: int = 0
    vanished: int = 0
    rounding: float = 0.0
    worst: tuple[tuple[str, str], ...] = ()
    unread: int = 0

    @property
    def damaged(self) -> bool:
        """Whether there are weights that no dtype can run: NaN or Inf."""
        return bool(self.nan or self.inf)

    @property
    def text(self) -> str:
        """Lines for people: is it sound, what would fp16 do, what does the dtype it runs in do, what was not read."""
        named = ", ".join(f"{short(tensor)} ({what})" for tensor, what in self.worst)
        sound = "no NaN, no Inf."
        if self.damaged:
            sound = (
                f"{_number(self.nan)} NaN and {_number(self.inf)} Inf. They make every frame black: download the "
                f"weights again. In: {named}."
            )
        label = "mismatch" if self.damaged else "ok"
        lines = [f"[{label}] {self.name or 'weights'}: {_number(self.values)} weights read: {sound}"]
        beyond, flushed, subnormal = (
            f"{_number(count)} ({_percent(count / max(self.values, 1))})" if count else ""
            for count in (self.beyond_fp16, self.flushed, self.subnormal)
        )
        fp16 = [f"overflow at {beyond}"] if beyond else []
        fp16 += [f"flush to zero {flushed}"] if flushed else []
        fp16 += [f"keep only as subnormals {subnormal}"] if subnormal else []
        lines.append(f"An fp16 copy would {_listed(fp16) if fp16 else 'hold every weight in its normal range'}.")
        if self.beyond_fp16 and not self.damaged:
            lines[-1] += f" Beyond 65504: {named}."
        cast = [f"rounds by at most {_percent(self.rounding)}"] if self.rounding else []
        cast += [f"turns {_number(self.overflowed)} to Inf"] if self.overflowed else []
        cast += [f"turns {_number(self.vanished)} to zero"] if self.vanished else []
        lines.append(f"The cast to {TARGETS[self.target]} {_listed(cast) if cast else 'is exact'}.")
        if self.unread:
            lines.append(
                f"{_number(self.unread)} weights are in GGUF's blocks, which were not looked at: of those nothing is "
                "known."
            )
        return "\n    ".join(lines)

    def as_dict(self) -> dict:
        """For JSON: plain numbers and strings, all finite."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return plain | {
            "target": TARGETS[self.target],
            "worst": [list(entry) for entry in self.worst],
            "damaged": self.damaged,
        }


def scan_weights(
    tensors: Mapping[str, StoredTensor],
    target: torch.dtype,
    name: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> WeightAudit:
    """Read every floating-point weight once and count what it would lose. Integers and booleans are passed over, and
    GGUF's blocks counted.

    Memory is constant: 8 MB for each of at most four threads (as many as torch uses here), and a little more where
    something rare is found.

    Args:
        tensors: every tensor by name, as ``Part.tensors`` has it.
        target: the dtype they are to run in: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``.
        name: what to call the part in ``WeightAudit.text``.
        on_progress: called in the calling thread with (bytes done, bytes in all), last with both equal. What it raises
            stops the scan and is passed on.

    Raises:
        ValueError: if ``target`` is another dtype, or a file ends before its weights do.
    """
    if target not in TARGETS:
        raise ValueError(
            f"The weights were to be audited for {target}, which no part can run in, so what the cast would do is "
            f"unknown. Choose {', '.join(map(str, TARGETS))}."
        )
    runs = runs_of(tensors)
    total = sum(run.end - run.starts[0] for run in runs)
    reader, progress = Reader(runs, _BLOCK), Progress(total, on_progress)
    workers = max(1, min(_MOST_WORKERS, torch.get_num_threads(), -(-total // _BLOCK)))
    tallies = [_Tally() for _ in range(workers)]
    try:
        with ThreadPoolExecutor(workers, "weight-audit") as pool:
            helpers = [pool.submit(_work, reader, target, tally, progress.add) for tally in tallies[1:]]
            _work(reader, target, tallies[0], progress.add_and_tell)
        for helper in helpers:
            helper.result()
    finally:
        reader.close()
    progress.tell()
    unread = sum(prod(stored.shape) for stored in tensors.values() if stored.quantization is not None)
    return replace(_audit(name, target, tallies, [tensor for run in runs for tensor in run.names]), unread=unread)


def _number(count: int) -> str:
    """12345 -> ``12,345``, 1234567 -> ``1.23 M``."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _percent(share: float) -> str:
    """Two digits, and never an exponent: ``0.39 %``, ``98 %``."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %" if percent >= 1e-4 else "under 0.0001 %"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


@dataclass
class _Tally:
    """What one worker has seen."""

    values: int = 0
    flushed: int = 0
    subnormal: int = 0
    overflowed: int = 0
    vanished: int = 0
    rounding: float = 0.0
    #: tensor -> its NaN, Inf and values beyond fp16
    extremes: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def _audit(name: str, target: torch.dtype, tallies: list[_Tally], order: list[str]) -> WeightAudit:
    extremes: dict[str, tuple[int, ...]] = {}
    for tally in tallies:
        for tensor, counts in tally.extremes.items():
            extremes[tensor] = tuple(map(sum, zip(counts, extremes.get(tensor, (0, 0, 0)), strict=True)))
    nan, inf, beyond = (sum(counts[kind] for counts in extremes.values()) for kind in range(3))
    place = {tensor: index for index, tensor in enumerate(order)} if extremes else {}
    first = sorted(extremes, key=lambda tensor: (not any(extremes[tensor][:2]), place[tensor]))[:_NAMED]
    kinds = ("NaN", "Inf", "beyond 65504")
    worst = tuple(
        (tensor, ", ".join(f"{n:,} {kind}" for n, kind in zip(extremes[tensor], kinds, strict=True) if n))
        for tensor in first
    )
    summed = {
        what: sum(getattr(tally, what) for tally in tallies)
        for what in ("values", "flushed", "subnormal", "overflowed", "vanished")
    }
    return WeightAudit(
        name,
        target,
        nan=nan,
        inf=inf,
        beyond_fp16=beyond,
        rounding=max(tally.rounding for tally in tallies),
        worst=worst,
        **summed,
    )


def _work(reader: Reader, target: torch.dtype, tally: _Tally, on_block: Callable[[int], None]) -> None:
    """Scan blocks until there are no more. Every array is made once: fresh memory costs more than all that is done in
    it."""
    # torch's memory begins at a multiple of 64 bytes and numpy's at one of 16: reading into the latter takes twice as
    # long.
    buffer, mask = (torch.empty(_BLOCK, dtype=dtype, device="cpu").numpy() for dtype in (torch.uint8, torch.bool))
    view = buffer.data
    try:
        while (block := reader.fill(view)) is not None:
            patterns = buffer[: block.nbytes].view(UNSIGNED[block.run.dtype.itemsize])
            # Doubling drops the sign and keeps the order.
            np.add(patterns, patterns, out=patterns)
            _look(block, patterns, mask, ruler_of(block.run.dtype, target), tally)
            on_block(block.nbytes)
    finally:
        # However this one ended: where it failed, the others need not go on.
        reader.stop()


def _look(block: Block, doubled: np.ndarray, mask: np.ndarray, ruler: Ruler, tally: _Tally) -> None:
    """Add a block to ``tally``: a few passes over all of it, and more only over the tiles that hold something rare.

    Args:
        doubled: the block's bit patterns, doubled.
        mask: memory to work in, at least as long as ``doubled``.
    """
    tally.values += doubled.size
    starts = _STARTS[: -(-doubled.size // _TILE)]
    # Patterns of 2.0 and above have their top bit set and so are negative here: one pass tells that there are none of
    # them, hence neither NaN nor Inf nor anything large, and finds the smallest magnitudes.
    lows = np.minimum.reduceat(doubled.view(SIGNED[doubled.itemsize]), starts)
    low = np.minimum.reduce(lows)
    if low < 0:
        lows = np.minimum.reduceat(doubled, starts)
        low = np.minimum.reduce(lows)
        if np.maximum.reduce(doubled) >= ruler.beyond_fp16:
            _count_extremes(block, doubled, mask, ruler, tally)
    if low < ruler.normal_fp16:
        tally.subnormal += _count(np.less, doubled, ruler.normal_fp16, mask)
    if tally.rounding < ruler.normal_error and _drops_bits(doubled, ruler):
        tally.rounding = ruler.normal_error
    bound = ruler.kept_fp16
    if tally.rounding < ruler.subnormal_error:
        bound = max(bound, ruler.normal)
    if low >= bound:
        return
    small = np.flatnonzero(lows < bound)
    if small.size > lows.size // 4:
        _look_small(doubled, low == 0, bound, mask, ruler, tally)
    else:
        for tile in small:
            _look_small(doubled[tile * _TILE : (tile + 1) * _TILE], lows[tile] == 0, bound, mask, ruler, tally)


def _count(compare: np.ufunc, doubled: np.ndarray, bound: np.unsignedinteger, mask: np.ndarray) -> int:
    return int(np.count_nonzero(compare(doubled, bound, out=mask[: doubled.size])))


def _count_extremes(block: Block, doubled: np.ndarray, mask: np.ndarray, ruler: Ruler, tally: _Tally) -> None:
    for name, piece in block.pieces():
        values = doubled[piece]
        beyond = _count(np.greater_equal, values, ruler.beyond_fp16, mask)
        if not beyond:
            continue
        nan = _count(np.greater_equal, values, ruler.nan, mask)
        nonfinite = _count(np.greater_equal, values, ruler.nonfinite, mask)
        tally.overflowed += _count(np.greater_equal, values, ruler.overflowed, mask) - nonfinite
        before = tally.extremes.get(name, (0, 0, 0))
        tally.extremes[name] = (before[0] + nan, before[1] + nonfinite - nan, before[2] + beyond - nonfinite)


def _drops_bits(doubled: np.ndarray, ruler: Ruler) -> bool:
    """Whether a value in the target's normal range has bits that the cast drops: seldom where fp32 files were made from
    bf16."""
    if not np.bitwise_or.reduce(doubled) & ruler.dropped:
        return False
    # Unsigned, what lies below the range wraps to the far end: one compare tests both bounds.
    values = doubled[doubled - ruler.normal < ruler.overflowed - ruler.normal]
    return bool(np.bitwise_or.reduce(values) & ruler.dropped)


def _look_small(
    doubled: np.ndarray, zeros_too: bool, bound: np.unsignedinteger, mask: np.ndarray, ruler: Ruler, tally: _Tally
) -> None:
    """Tell apart what lies below ``bound``: zeros, what fp16 and the target flush to zero, what the target rounds
    coarsely.

    The last look at ``doubled``: it is overwritten if there are ``zeros_too``.
    """
    zeros = 0
    if zeros_too:
        # One less, zero wraps to the far end. So however many zeros there are, they are not picked out.
        zeros = doubled.size - int(np.count_nonzero(doubled))
        np.subtract(doubled, 1, out=doubled)
    shift = type(bound)(zeros_too)
    small = doubled[np.less(doubled, bound - shift, out=mask[: doubled.size])] + shift
    small.sort()
    flushed, vanished = int(small.searchsorted(ruler.kept_fp16)), int(small.searchsorted(ruler.kept))
    tally.subnormal -= zeros + flushed
    tally.flushed += flushed
    tally.vanished += vanished
    if small[vanished:].searchsorted(ruler.normal):
        tally.rounding = max(tally.rounding, ruler.subnormal_error)
