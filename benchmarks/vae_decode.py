"""The VAE's decode: diffusers untiled, diffusers tiled, and ours at several budgets. Time, peak memory beside the
weights, and the relative L2 error against untiled. Limits: time 1.0 x untiled, and a peak of no more than diffusers'
tiled one.

The released VAE's shapes with random weights. On CUDA at full size, with the peak from the allocator. Elsewhere a small
picture is measured, its memory counted from the tensors that live at once; and the peaks at full size are counted the
same way on the meta device, where a test holds what shapes say against real runs.

Before that, on a CPU, small clips with memory enough, one thread and then two, beside ComfyUI's own VAE where
``COMFYUI_PATH`` (and ``COMFYUI_PYTHON``) is given; limit: 0.9 x the faster of the two others. All sides take turns in
one process, which is then ComfyUI's. Of each the least is told: seconds of the processor, which other programs disturb
less, and by the clock.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cogvideox.modules.strips import Strips
from cogvideox.vae import chunk_lengths
from tests.memory import LiveBytes, count_strips

FULL, SMALL = (21, 96, 170), (3, 16, 24)
#: Small clips of 5, 9 and 17 frames, and their latents' sizes.
CASES = {"96x96, 5 frames": (2, 12, 12), "256x160, 9 frames": (3, 20, 32), "320x192, 17 frames": (5, 24, 40)}
ROOT = Path(__file__).parent.parent
BUDGETS = {"no limit": None, "8 GB": 8 * 10**9, "6 GB": 6 * 10**9, "4 GB": 4 * 10**9, "2 GB": 2 * 10**9}
SMALL_BUDGETS = {"no limit": None, "1/2 of untiled": 0.5, "1/4 of untiled": 0.25, "1/8 of untiled": 0.125}


def build(device: str, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    names = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
    with torch.device(device):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3, **names
        )
    return vae.to(dtype).eval()


def theirs(vae, latent: torch.Tensor, tiled: bool, tile: int | None = None) -> torch.Tensor:
    if tiled:
        vae.enable_tiling(tile, tile)
    else:
        vae.disable_tiling()
    return vae.decode(latent).sample


def ours(vae, latent: torch.Tensor, budget: int | None) -> torch.Tensor:
    strips = Strips(vae, latent.dtype, latent.device, budget)
    chunks = chunk_lengths(latent.shape[2], vae.num_latent_frames_batch_size)
    return torch.cat([strips.decode(piece) for piece in latent.split(chunks, dim=2)], dim=2)


def counted(work, *arguments) -> int:
    with LiveBytes() as mode:
        work(*arguments)
    return mode.peak


def counted_ours(vae, latent: torch.Tensor, budget: int | None) -> int:
    return count_strips(vae, latent, budget, chunk_lengths(latent.shape[2], vae.num_latent_frames_batch_size))


def measure(device: str, dtype: torch.dtype, shape: tuple[int, int, int], tile: int | None, rounds: int) -> None:
    vae, cuda = build(device, dtype), device.startswith("cuda")
    latent = torch.randn(1, 16, *shape, dtype=dtype).to(device)
    sides = {
        "diffusers, untiled": lambda: theirs(vae, latent, False),
        "diffusers, tiled": lambda: theirs(vae, latent, True, tile),
    }
    peaks = {}
    if not cuda:
        untiled = counted(theirs, vae, latent, False)
        peaks = {"diffusers, untiled": untiled, "diffusers, tiled": counted(theirs, vae, latent, True, tile)}
        budgets = {name: None if share is None else int(untiled * share) for name, share in SMALL_BUDGETS.items()}
        peaks |= {f"ours, {name}": counted_ours(vae, latent, budget) for name, budget in budgets.items()}
    else:
        budgets = BUDGETS
    sides |= {f"ours, {name}": lambda budget=budget: ours(vae, latent, budget) for name, budget in budgets.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    errors: dict[str, str] = {}
    reference = None
    for _ in range(rounds):
        for name, side in sides.items():
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                result = side()
                if cuda:
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                errors[name] = "out of memory"
                continue
            times[name].append(time.perf_counter() - start)
            if cuda:
                peaks[name] = torch.cuda.max_memory_allocated() - held
            result = result.float().cpu()
            reference = result if reference is None else reference
            same = result.shape == reference.shape
            errors[name] = (
                f"{((result - reference).norm() / reference.norm()).item():.1e}"
                if same
                else f"another size: {tuple(result.shape)}"
            )
            del result
    print(
        f"measured: {dtype}, latent {shape}, on {torch.cuda.get_device_name() if cuda else 'CPU'}, median of {rounds}"
    )
    first = statistics.median(times["diffusers, untiled"]) if times["diffusers, untiled"] else None
    for name in sides:
        seconds = statistics.median(times[name]) if times[name] else float("nan")
        ratio = f"{seconds / first:5.2f}" if first else "    -"
        print(
            f"{name:28} {seconds:8.2f} s  {ratio} x untiled   peak {peaks.get(name, 0) / 1e9:6.2f} GB   error "
            f"{errors[name]}"
        )


def print_cases(cases: Sequence[int], rounds: int, core_class: Callable[[], torch.nn.Module] | None) -> None:
    """Time the clips of those numbers in ``CASES`` by the processor and the clock, and print a line each."""
    vae = build("cpu", torch.float32)
    works = {"ours": lambda latent: ours(vae, latent, None), "diffusers": lambda latent: theirs(vae, latent, False)}
    if core_class is not None:
        core = core_class().eval()
        core.load_state_dict(vae.state_dict())
        works["ComfyUI core"] = core.decode
    print(f"measured: fp32 on a CPU, torch {torch.__version__}, seconds of the processor (by the clock)", flush=True)
    for name in (name for index, name in enumerate(CASES) if index in cases):
        latent = torch.randn(1, 16, *CASES[name])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            taken: dict[str, list[tuple[float, float]]] = {side: [] for side in works}
            for _ in range(rounds):
                for side, work in works.items():
                    start = time.process_time(), time.perf_counter()
                    with torch.no_grad():
                        work(latent)
                    taken[side].append((time.process_time() - start[0], time.perf_counter() - start[1]))
            least = {side: [min(times) for times in zip(*pairs, strict=True)] for side, pairs in taken.items()}
            ratios = [
                least["ours"][way] / min(times[way] for side, times in least.items() if side != "ours")
                for way in (0, 1)
            ]
            times = "  ".join(f"{side} {processor:.2f} ({clock:.2f})" for side, (processor, clock) in least.items())
            print(
                f"{name}, {threads} thread(s): {times}  ours / the faster {ratios[0]:.2f} ({ratios[1]:.2f})", flush=True
            )


def compare_small(cases: Sequence[int], rounds: int) -> None:
    """Run ``print_cases``, in ComfyUI's interpreter where there is one."""
    if "COMFYUI_PATH" not in os.environ:
        print_cases(cases, rounds, None)
        return
    script = str(ROOT / "tests" / "comfyui" / "decode_script.py")
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        script,
        str(ROOT),
        *map(str, (rounds, *cases)),
        "--cpu",
    ]
    subprocess.run(command, cwd=os.environ["COMFYUI_PATH"], check=True)


