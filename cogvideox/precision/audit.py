"""The weight audit: every weight read once, for what is wrong with it and what a cast would lose.

A magnitude's order is that of its bits, the sign masked away, so everything is counted on the integers as they lie in the file: a few passes
of NumPy's vectorised comparisons over pieces that fit the processor's cache, in as many threads as there are cores, each reading for itself.
Casts are made only of the values that could still change the result. Source of the limits: IEEE 754-2019 (binary16), round to nearest even.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..checkpoint.headers import StoredTensor, fill
from .hardware import dtype_name

#: Bytes read and looked at together, by one thread.
_PIECE = 512 << 10
_THREADS = max(1, min(4, os.cpu_count() or 1))
#: Rounding errors within this share of the largest that can occur are not told apart.
_NEAR = 0.998
#: The largest fp16 number; what fp16 rounds to zero (a tie goes to even); what it keeps as a subnormal.
_FP16_LARGEST, _FP16_ZERO, _FP16_SUBNORMAL = 65504.0, 2.0**-25, float(np.nextafter(2.0**-14 - 2.0**-25, 0))
#: Tensors that are named where weights are not finite.
_NAMED = 3


@dataclass(frozen=True)
class WeightAudit:
    """What a scan of one part found.

    Attributes:
        name: what the part is called.
        target: the dtype it is about to be cast to.
        values: floating-point weights read.
        nan, inf: weights that are not finite.
        beyond: finite ones with a magnitude over 65504, which an fp16 copy turns into Inf.
        flushed: those not zero that an fp16 copy makes zero.
        subnormal: those not zero that an fp16 copy keeps only as subnormals, with fewer significant bits.
        rounding: the largest relative rounding error of the cast to ``target``, over weights it leaves finite and not zero, to within 0.2 %
            of itself; 0 if the cast is exact.
        damaged_in: names of the first tensors that hold NaN or Inf.
    """

    name: str
    target: torch.dtype
    values: int
    nan: int
    inf: int
    beyond: int
    flushed: int
    subnormal: int
    rounding: float
    damaged_in: tuple[str, ...]

    @property
    def damaged(self) -> bool:
        """Whether weights are not finite: the file is broken, or an earlier cast overflowed."""
        return bool(self.nan or self.inf)

    @property
    def text(self) -> str:
        """What was found, for people."""
        lines = [f"[{'mismatch' if self.damaged else 'ok'}] {self.name}, {self.values:,} weights read: "]
        if self.damaged:
            lines[0] += f"{self.nan:,} NaN and {self.inf:,} Inf (in {', '.join(self.damaged_in)})"
            lines.append("    why: weights that are not finite make every video black.")
            lines.append("    do: The file is damaged or was cast from a wider dtype: download the original.")
        else:
            lines[0] += "no NaN, no Inf"
        lines.append(
            f"    an fp16 copy would turn {self._count(self.beyond)} into Inf, flush {self._count(self.flushed)} to zero, and keep "
            f"{self._count(self.subnormal)} only as subnormals"
        )
        exact = f"the cast to {dtype_name(self.target)} is exact"
        lines.append(f"    the cast to {dtype_name(self.target)} rounds by at most {self.rounding:.3%}" if self.rounding else f"    {exact}")
        return "\n".join(lines)

    def _count(self, count: int) -> str:
        return f"{count:,} ({count / self.values:.2g} of all)" if count else "none"

    def as_dict(self) -> dict:
        """The same as JSON has it."""
        return asdict(self) | {"target": dtype_name(self.target), "damaged_in": list(self.damaged_in)}


def scan_weights(
    tensors: Mapping[str, StoredTensor], target: torch.dtype, name: str = "weights", on_progress: Callable[[int, int], None] | None = None
) -> WeightAudit:
    """Read every weight once, in constant memory.

    Args:
        tensors: by name, where they lie (``Part.tensors``). Integers and booleans are passed over.
        target: the floating dtype the weights are about to be cast to.
        on_progress: called with (bytes done, bytes in all); an exception it raises stops the scan.

    Raises:
        ValueError: if a file ends before its header says, or ``target`` is not a floating dtype.
    """
    if not target.is_floating_point:
        raise ValueError(f"The weights are to be scanned for a cast to {dtype_name(target)}, but no model runs in that. Give a floating dtype.")
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0
    pieces, stop, results = _pieces(tensors), threading.Event(), queue.SimpleQueue()
    turn, rounding = threading.Lock(), _Rounding(target)

    def work() -> None:
        with _Reader() as reader:
            while not stop.is_set():
                with turn:
                    piece = next(pieces, None)
                if piece is None:
                    return
                try:
                    results.put((*piece, reader.count(*piece, rounding)))
                except Exception as error:  # raised again where the results are awaited
                    results.put((*piece, error))

    threads = [threading.Thread(target=work, name="weight scan", daemon=True) for _ in range(_THREADS)]
    counts, damaged_in = np.zeros(6, np.int64), {}
    try:
        for thread in threads:
            thread.start()
        while done < total:
            tensor_name, _, _, nbytes, found = results.get()
            if isinstance(found, Exception):
                raise found
            counts += found
            if found[1] or found[2]:
                damaged_in[tensor_name] = None
            done += nbytes
            if on_progress is not None:
                on_progress(done, total)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    values, nan, inf, beyond, flushed, subnormal = counts.tolist()
    names = tuple(sorted(damaged_in))
    if len(names) > _NAMED:
        names = (*names[:_NAMED], f"and {len(names) - _NAMED} more tensors")
    return WeightAudit(name, target, values, nan, inf, beyond, flushed, subnormal, rounding.largest, names)


def _pieces(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor, int, int]]:
    """Every tensor, in the order it lies on disk, as pieces: (name, tensor, place in the file, bytes)."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        step = _PIECE if tensor.dtype.is_floating_point else max(1, tensor.nbytes)
        for start in range(0, tensor.nbytes, step):
            yield name, tensor, tensor.offset + start, min(step, tensor.nbytes - start)


