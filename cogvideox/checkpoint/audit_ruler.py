"""What a cast does to a float, as bounds on its bit pattern: found by asking torch's own cast, not written down."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def _error(doubled: np.ndarray, stored: torch.dtype, target: torch.dtype) -> float:
    weights = _values(doubled >> 1, stored)
    exact = weights.double()
    return ((weights.to(target).double() - exact).abs_() / exact).max().item()


def _values(patterns: np.ndarray, stored: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(patterns.view(SIGNED[patterns.itemsize])).view(stored)


@dataclass(frozen=True, eq=False)
class Ruler:
    """A stored dtype and a target as bounds on doubled bit patterns. Each bound is the first pattern of its kind.

    Attributes:
        kept_fp16, normal_fp16: no longer zero, no longer subnormal as fp16.
        beyond_fp16, nonfinite, nan: above 65504, Inf or NaN, NaN.
        kept, normal, overflowed: no longer zero, no longer subnormal, no longer finite in the target.
        dropped: the mantissa bits that the target has no room for.
        normal_error, subnormal_error: the largest relative error that is possible among normal and among subnormal
            numbers of the target.
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
    dropped: np.unsignedinteger
    normal_error: float
    subnormal_error: float


@lru_cache(maxsize=64)
def ruler_of(stored: torch.dtype, target: torch.dtype) -> Ruler:
    """Find the bounds by asking torch's cast, so that they hold for what is going to be done and not for what should
    be."""
    unsigned = UNSIGNED[stored.itemsize]

    def first(is_past: Callable[[torch.Tensor], torch.Tensor]) -> np.unsignedinteger:
        largest = 2 ** (8 * stored.itemsize - 1) - 1
        found = bisect_left(
            range(largest), True, 0, largest, key=lambda p: bool(is_past(_values(np.array([p], unsigned), stored)))
        )
        return unsigned(2 * found)

    half, own, other = torch.float16, torch.finfo(stored), torch.finfo(target)
    # `~(a < b)` and not `a >= b`: NaN comes last, so it is past every bound.
    kept = first(lambda w: w.to(target) != 0)
    normal = first(lambda w: ~(w.double() < other.smallest_normal))
    dropped = max(0, round(math.log2(other.eps / own.eps)))
    return Ruler(
        stored,
        target,
        kept_fp16=first(lambda w: w.to(half) != 0),
        normal_fp16=first(lambda w: ~(w.to(half) < torch.finfo(half).smallest_normal)),
        beyond_fp16=first(lambda w: ~(w.double() <= torch.finfo(half).max)),
        nonfinite=first(lambda w: ~w.double().isfinite()),
        nan=first(lambda w: w.double().isnan()),
        kept=kept,
        normal=normal,
        overflowed=first(lambda w: ~w.to(target).isfinite()),
        dropped=unsigned((2**dropped - 1) * 2),
        # The error is at most half a unit in the last place, and relatively largest just above a power of two: u / (1 +
        # u). float64 is cast by way of float32, which can add 2^-24.
        normal_error=other.eps / (2 + other.eps)
        + (2.0**-24 if stored == torch.float64 and target != torch.float32 else 0.0)
        if dropped
        else 0.0,
        # Subnormals: the first that is kept was nearly halfway to zero.
        subnormal_error=_error(np.array([kept]), stored, target) if kept < normal else 0.0,
    )
