"""Reading 10 s of 720p for video to video: all frames at once in fp32 (8 GB), and ours, one by one at the size and rate
that are needed. Time, and the rise of the process's peak memory. Limit: 1 GB, the clip itself included. Each in a
process of its own; Linux only, whose peak can be set back."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tests.memory import rise_of_peak

RATE, SECONDS, SIZE = 30, 10, (1280, 720)
TARGET, FPS, LONGEST, STEP = (1360, 768), 16, 161, 16


def write_clip(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        picture = (
            np.random.default_rng(0)
            .integers(0, 255, (SIZE[1] // 16, SIZE[0] // 16, 3), np.uint8)
            .repeat(16, 0)
            .repeat(16, 1)
        )
        for index in range(RATE * SECONDS):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(picture, 4 * index, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def at_once(path: Path) -> torch.Tensor:
    """Every frame of the file, as floats, before any of it is scaled."""
    import av

    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).float() / 255


def ours(path: Path) -> torch.Tensor:
    from cogvideox.clip_files import read_video

    return read_video(path, LONGEST, fps=FPS, size=TARGET, step=STEP, dtype=torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "CLIP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        way, path = options.one
        clips, start = [], time.perf_counter()
        rise = rise_of_peak(lambda: clips.append(globals()[way](Path(path))))
        seconds = time.perf_counter() - start
        print(
            f"{way:8} {len(clips[0]):4} frames of {clips[0].shape[2]}x{clips[0].shape[1]}, {rise / 1e9:5.2f} GB, "
            f"{seconds:5.1f} s"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path)
        for way in ("at_once", "ours"):
            subprocess.run([sys.executable, "-m", "benchmarks.read_video", "--one", way, str(path)], check=True)


if __name__ == "__main__":
    main()