@dataclass(frozen=True)
class _Format:
    """Where the magnitudes of a stored dtype, as integers, pass the limits.

    Attributes:
        bits: the integer type of its bits.
        magnitude: the mask without the sign.
        finite: the largest finite number.
        inf: Inf, or None where the dtype has none.
        largest, zero, subnormal: the largest that fp16 holds, that it makes zero, that it keeps as a subnormal.
    """

    dtype: torch.dtype
    bits: type
    magnitude: int
    finite: int
    inf: int | None
    largest: int
    zero: int
    subnormal: int

    @classmethod
    @cache
    def of(cls, dtype: torch.dtype) -> "_Format":
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
        magnitude = (1 << (8 * dtype.itemsize - 1)) - 1
        finite = _bits_of(dtype, torch.finfo(dtype).max)
        has_inf = dtype != torch.float8_e4m3fn
        limits = (_bits_of(dtype, limit) for limit in (_FP16_LARGEST, _FP16_ZERO, _FP16_SUBNORMAL))
        return cls(dtype, bits, magnitude, finite, finite + 1 if has_inf else None, *limits)

    def values(self, bits: np.ndarray) -> torch.Tensor:
        """The numbers of these bits, in float64."""
        return torch.from_numpy(bits.view(np.uint8)).view(self.dtype).double()


def _bits_of(dtype: torch.dtype, limit: float) -> int:
    """The bits of the largest number of ``dtype`` that is at most ``limit``, for 0 <= limit."""
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    largest = min(limit, torch.finfo(dtype).max)
    bits = torch.tensor([largest], dtype=torch.float64).to(dtype).view(signed).item()
    # The cast rounds to nearest: one too high at most.
    return bits - (torch.tensor([bits], dtype=signed).view(dtype).double().item() > limit)


