"""How fast the weight scan is, against merely reading the same bytes into memory and summing them with torch. Limit: 70 % of that speed.

Interleaved in one run, from a warm page cache. ``few small``: normal weights of 0.02, as trained ones have; ``all small``: of 1e-5, nearly
all of them subnormal in fp16, the scan's worst case.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from cogvideox.checkpoint.headers import StoredTensor
from cogvideox.precision.audit import scan_weights
from cogvideox.precision.hardware import dtype_name

CASES = [
    (torch.bfloat16, torch.bfloat16, 0.02),
    (torch.bfloat16, torch.float16, 0.02),
    (torch.bfloat16, torch.float16, 1e-5),
    (torch.float32, torch.bfloat16, 0.02),
    (torch.float32, torch.float16, 0.02),
    (torch.float32, torch.float16, 1e-5),
    (torch.float16, torch.bfloat16, 0.02),
]
_TENSOR = 1 << 24


def write_weights(path: Path, dtype: torch.dtype, scale: float, nbytes: int) -> dict[str, StoredTensor]:
    """A file of random tensors of 16 M weights each."""
    tensors, size = {}, _TENSOR * dtype.itemsize
    with path.open("wb") as file:
        for number in range(nbytes // size):
            file.write((torch.randn(_TENSOR) * scale).to(dtype).view(torch.uint8).numpy().data)
            tensors[f"tensor {number}"] = StoredTensor(path, dtype, (_TENSOR,), number * size, size)
    return tensors


def read_and_sum(path: Path, buffer: torch.Tensor) -> float:
    """The other side: one buffer, filled again and again."""
    view, total = buffer.view(torch.uint8).numpy().data, 0.0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            total += buffer[: count // buffer.itemsize].sum().item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    nbytes = int(options.gigabytes * 1e9)
    print(f"{nbytes / 1e9:.1f} GB a case, median of {options.repeats}, {torch.get_num_threads()} threads")
    print("stored  cast to  weights    read + sum        scan     scan/read+sum")
    for dtype, target, scale in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights"
            tensors = write_weights(path, dtype, scale, nbytes)
            # The size of buffer at which the other side is fastest here.
            buffer = torch.empty((16 << 20) // dtype.itemsize, dtype=dtype)
            sides = {"read": lambda path=path, buffer=buffer: read_and_sum(path, buffer), "scan": lambda t=tensors, to=target: scan_weights(t, to)}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.repeats):
                for name, side in sides.items():
                    start = time.perf_counter()
                    side()
                    times[name].append(time.perf_counter() - start)
            size = path.stat().st_size / 1e9
        read, scan = (statistics.median(times[name]) for name in sides)
        kind = "few small" if scale > 1e-3 else "all small"
        print(f"{dtype_name(dtype):7} {dtype_name(target):8} {kind}  {size / read:7.2f} GB/s  {size / scan:7.2f} GB/s  {read / scan:12.0%}")


if __name__ == "__main__":
    main()
