"""What 500 unrelated files add to the list of models: limits 100 ms at first, 5 ms afterwards. The other side parses
every header each time."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogvideox.checkpoint import catalogue
from cogvideox.checkpoint.headers import read_header

FILES, TENSORS = 500, 800


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(
            {f"double_blocks.{index}.img_attn.qkv.weight": torch.zeros(1) for index in range(TENSORS)},
            folder / "0.safetensors",
        )
        content = (folder / "0.safetensors").read_bytes()
        for index in range(1, FILES):
            (folder / f"{index}.safetensors").write_bytes(content)
        first, again, parsed = [], [], []
        for _ in range(7):
            catalogue._known.clear()
            first.append(timed(lambda: catalogue.list_checkpoints([], [folder])))
            again.append(timed(lambda: catalogue.list_checkpoints([], [folder])))
            parsed.append(timed(lambda: [read_header(file) for file in folder.iterdir()]))
    print(f"{FILES} files with headers of {len(content) / 1e3:.0f} kB, median of 7")
    for what, times in (("first list", first), ("list again", again), ("parsing every header", parsed)):
        print(f"{what:22} {statistics.median(times):8.1f} ms")


if __name__ == "__main__":
    main()
