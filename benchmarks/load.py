"""How long loading takes and how much memory it needs: ours against diffusers, against safetensors and ``load_state_dict``, and against reading
the files raw. Limits: 1.2 times the raw read, never slower than diffusers, and a peak of 1.1 times the loaded weights for one dtype.

A random transformer of CogVideoX1.5-5B's shapes, with as many layers as asked for. Each side runs in a process of its own, with everything
imported first; they take turns on a warm page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = '''
import json, sys, time
from pathlib import Path
import torch
from diffusers import CogVideoXTransformer3DModel
from accelerate import init_empty_weights
from safetensors.torch import load_file
from cogvideox.checkpoint.layout import open_part
from cogvideox.checkpoint.loading import load_module
from cogvideox.precision.policy import Precision, RANGE_SAFE_FP16
folder, cpu = Path(sys.argv[1]), torch.device("cpu")
files = sorted(folder.glob("*.safetensors"))
with init_empty_weights():
    CogVideoXTransformer3DModel(num_layers=1, use_rotary_positional_embeddings=True)

def peak():
    """Kilobytes at most so far. ru_maxrss would begin at the parent's."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def ours(precision):
    return load_module(open_part(folder, "transformer"), precision, cpu)

def plain():
    state = {}
    for file in files:
        state |= load_file(file)
    with init_empty_weights():
        module = CogVideoXTransformer3DModel.from_config(json.loads((folder / "config.json").read_text()))
    module.load_state_dict(state, assign=True)
    # The pages that are mapped only are read when they are used: use them, as the others' were.
    return sum(tensor.view(torch.int16)[..., ::2048].sum() for tensor in state.values() if tensor.ndim) and module

def raw():
    kept = []
    for file in files:
        size = file.stat().st_size
        buffer = torch.empty(size, dtype=torch.uint8)
        with file.open("rb", buffering=0) as opened:
            view, done = memoryview(buffer.numpy()), 0
            while done < size:
                done += opened.readinto(view[done:])
        kept.append(buffer)
    return kept

sides = {
    "raw read": raw,
    "ours, bf16": lambda: ours(Precision(torch.bfloat16)),
    "safetensors + load_state_dict, bf16": plain,
    "diffusers from_pretrained, bf16": lambda: CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16),
    "ours, fp32": lambda: ours(Precision(torch.float32)),
    "diffusers from_pretrained, fp32": lambda: CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32),
    "ours, range-safe fp16": lambda: ours(RANGE_SAFE_FP16),
}
before = peak()
start = time.perf_counter()
kept = sides[sys.argv[2]]()
seconds = time.perf_counter() - start
print(json.dumps([seconds, (peak() - before) * 1024]))
'''
SIDES = [
    "raw read",
    "ours, bf16",
    "safetensors + load_state_dict, bf16",
    "diffusers from_pretrained, bf16",
    "ours, fp32",
    "diffusers from_pretrained, fp32",
    "ours, range-safe fp16",
]


def write_checkpoint(folder: Path, layers: int) -> int:
    """A transformer of the real widths in bf16, in shards; returns the bytes of its weights."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import CogVideoXTransformer3DModel

    from benchmarks.check import CONFIG

    with init_empty_weights():
        module = CogVideoXTransformer3DModel(**CONFIG | {"num_layers": layers})
    module = module.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    module.save_pretrained(folder, max_shard_size="2GB")
    return sum(parameter.nbytes for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(write_checkpoint(options.write, options.layers))
        return
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that its memory is gone when the sides run.
        command = [sys.executable, "-m", "benchmarks.load", "--layers", str(options.layers), "--write", folder]
        weights = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        results: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for turn in range(options.rounds + 1):
            # What the side before leaves of the system's memory matters, so the order turns too.
            for side in SIDES if turn % 2 else reversed(SIDES):
                done = subprocess.run([sys.executable, "-c", COMMON, folder, side], capture_output=True, text=True, check=True)
                # The first turn warms the page cache.
                if turn:
                    results[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{options.layers} layers of 42, {weights / 1e9:.2f} GB in bf16, median of {options.rounds}")
    raw = statistics.median(seconds for seconds, _ in results["raw read"])
    for side, runs in results.items():
        seconds, peak = (statistics.median(run[index] for run in runs) for index in (0, 1))
        loaded = weights * (2 if "fp32" in side else 1)
        print(f"{side:37} {seconds:7.2f} s  {seconds / raw:5.2f} x raw   peak {peak / 1e9:6.2f} GB  {peak / loaded:5.2f} x the loaded weights")


if __name__ == "__main__":
    main()
