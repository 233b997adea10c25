"""How fast the weight audit is, against merely reading the same file into memory and summing it. One run, one table.

Both sides take turns on the same file, which lies in the page cache: from a disk, both are as fast as the disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cogvideox.checkpoint.audit import TARGETS, scan_weights
from cogvideox.checkpoint.headers import StoredTensor

#: Bytes that the plain read takes at a time: the fastest of 0.25 to 64 MB where this was written.
_BUFFER = 8 << 20
#: The weights of one file are made and written this many at a time.
_PIECE = 1 << 23
#: (what lies in the file, stored as, standard deviation, share of zeros, dtypes to run in). The first two are what
#: checkpoints hold: 0.2 % of the weights lie below fp16's normal range. In the others far more do than in any real one.
FILES = (
    ("N(0, 0.02)", torch.bfloat16, 0.02, 0.0, (torch.bfloat16, torch.float16)),
    ("N(0, 0.02)", torch.float32, 0.02, 0.0, (torch.bfloat16, torch.float16, torch.float32)),
    ("N(0, 1e-5)", torch.bfloat16, 1e-5, 0.0, (torch.bfloat16, torch.float16)),
    ("N(0, 1e-5)", torch.float32, 1e-5, 0.0, (torch.bfloat16, torch.float16)),
    ("N(0, 1e-5), 10 % zeros", torch.bfloat16, 1e-5, 0.1, (torch.float16,)),
    ("N(0, 3), |w| > 2 everywhere", torch.bfloat16, 3.0, 0.0, (torch.bfloat16,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=2.0, help="GB of each file")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--folder", help="where the file goes; it is removed at the end")
    options = parser.parse_args()
    print(f"{options.size:g} GB a file, {torch.get_num_threads()} threads, GB/s as median (best) of {options.rounds}")
    print(f"{'weights':28} {'stored -> runs in':18} {'read + sum':>14} {'scan':>14}  scan/read+sum")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for what, dtype, scale, zeros, targets in FILES:
            file = Path(folder) / "weights"
            tensors = write(file, dtype, scale, zeros, int(options.size * 1e9))
            for target in targets:
                sides = {
                    "sum": lambda file=file: read_and_sum(file),
                    "scan": lambda tensors=tensors, target=target: scan_weights(tensors, target),
                }
                speeds = compare(sides, file.stat().st_size, options.rounds)
                (plain, plain_best), (scan, scan_best) = (
                    (statistics.median(speed), max(speed)) for speed in speeds.values()
                )
                print(
                    f"{what:28} {f'{name_of(dtype)} -> {name_of(target)}':18} {plain:6.1f} ({plain_best:5.1f}) "
                    f"{scan:6.1f} ({scan_best:5.1f})  {scan / plain:.2f} ({scan_best / plain_best:.2f})",
                    flush=True,
                )
            file.unlink()


def write(file: Path, dtype: torch.dtype, scale: float, zeros: float, size: int) -> dict[str, StoredTensor]:
    """Random weights, as tensors of 3072 x 3072 (the width of CogVideoX-1.5) and what is left over."""
    random = torch.Generator().manual_seed(0)
    left = size // dtype.itemsize
    with file.open("wb") as out:
        while left:
            weights = torch.randn(min(left, _PIECE), generator=random).mul_(scale)
            if zeros:
                weights[torch.rand(weights.shape, generator=random) < zeros] = 0
            out.write(memoryview(weights.to(dtype).view(torch.uint8).numpy()))
            left -= weights.numel()
    step, total = 3072 * 3072 * dtype.itemsize, file.stat().st_size
    cut = [(at, min(step, total - at)) for at in range(0, total, step)]
    return {f"{at}": StoredTensor(file, dtype, (nbytes // dtype.itemsize,), at, nbytes) for at, nbytes in cut}


def read_and_sum(file: Path) -> float:
    """The plain side: whatever lies in the file, it is summed as float32, the fastest sum there is."""
    buffer = torch.empty(_BUFFER // 4)
    view = memoryview(buffer.view(torch.uint8).numpy())
    total = 0.0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(view):
            total += buffer[: count // 4].sum().item()
    return total


def compare(sides: dict[str, Callable], size: int, rounds: int) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            # The first turn warms the page cache.
            if turn:
                speeds[name].append(size / (time.perf_counter() - start) / 1e9)
    return speeds


def name_of(dtype: torch.dtype) -> str:
    return TARGETS[dtype]


if __name__ == "__main__":
    main()
