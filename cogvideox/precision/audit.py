"""The weight audit: what lies in a checkpoint's weights that a dtype cannot hold. Every weight is read once.

The scan is nearly as quick as reading the file (``benchmarks/scan.py``): a few workers take turns at reading, block by block in
the order the weights lie in, and each looks at its block while the next one reads. Everything is decided on bit patterns: without
its sign, a float's pattern read as an integer is ordered as its magnitude, so every question ("does fp16 flush it?") is a compare
with one integer. Those integers are found by asking torch's own cast, not written down.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.headers import StoredTensor

#: The dtypes a part can run in, and what to call them.
TARGETS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

#: Bytes read at a time. Small enough that a block is still in the processor's cache when it is looked at, large enough that a
#: worker seldom has to wait for the interpreter while another holds it.
_BLOCK = 1 << 21
#: Values of a block looked at alone where something rare was seen in them. At most torch's grain (32768): more would start its own threads.
_TILE = 1 << 15
_STARTS = np.arange(0, _BLOCK, _TILE)
#: Reading is one at a time, so more workers than this only wait.
_MOST_WORKERS = 4
#: A rounding error this close to the largest possible one is taken for it; the search ends there.
_CLOSE = 0.998
#: Tensors named in an audit.
_NAMED = 5

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class WeightAudit:
    """What one part's weights hold. Counts are of single weights, of either sign; a weight that is ±0 is in none of them.

    Attributes:
        name: the part, for people (``transformer``).
        target: the dtype the part is to run in.
        values: floating-point weights read.
        nan, inf: weights that are NaN or ±Inf as stored.
        beyond_fp16: finite weights beyond 65504, the largest fp16 number. (Up to 65520 a cast rounds to it, from there on to Inf.)
        flushed: weights that a cast to fp16 turns to zero: up to 2^-25, half the smallest fp16 number (a tie goes to the even zero).
        subnormal: weights that are subnormal in fp16: not zero but below 2^-14, with fewer than its 11 bits of precision left.
        overflowed, vanished: finite weights that the cast to ``target`` turns to Inf, and weights that it turns to zero.
        rounding: the largest relative error ``|cast(w) - w| / |w|`` of the cast to ``target`` among the weights that it keeps finite
            and not zero (the others are counted above); 0.0 if it is exact. Never below the true value and at most 0.2 % above it.
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

    @property
    def damaged(self) -> bool:
        """Whether there are weights that no dtype can run: NaN or Inf."""
        return bool(self.nan or self.inf)

    @property
    def text(self) -> str:
        """Three lines for people: is it sound, what would fp16 do to it, what does the dtype it runs in do."""
        named = ", ".join(f"{tensor} ({what})" for tensor, what in self.worst)
        sound = "no NaN, no Inf."
        if self.damaged:
            sound = f"{_number(self.nan)} NaN and {_number(self.inf)} Inf. They make every frame black: download the weights again. In: {named}."
        lines = [f"{self.name or 'weights'}: {_number(self.values)} weights read: {sound}"]
        fp16 = [
            f"{what} {_number(count)} ({_percent(count / max(self.values, 1))})"
            for what, count in (("overflow at", self.beyond_fp16), ("flush to zero", self.flushed), ("keep only as subnormals", self.subnormal))
            if count
        ]
        lines.append(f"An fp16 copy would {_listed(fp16) if fp16 else 'hold every weight in its normal range'}.")
        if self.beyond_fp16 and not self.damaged:
            lines[-1] += f" Beyond 65504: {named}."
        cast = [f"rounds by at most {_percent(self.rounding)}"] if self.rounding else []
        cast += [f"turns {_number(self.overflowed)} to Inf"] if self.overflowed else []
        cast += [f"turns {_number(self.vanished)} to zero"] if self.vanished else []
        lines.append(f"The cast to {TARGETS[self.target]} {_listed(cast) if cast else 'is exact'}.")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """For JSON: plain numbers and strings, all finite."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return plain | {"target": TARGETS[self.target], "worst": [list(entry) for entry in self.worst], "damaged": self.damaged}


def scan_weights(
    tensors: Mapping[str, StoredTensor],
    target: torch.dtype,
    name: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> WeightAudit:
    """Read every floating-point weight once and count what it would lose. Integers and booleans are passed over.

    Memory is constant: some 6 MB for each of at most four threads, as many as torch uses here.

    Args:
        tensors: every tensor by name, as ``Part.tensors`` has it.
        target: the dtype they are to run in: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``.
        name: what to call the part in ``WeightAudit.text``.
        on_progress: called in the calling thread with (bytes done, bytes in all), last with both equal. What it raises stops the
            scan and is passed on.

    Raises:
        ValueError: if ``target`` is another dtype, or a file ends before its weights do.
    """
    if target not in TARGETS:
        raise ValueError(
            f"The weights were to be audited for {target}, which no part can run in, so what the cast would do is unknown. "
            f"Choose {', '.join(map(str, TARGETS))}."
        )
    runs = _runs(tensors)
    total = sum(run.end - run.starts[0] for run in runs)
    reader, progress = _Reader(runs), _Progress(total, on_progress)
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
    return _audit(name, target, tallies, [tensor for run in runs for tensor in run.names])


@dataclass
class _Run:
    """Tensors of one dtype that lie one after the other in a file: read as one, however small they are."""

    file: Path
    dtype: torch.dtype
    starts: list[int]
    names: list[str]
    end: int


def _runs(tensors: Mapping[str, StoredTensor]) -> list[_Run]:
    runs: list[_Run] = []
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        if not stored.dtype.is_floating_point or not stored.nbytes:
            continue
        if not runs or (runs[-1].file, runs[-1].dtype, runs[-1].end) != (stored.file, stored.dtype, stored.offset):
            runs.append(_Run(stored.file, stored.dtype, [], [], stored.offset))
        runs[-1].starts.append(stored.offset)
        runs[-1].names.append(name)
        runs[-1].end = stored.offset + stored.nbytes
    return runs


@dataclass(frozen=True)
class _Block:
    """A piece of a run, read at once."""

    run: _Run
    offset: int
    nbytes: int

    def pieces(self) -> Iterator[tuple[str, slice]]:
        """The tensors in it: (name, which of the block's values)."""
        size, starts = self.run.dtype.itemsize, self.run.starts
        first, last = bisect_right(starts, self.offset), bisect_right(starts, self.offset + self.nbytes - 1)
        edges = [self.offset, *starts[first:last], self.offset + self.nbytes]
        for index, (begin, end) in enumerate(pairwise(edges), first - 1):
            yield self.run.names[index], slice((begin - self.offset) // size, (end - self.offset) // size)


class _Reader:
    """Hands out the blocks to whoever asks next, in order: one file open, one read at a time, as a disk likes it."""

    def __init__(self, runs: list[_Run]):
        self._blocks = (_Block(run, at, min(_BLOCK, run.end - at)) for run in runs for at in range(run.starts[0], run.end, _BLOCK))
        self._lock = threading.Lock()
        self._file = self._path = None
        self._stopped = False

    def fill(self, buffer: memoryview) -> _Block | None:
        """Read the next block to the start of ``buffer``; None when there is none, or the scan was stopped."""
        with self._lock:
            block = None if self._stopped else next(self._blocks, None)
            if block is None:
                return None
            if self._path != block.run.file:
                self._close()
                self._file, self._path = block.run.file.open("rb", buffering=0), block.run.file
            if self._file.tell() != block.offset:
                self._file.seek(block.offset)
            done = 0
            while done < block.nbytes:
                count = self._file.readinto(buffer[done : block.nbytes])
                if not count:
                    raise ValueError(
                        f"{block.run.file} ended while its weights were read: it is truncated or being written. Download it again."
                    )
                done += count
            return block

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._path = None


class _Progress:
    """Counts what all workers did; only the caller's own thread tells of it, as an interface expects it."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None):
        self._total, self._on_progress = total, on_progress
        self._done = self._told = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def add_and_tell(self, count: int) -> None:
        self.add(count)
        self.tell()

    def tell(self) -> None:
        done = self._done
        if self._on_progress is not None and done != self._told:
            self._told = done
            self._on_progress(done, self._total)


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
    worst = tuple((tensor, ", ".join(f"{n:,} {kind}" for n, kind in zip(extremes[tensor], kinds, strict=True) if n)) for tensor in first)
    summed = {what: sum(getattr(tally, what) for tally in tallies) for what in ("values", "flushed", "subnormal", "overflowed", "vanished")}
    return WeightAudit(
        name, target, nan=nan, inf=inf, beyond_fp16=beyond, rounding=max(tally.rounding for tally in tallies), worst=worst, **summed
    )


def _work(reader: _Reader, target: torch.dtype, tally: _Tally, on_block: Callable[[int], None]) -> None:
    """Scan blocks until there are no more. Every array is made once: fresh memory costs more than all that is done in it."""
    raw, doubled, mask = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.bool_)
    try:
        while (block := reader.fill(memoryview(raw))) is not None:
            unsigned = _UNSIGNED[block.run.dtype.itemsize]
            words, out = raw[: block.nbytes].view(unsigned), doubled[: block.nbytes].view(unsigned)
            # Doubling drops the sign and keeps the order.
            np.add(words, words, out=out)
            _look(block, out, mask[: out.size], words, _ruler(block.run.dtype, target), tally)
            on_block(block.nbytes)
    finally:
        # However this one ended: where it failed, the others need not go on.
        reader.stop()


def _look(block: _Block, doubled: np.ndarray, mask: np.ndarray, spare: np.ndarray, ruler: _Ruler, tally: _Tally) -> None:
    """Add a block to ``tally``. What nearly every block needs runs over all of it; the rest only over the tiles that need it.

    Args:
        doubled: the block's bit patterns, doubled.
        mask, spare: memory to work in, as long as ``doubled``.
    """
    tally.values += doubled.size
    starts = _STARTS[: -(-doubled.size // _TILE)]
    # Patterns of 2.0 and above have their top bit set and so are negative here: one pass tells that there are none of them, hence
    # neither NaN nor Inf nor anything large, and finds the smallest magnitudes.
    lows = np.minimum.reduceat(doubled.view(_SIGNED[doubled.itemsize]), starts)
    if lows.min() < 0:
        lows = np.minimum.reduceat(doubled, starts)
        if doubled.max() >= ruler.beyond_fp16:
            _count_extremes(block, doubled, mask, ruler, tally)
    lows = lows.view(doubled.dtype)
    if lows.min() < ruler.normal_fp16:
        tally.subnormal += _count(np.less, doubled, ruler.normal_fp16, mask)
        for tile, low in _tiles(lows, ruler.kept_fp16):
            _count_lost(doubled[tile], low, mask[: _TILE], ruler, tally)
    if not ruler.exact:
        _round(doubled, lows, mask, spare, ruler, tally)


def _tiles(lows: np.ndarray, below: np.unsignedinteger) -> Iterator[tuple[slice, np.unsignedinteger]]:
    """The tiles whose smallest value lies below a bound, and that value."""
    for index in np.flatnonzero(lows < below):
        yield slice(index * _TILE, (index + 1) * _TILE), lows[index]


def _count(compare: np.ufunc, doubled: np.ndarray, bound: np.unsignedinteger, mask: np.ndarray) -> int:
    return int(np.count_nonzero(compare(doubled, bound, out=mask[: doubled.size])))


def _count_extremes(block: _Block, doubled: np.ndarray, mask: np.ndarray, ruler: _Ruler, tally: _Tally) -> None:
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


def _count_lost(values: np.ndarray, low: np.unsignedinteger, mask: np.ndarray, ruler: _Ruler, tally: _Tally) -> None:
    """Tell zeros and what fp16 flushes to zero from the subnormals they were counted with."""
    zeros = values.size - int(np.count_nonzero(values)) if low == 0 else 0
    lost = _count(np.less, values, ruler.kept_fp16, mask)
    tally.subnormal -= lost
    tally.flushed += lost - zeros
    if ruler.kept == ruler.kept_fp16:
        tally.vanished += lost - zeros
    elif low < ruler.kept:
        tally.vanished += _count(np.less, values, ruler.kept, mask) - zeros


def _round(doubled: np.ndarray, lows: np.ndarray, mask: np.ndarray, spare: np.ndarray, ruler: _Ruler, tally: _Tally) -> None:
    """Raise ``tally.rounding`` to the largest error in a block; errors are worked out only where they could be larger than it."""
    # Bits that the cast drops: where they are zero in every value, as in fp32 files made from bf16, it is exact.
    if tally.rounding < _CLOSE * ruler.normal_error and np.bitwise_or.reduce(doubled) & ruler.dropped:
        for start in _STARTS[: lows.size]:
            _raise_error(doubled[start : start + _TILE], ruler.normal, ruler.overflowed, mask, spare, ruler, tally)
            if tally.rounding >= _CLOSE * ruler.normal_error:
                break
    # Below the target's normal range the error is at most half a step whatever the value, hence relatively larger the smaller it is.
    if tally.rounding < _CLOSE * ruler.subnormal_error:
        for tile, _ in _tiles(lows, ruler.could_exceed(tally.rounding)):
            _raise_error(doubled[tile], ruler.kept, ruler.could_exceed(tally.rounding), mask, spare, ruler, tally)


def _raise_error(
    values: np.ndarray, low: np.unsignedinteger, high: np.unsignedinteger, mask: np.ndarray, spare: np.ndarray, ruler: _Ruler, tally: _Tally
) -> None:
    if low >= high:
        return
    # Unsigned, what lies below `low` wraps to the far end: one compare tests both bounds.
    within = np.less(np.subtract(values, low, out=spare[: values.size]), high - low, out=mask[: values.size])
    if within.any():
        tally.rounding = max(tally.rounding, ruler.error(values[within]))


@dataclass(frozen=True)
class _Ruler:
    """A pair of dtypes as bounds on doubled bit patterns: each is the first that is no longer what came before it.

    From zero upwards: ``kept_fp16`` (no longer zero in fp16), ``normal_fp16``, ``beyond_fp16`` (above 65504), ``nonfinite``, ``nan``;
    for the target ``kept``, ``normal``, ``overflowed``.

    Attributes:
        exact: whether the target holds every finite value of the stored dtype.
        dropped: the mantissa bits that the target has no room for.
        normal_error, subnormal_error: the largest relative errors possible in the target's normal range, and below it.
    """

    stored: torch.dtype
    target: torch.dtype
    kept_fp16: np.unsignedinteger
    normal_fp16: np.unsignedinteger
    beyond_fp16: np.unsignedinteger
    nonfinite: np.unsignedinteger
    nan: np.unsignedinteger
    kept: np.unsignedinteger
    normal: np.unsignedinteger
    overflowed: np.unsignedinteger
    exact: bool
    dropped: np.unsignedinteger
    normal_error: float
    subnormal_error: float

    def error(self, doubled: np.ndarray) -> float:
        """The largest relative error of the cast among these patterns, which must not be empty."""
        weights = _values(doubled // 2, self.stored)
        exact = weights.double()
        return ((weights.to(self.target).double() - exact).abs_() / exact).max().item()

    def could_exceed(self, error: float) -> np.unsignedinteger:
        """The bound below which values that are subnormal in the target can have a larger relative error than ``error``."""
        if not error:
            return self.normal
        info = torch.finfo(self.target)
        bound = torch.tensor([info.smallest_normal * info.eps / 2 / error], dtype=torch.float64).to(self.stored)
        # One pattern more for the rounding of the bound itself.
        pattern = int(bound.numpy().view(self.normal.dtype)[0]) if self.stored != torch.bfloat16 else int(bound.view(torch.int16).item())
        return min(self.normal, self.normal.dtype.type(2 * (pattern + 2)))
