"""Time the exact kernels of the attention at a run's own shape, and take the fastest that computes the right thing."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

#: Seconds that all kernels together may take to be timed.
_BUDGET = 2.0
#: Bytes of one tensor that kernels are timed with: the memory that a run has planned is not to be taken for it.
_NBYTES = 1 << 26
#: Times that each kernel is timed, of which the best counts, after one that is not: it loads the kernel.
_ROUNDS = 2
#: How far a result may be from SDPA's, in relative L2: in 16 bits twice the rounding of a number; fp32 adds up tens of
#: thousands of them in another order.
_ROUNDINGS = {torch.float32: 64}

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a kernel is called with: queries, keys and values ``[batch, tokens, heads, channels]`` each."""

    batch: int
    tokens: int
    heads: int
    channels: int


@dataclass(frozen=True)
class Fastest:
    """The kernel that was taken, and the figures in a sentence."""

    choice: str
    text: str


def find_fastest(
    kernels: Mapping[str, Kernel],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Fastest:
    """Time ``kernels`` at ``shape`` on random numbers, in two seconds at most, and take the fastest. Where all heads
    would take longer, or much memory, fewer are timed, at the same length and batch.

    One that raises, whose result is not the first one's within rounding, or for which no time is left, is out.

    Args:
        kernels: by name; the first is SDPA, against which the others are held.
    """
    first = next(iter(kernels))
    if len(kernels) == 1:
        return Fastest(first, f"Attention: {first} is the only exact kernel here.")
    # Of its own: what a program draws afterwards does not depend on this.
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> tuple[torch.Tensor, ...]:
        size = (shape.batch, shape.tokens, heads, shape.channels)
        query, key, value = (torch.randn(size, dtype=dtype, device=device, generator=generator) for _ in range(3))
        return query, key, value

    def timed(kernel: Kernel, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, float]:
        # Kernels may work in the place of what they are given.
        own = tuple(tensor.clone() for tensor in tensors)
        _wait(device)
        start = clock()
        result = kernel(*own)
        _wait(device)
        return result, clock() - start

    began = clock()
    one = draw(1)
    kernels[first](*one)
    _, seconds = timed(kernels[first], one)
    affordable = int((_BUDGET - (clock() - began)) / (len(kernels) * (_ROUNDS + 1) + 1) / max(seconds, 1e-9))
    heads = max(1, min(shape.heads, affordable, _NBYTES // one[0].nbytes))
    tensors, taken, out = draw(heads), dict[str, float](), dict[str, str]()
    expected = kernels[first](*tensors).float()
    for name, kernel in kernels.items():
        try:
            # The first call loads it.
            for turn in range(_ROUNDS + 1):
                if name != first and clock() - began > _BUDGET:
                    if name not in taken:
                        out[name] = "no time was left for it"
                    break
                result, seconds = timed(kernel, tensors)
                flaw = _flaw(result, expected, dtype, first)
                if flaw is not None:
                    out[name] = flaw
                    taken.pop(name, None)
                    break
                if turn:
                    taken[name] = min(seconds, taken.get(name, seconds))
        # Whatever a kernel of another package raises.
        except Exception as error:
            if name == first:
                raise
            taken.pop(name, None)
            out[name] = [*str(error).strip().splitlines(), type(error).__name__][0]
    best = min(taken, key=lambda name: taken[name])
    figures = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in taken.items())
    left = "".join(f"; {name} is out: {why}" for name, why in out.items())
    return Fastest(
        best,
        f"Attention: {best} is the fastest exact kernel here at {shape.tokens:,} tokens, {heads} of {shape.heads} "
        f"heads ({figures}{left}).",
    )


def _flaw(result: object, expected: torch.Tensor, dtype: torch.dtype, first: str) -> str | None:
    """Say why a kernel's result is not what ``first`` gave, within rounding; None if it is."""
    if not isinstance(result, torch.Tensor) or result.shape != expected.shape or result.dtype != dtype:
        return f"it gives {_described(result)} for {_described(expected.to(dtype))}"
    error = ((result.float() - expected).norm() / expected.norm()).item()
    if not error <= _ROUNDINGS.get(dtype, 2) * torch.finfo(dtype).eps:
        return f"it is {error:.1e} away from {first}"
    return None


def _described(result: object) -> str:
    if not isinstance(result, torch.Tensor):
        return f"a {type(result).__name__}"
    return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