def print_counted() -> None:
    # A chunk of three latent frames and two of two: nothing larger comes after.
    shape = (7, *FULL[1:])
    vae = build("meta", torch.bfloat16)
    latent = torch.empty(1, 16, *shape, dtype=torch.bfloat16, device="meta")
    print("\ncounted on the meta device: bf16, 1360x768, peak beside the weights while 25 frames are decoded")
    print(f"{'diffusers, untiled':28} {counted(theirs, vae, latent, False) / 1e9:6.2f} GB")
    print(f"{'diffusers, tiled':28} {counted(theirs, vae, latent, True) / 1e9:6.2f} GB")
    for name, budget in BUDGETS.items():
        print(f"{f'ours, {name}':28} {counted_ours(vae, latent, budget) / 1e9:6.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--cases",
        type=int,
        nargs="*",
        default=range(len(CASES)),
        help="which of the small clips, from 0; none for none",
    )
    options = parser.parse_args()
    with torch.no_grad():
        if options.device.startswith("cuda"):
            measure(options.device, torch.bfloat16, FULL, None, options.rounds)
        else:
            if options.cases:
                compare_small(options.cases, options.rounds)
            # Tiles of half the picture, as large as diffusers' are at 720x480.
            measure(options.device, torch.float32, SMALL, SMALL[1] * 8 // 2, options.rounds)
        print_counted()


if __name__ == "__main__":
    main()
