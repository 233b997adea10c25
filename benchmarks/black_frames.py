"""How fast the black-frame check is, against merely summing and merely copying the same frames. One run, one table."""

import argparse
import time

import torch

from cogvideox.black_frames import check_black_frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    images = torch.rand(options.frames, options.height, options.width, 3, device=options.device)
    scratch = torch.empty_like(images)
    sides = {
        "black-frame check": lambda: check_black_frames(images),
        "torch.sum of the same frames": lambda: images.sum().item(),
        "copy of the same frames": lambda: scratch.copy_(images),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(5):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if options.device != "cpu":
                torch.accelerator.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
    size = images.nbytes / 1e9
    print(
        f"{options.frames} frames of {options.width}x{options.height} float32 ({size:.2f} GB) on {options.device}, "
        "best of 5"
    )
    for name, seconds in best.items():
        print(
            f"{name:30} {seconds * 1e3:8.1f} ms {size / seconds:7.1f} GB/s  check/this: "
            f"{best['black-frame check'] / seconds:5.2f}"
        )


if __name__ == "__main__":
    main()
