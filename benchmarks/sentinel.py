"""What the sentinel costs: its look at the latents after a step, against the step itself, at 81 x 1360 x 768. Limit:
0.5 %.

On a GPU the step is one block of CogVideoX1.5-5B at full size, times 42. On a CPU that would take hours: the block runs
on fewer tokens, and its time is scaled by the operations that ``FlopCounterMode`` counts.
"""

import argparse
import statistics
import time

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils.flop_counter import FlopCounterMode

from cogvideox.finite import is_finite
from cogvideox.geometry import latent_frames

LAYERS, HEADS, HEAD_DIM, TEXT = 42, 48, 64, 226


def timed(work, device: torch.device, repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def block_inputs(tokens: int, **where) -> tuple[torch.Tensor, ...]:
    width = HEADS * HEAD_DIM
    return torch.randn(2, tokens, width, **where), torch.randn(2, TEXT, width, **where), torch.randn(2, 512, **where)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    frames = latent_frames(81)
    tokens = (frames + 1) // 2 * (768 // 16) * (1360 // 16)
    measured = tokens if device.type != "cpu" else 1024
    block = CogVideoXBlock(HEADS * HEAD_DIM, HEADS, HEAD_DIM, 512).to(device, dtype)
    inputs = block_inputs(measured, device=device, dtype=dtype)
    step = timed(lambda: block(*inputs), device, 3) * LAYERS
    if measured != tokens:
        with torch.device("meta"):
            shapes = CogVideoXBlock(HEADS * HEAD_DIM, HEADS, HEAD_DIM, 512)
        counts = []
        for count in (measured, tokens):
            with FlopCounterMode(display=False) as counter:
                shapes(*block_inputs(count, device="meta"))
            counts.append(counter.get_total_flops())
        step *= counts[1] / counts[0]
    latents = torch.randn(1, frames + 1, 16, 768 // 8, 1360 // 8, device=device, dtype=dtype)
    look = timed(lambda: is_finite(latents), device, 50)
    how = "measured" if measured == tokens else f"from {measured} tokens, scaled by operations"
    print(f"{device} {dtype}, 81 x 1360 x 768 with guidance: {tokens:,} video tokens x {LAYERS} layers")
    print(f"a step, {LAYERS} blocks ({how})  {step * 1e3:14.1f} ms")
    print(f"the sentinel's look at {list(latents.shape)}  {look * 1e3:10.3f} ms  = {look / step:.6%} of a step")


if __name__ == "__main__":
    main()
