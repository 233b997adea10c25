"""How long loading takes and how much memory it needs: ours against diffusers, against safetensors and
``load_state_dict``, and against reading the files raw. Limits: 1.2 times the raw read, never slower than diffusers, and
a peak of 1.1 times the loaded weights for one dtype.

A random transformer of CogVideoX1.5-5B's shapes in bf16 and a random T5-XXL in fp32, as the official repository stores
them, each with as many layers as asked for. Each side runs in a process of its own, with everything imported first;
they take turns on a warm page cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = """
import json, sys, time
from pathlib import Path
import torch
from diffusers import CogVideoXTransformer3DModel
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel
from cogvideox.checkpoint.layout import open_part
from cogvideox.loading import load_module
from cogvideox.precision.policy import Precision, RANGE_SAFE_FP16
from tests.memory import peak_kilobytes as peak
folder, cpu = Path(sys.argv[1]), torch.device("cpu")
files = sorted(folder.glob("*.safetensors"))
is_t5 = json.loads((folder / "config.json").read_text()).get("model_type") == "t5"
kind, theirs = ("text_encoder", T5EncoderModel) if is_t5 else ("transformer", CogVideoXTransformer3DModel)
with init_empty_weights():
    if is_t5:
        T5EncoderModel(T5Config(num_layers=1))
    else:
        CogVideoXTransformer3DModel(num_layers=1, use_rotary_positional_embeddings=True)

def ours(precision):
    return load_module(open_part(folder, kind), precision, cpu)

def reference(dtype):
    return theirs.from_pretrained(folder, torch_dtype=dtype)

def plain():
    state = {}
    for file in files:
        state |= load_file(file)
    with init_empty_weights():
        if is_t5:
            module = T5EncoderModel(T5Config.from_pretrained(folder))
        else:
            module = theirs.from_config(theirs.load_config(folder))
    # T5's token embedding has two names and is stored under one.
    module.load_state_dict(state, assign=True, strict=not is_t5)
    return module

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
    "from_pretrained, bf16": lambda: reference(torch.bfloat16),
    "ours, fp32": lambda: ours(Precision(torch.float32)),
    "from_pretrained, fp32": lambda: reference(torch.float32),
    "load_file + load_state_dict, as stored": plain,
    "ours, range-safe fp16": lambda: ours(RANGE_SAFE_FP16),
}
before = peak()
start = time.perf_counter()
kept = sides[sys.argv[2]]()
seconds = time.perf_counter() - start
print(json.dumps([seconds, (peak() - before) * 1024]))
"""
SIDES = {
    "raw read": None,
    "ours, bf16": 2,
    "from_pretrained, bf16": 2,
    "ours, fp32": 4,
    "from_pretrained, fp32": 4,
    "load_file + load_state_dict, as stored": None,
    "ours, range-safe fp16": 2,
}
"""Bytes of a weight once it is loaded; None: as it is stored."""


def write_checkpoint(folder: Path, kind: str, layers: int) -> int:
    """A part of the real widths, in shards; returns the bytes of its weights."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    from benchmarks.check import CONFIG

    with init_empty_weights():
        if kind == "transformer":
            module = CogVideoXTransformer3DModel(**CONFIG | {"num_layers": layers}).to(torch.bfloat16)
        else:
            widths = {
                "d_model": 4096,
                "d_ff": 10240,
                "d_kv": 64,
                "num_heads": 64,
                "vocab_size": 32128,
                "feed_forward_proj": "gated-gelu",
            }
            module = T5EncoderModel(T5Config(**widths, num_layers=layers))
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02)
    module.save_pretrained(folder, max_shard_size="2GB")
    return sum(parameter.nbytes for parameter in module.parameters())


def compare(kind: str, layers: int, rounds: int) -> None:
    """Run all sides in turns and print their table."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that its memory is gone when the sides run.
        command = [sys.executable, "-m", "benchmarks.load", "--write", folder, kind, str(layers)]
        weights = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        results: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for turn in range(rounds + 1):
            # What the side before leaves of the system's memory matters, so the order turns too.
            for side in SIDES if turn % 2 else reversed(SIDES):
                done = subprocess.run(
                    [sys.executable, "-c", COMMON, folder, side], capture_output=True, text=True, check=True
                )
                # The first turn warms the page cache.
                if turn:
                    results[side].append(json.loads(done.stdout.splitlines()[-1]))
    width = {"transformer": 2, "text_encoder": 4}[kind]
    print(f"{kind}, {layers} layers, {weights / 1e9:.2f} GB stored with {width} bytes a weight, median of {rounds}")
    raw = statistics.median(seconds for seconds, _ in results["raw read"])
    for side, runs in results.items():
        seconds, peak = (statistics.median(run[index] for run in runs) for index in (0, 1))
        loaded = weights // width * (SIDES[side] or width)
        print(
            f"{side:40} {seconds:6.2f} s  {seconds / raw:5.2f} x raw   peak {peak / 1e9:5.2f} GB  "
            f"{peak / loaded:5.2f} x the loaded weights"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the transformer's 42")
    parser.add_argument("--t5-layers", type=int, default=2, help="of T5's 24")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        folder, kind, layers = options.write
        print(write_checkpoint(Path(folder), kind, int(layers)))
        return
    compare("transformer", options.layers, options.rounds)
    compare("text_encoder", options.t5_layers, options.rounds)


if __name__ == "__main__":
    main()