class _Rounding:
    """The largest relative error of casts to one dtype, over values that it leaves finite and not zero. Shared by all threads."""

    def __init__(self, target: torch.dtype):
        self._target, info = target, torch.finfo(target)
        self._eps, self._smallest_normal, self._max = info.eps, info.smallest_normal, info.max
        #: What is rounded to zero: at most half the smallest subnormal.
        self._zero = info.smallest_normal * info.eps / 2
        self.largest = 0.0
        self._lock = threading.Lock()

    def add(self, form: _Format, bits: np.ndarray, magnitudes: np.ndarray, low: int, mask: np.ndarray) -> None:
        """Take a piece's rounding errors into account, if they can still matter; ``low`` is its smallest magnitude."""
        info = torch.finfo(form.dtype)
        if info.eps >= self._eps and info.smallest_normal * info.eps >= 2 * self._zero:
            return
        # A normal number is rounded by at most u / (1 + u), u = eps / 2 (0 where the target has as many significant bits).
        unit = self._eps / 2 if info.eps < self._eps else 0.0
        if self.largest < _NEAR * unit / (1 + unit):
            self._look(form, bits[magnitudes <= form.finite])
        # A subnormal of size x is rounded by at most zero / x; between half and all of the smallest one, to that one.
        largest = max(self.largest, self._zero / self._smallest_normal)
        reach = 2 * self._zero / (1 + largest) if largest > 1 / 3 else min(self._zero / largest, self._smallest_normal)
        zero_bits, reach_bits = _bits_of(form.dtype, self._zero), _bits_of(form.dtype, reach)
        if low > reach_bits or reach_bits <= zero_bits:
            return
        np.less_equal(magnitudes, reach_bits, out=mask)
        if np.count_nonzero(mask) > np.count_nonzero(magnitudes <= zero_bits):
            self._look(form, bits[mask & (magnitudes > zero_bits)])

    def _look(self, form: _Format, bits: np.ndarray) -> None:
        values = form.values(bits)
        cast = values.to(self._target).double()
        kept = cast.isfinite() & (cast != 0)
        if kept.any():
            error = ((cast[kept] - values[kept]) / values[kept]).abs().max().item()
            with self._lock:
                self.largest = max(self.largest, error)


class _Reader:
    """One thread's file and buffers: reads a piece and counts what is in it."""

    def __init__(self):
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._raw, self._magnitudes, self._mask = (np.empty(_PIECE, np.uint8) for _ in range(3))

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def count(self, _name: str, tensor: StoredTensor, offset: int, nbytes: int, rounding: _Rounding) -> tuple[int, ...]:
        """(values, NaN, Inf, beyond fp16, flushed by fp16, subnormal in fp16) of a piece."""
        if not tensor.dtype.is_floating_point:
            return (0,) * 6
        form = _Format.of(tensor.dtype)
        bits = self._read(tensor.file, offset, nbytes).view(form.bits)
        magnitudes = self._magnitudes[:nbytes].view(form.bits)
        mask = self._mask[: len(bits)].view(bool)

        def up_to(limit: int) -> int:
            return np.count_nonzero(np.less_equal(magnitudes, limit, out=mask))

        np.bitwise_and(bits, form.bits(form.magnitude), out=magnitudes)
        nan = inf = beyond = zeros = flushed = 0
        if magnitudes.max() > form.largest:
            above = len(bits) - up_to(form.largest)
            not_finite = len(bits) - up_to(form.finite)
            nan = not_finite if form.inf is None else len(bits) - up_to(form.inf)
            inf, beyond = not_finite - nan, above - not_finite
        subnormal = up_to(form.subnormal)
        low = int(magnitudes.min())
        if low <= form.zero:
            zeros = up_to(0)
            flushed = up_to(form.zero) - zeros
        rounding.add(form, bits, magnitudes, low, mask)
        return len(bits), nan, inf, beyond, flushed, subnormal - flushed - zeros

    def _read(self, path: Path, offset: int, nbytes: int) -> np.ndarray:
        if path != self._path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = path.open("rb", buffering=0), path
        self._file.seek(offset)
        fill(self._file, memoryview(self._raw[:nbytes]), path)
        return self._raw[:nbytes]
