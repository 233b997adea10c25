"""How long one guided step takes: diffusers' pipeline, ours as it is, and ours with each of the nodes that make it
faster, in one run.

On the CPU a small model of random weights in fp32; on a CUDA device (or with ``--full``) CogVideoX1.5-5B's size at 81
frames of 1360x768 in bf16, and range-safe fp16 beside plain fp16. With ``COMFYUI_PATH`` (and ``COMFYUI_PYTHON``)
ComfyUI's own CogVideoX model too, in a process of its own.

- *time*: a whole run's, from the end of its first step to the end of its last, over the steps between, as a cache makes
  steps unequal; the median of repeats that take turns, after a run that warms up and compiles.
- *own*: what the sampler does beside the transformer's forward.
- *peak*: bytes of tensors beside the weights, counted as they live (CPU) or as CUDA has it.
- *error*: relative L2 of the latents against those of plain fp32 (on a card: of diffusers in the same dtype) after the
  whole run. With random weights it says nothing of how a video looks: what loses quality (caches, sage, quantization)
  cannot be judged by it.
- *roofline*: the matrix products and attention of a step as diffusers computes them all, over the time, as a share of
  what one large product reaches here in that dtype. A cache that skips work can pass what is possible without.

Run as ``python -m benchmarks.step``.
"""

import argparse
import gc
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cogvideox import memory
from cogvideox.checkpoint.naming import comfy_name
from cogvideox.choices import AUTO, CACHES, FASTEST, SAGE, SDPA
from cogvideox.events import Events
from cogvideox.geometry import latent_frames, padding_frames
from cogvideox.handles import Model, open_handles, quantized, with_attention, with_cache, with_compile
from cogvideox.memory import LiveBytes
from cogvideox.modules.attention import available
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.precision.hardware import Hardware
from cogvideox.requests import outside_training
from cogvideox.sampling import sample
from cogvideox.variants import full_config
from tests.conftest import ROOT
from tests.tiny_checkpoint import build_checkpoint, build_transformer

SMALL = dict(num_attention_heads=8, num_layers=4, time_embed_dim=512, text_embed_dim=512)
FULL = dict(num_attention_heads=48, num_layers=42, time_embed_dim=512, text_embed_dim=4096)
NOISE_SEED = 5


@dataclass
class Side:
    """One row of the table: ``run(on_step)`` makes a whole run and returns its latents."""

    name: str
    run: Callable[[Callable], torch.Tensor]
    dtype: torch.dtype
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    peak: int = 0
    error: float = float("nan")
    latents: torch.Tensor | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="the released size and 81 frames of 1360x768 (the default on a GPU)"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layers",
        type=int,
        help="of how many layers, instead of all: a step takes as much less, and every ratio nearly stays",
    )
    parser.add_argument(
        "--only", help="only sides whose name this regular expression finds, beside diffusers and plain"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = options.full or device.type == "cuda"
    width, height, frames = (1360, 768, 81) if full else (256, 160, 33)
    shape = (1, 16, latent_frames(frames), height // 8, width // 8)
    with tempfile.TemporaryDirectory() as folder:
        size = FULL if full else SMALL
        checkpoint = build(
            Path(folder) / "random", size | dict(num_layers=options.layers or size["num_layers"]), device
        )
        _compare(checkpoint, device, shape, options)


def build(folder: Path, size: dict, device: torch.device) -> Path:
    def enlarge(parts: dict) -> None:
        torch.manual_seed(0)
        # A card draws billions of weights in a second, and a host in minutes.
        with device:
            parts["transformer"] = build_transformer("1.5", **size).to(torch.bfloat16)

    return build_checkpoint(folder, change=enlarge)


def _compare(checkpoint: Path, device: torch.device, shape: tuple[int, ...], options: argparse.Namespace) -> None:
    steps, dtypes = options.steps, ["fp32"] if device.type == "cpu" else ["bf16"]
    hardware = Hardware.detect(device)
    models = {dtype: open_handles(checkpoint, dtype, hardware).model for dtype in dtypes}
    if device.type == "cuda":
        models["fp16, plain"] = open_handles(checkpoint, "fp16", hardware, "warn").model
        models["fp16, range-safe"] = open_handles(checkpoint, "fp16", hardware).model
    first = models[dtypes[0]]
    config = full_config(first.weights.config)
    prompts = torch.randn(
        2, 1, config["max_text_seq_length"], config["text_embed_dim"], generator=torch.Generator().manual_seed(2)
    )
    inputs = dict(prompts=prompts, shape=shape, steps=steps)
    sides = [
        Side(
            f"diffusers {first.weights.precision.name}",
            theirs(checkpoint, first, device, **inputs),
            first.weights.precision.dtype,
        )
    ]
    sides += [
        Side(f"ours, {name}", partial(ours, model, **inputs), model.weights.precision.dtype)
        for name, model in _variants(models, device)
    ]
    halves = partial(ours, first, batched=False, **inputs)
    sides.insert(2, Side(f"ours, {dtypes[0]}: halves one by one", halves, first.weights.precision.dtype))
    if options.only:
        sides = sides[:2] + [side for side in sides[2:] if re.search(options.only, side.name)]
    print(
        f"{machine(device)}; {config['num_layers']} layers x {config['num_attention_heads']} heads, latent "
        f"{list(shape)}, {steps} steps, guided"
    )
    reference = None
    if device.type == "cpu":
        reference = ours(first, on_step=lambda *_: None, **inputs)
    for side in list(sides):
        try:
            _run(side, device, warm=True, reference=reference)
        except Exception as error:
            if side is sides[0]:
                raise
            print(f"{side.name}: did not run: {type(error).__name__}: {[*str(error).splitlines(), ''][0]}")
            sides.remove(side)
            continue
        if reference is None:
            # On a card fp32 does not fit beside the rest at full size: diffusers' own is what the others are held
            # against.
            reference = side.latents
        print(f"  {side.name}: warmed up, error {side.error:.1e}, peak {side.peak / 1e9:.2f} GB", file=sys.stderr)
    for turn in range(options.rounds):
        for side in sides if turn % 2 else reversed(sides):
            _run(side, device)
            print(f"  {side.name}: {side.seconds[-1]:.3f} s", file=sys.stderr)
    roofs = {dtype: matmul_flops(device, dtype) for dtype in {side.dtype for side in sides}}
    flops, base = step_flops(config, shape, prompts.shape[2]), statistics.median(sides[0].seconds)
    print(f"{'':44}{'s a step':>10}{'ratio':>8}{'own':>8}{'peak':>10}{'error':>10}{'roofline':>10}")
    for side in sides:
        seconds = statistics.median(side.seconds)
        own = f"{statistics.median(side.own) / seconds:.1%}" if side.own else ""
        share = flops / seconds / roofs[side.dtype]
        peak = f"{side.peak / 1e9:.2f} GB" if side.peak else "-"
        print(f"{side.name:44}{seconds:10.3f}{seconds / base:8.2f}{own:>8}{peak:>10}{side.error:10.1e}{share:10.0%}")
    name, seconds = comfyui(checkpoint, device, shape, prompts, steps, options.rounds)
    print(name if seconds is None else f"{name:44}{seconds:10.3f}{seconds / base:8.2f}")


def _variants(models: dict[str, Model], device: torch.device) -> list[tuple[str, Model]]:
    """Each option alone, and the combinations that make sense."""
    name, plain = next(iter(models.items()))
    found = [(f"{name}: plain", plain)]
    # Those of the hub download code.
    attentions = [choice for choice in available(device) if choice not in (AUTO, SDPA) and not choice.endswith("_hub")]
    changes: dict[str, Callable[[Model], Model]] = {
        f"attention {choice}": partial(with_attention, attention=choice) for choice in attentions
    }
    changes |= {f"cache {method}": partial(with_cache, cache=Cache(method)) for method in CACHES}
    if missing_compiler(device) is None:
        changes["compile"] = partial(with_compile, compiled=Compiled())
        exact = [choice for choice in attentions if choice not in (SAGE, FASTEST)]
        if exact:
            changes[f"compile + {exact[0]}"] = lambda model: with_compile(with_attention(model, exact[0]), Compiled())
        changes["compile + cache teacache"] = lambda model: with_compile(
            with_cache(model, Cache("teacache")), Compiled()
        )
    changes |= {
        f"quantize {method}": partial(quantized, method=method)
        for method in ("int8_weight_only", "fp8_weight_only", "int8_dynamic")
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        changes["quantize fp8_dynamic"] = partial(quantized, method="fp8_dynamic")
    found += [(f"{name}: {change}", make(plain)) for change, make in changes.items()]
    return found + [(f"{other}: plain", model) for other, model in list(models.items())[1:]]


def ours(
    model: Model, on_step: Callable, prompts: torch.Tensor, shape: tuple[int, ...], steps: int, batched: bool = True
) -> torch.Tensor:
    own = memory.placements
    memory.placements = lambda _: own([batched])
    try:
        return sample(
            model,
            prompts[0],
            prompts[1],
            torch.zeros(shape),
            seed=NOISE_SEED,
            steps=steps,
            events=_Steps(on_step, model, shape),
        )
    finally:
        memory.placements = own


class AsAsked(Events):
    """End a run that goes otherwise than asked (healed, in less memory, without compiling), with what it says: its
    seconds would not be those of its name."""

    def __init__(self, model: Model, shape: tuple[int, ...]):
        # They say nothing of how it runs.
        self._expected = outside_training(model, torch.zeros(shape), None)

    def note(self, text: str, level: int = logging.WARNING) -> None:
        if level >= logging.WARNING and text not in self._expected:
            raise RuntimeError(text)
        print(f"    {text}", file=sys.stderr)


class _Steps(AsAsked):
    def __init__(self, on_step: Callable[[], None], model: Model, shape: tuple[int, ...]):
        super().__init__(model, shape)
        self._on_step = on_step

    def step(self, *_) -> None:
        self._on_step()


def theirs(
    checkpoint: Path, model: Model, device: torch.device, prompts: torch.Tensor, shape: tuple[int, ...], steps: int
) -> Callable:
    """diffusers' unmodified pipeline from the same noise, in our layout."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    dtype = model.weights.precision.dtype

    @cache
    def load() -> CogVideoXTransformer3DModel:
        return CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).to(device)

    def run(on_step: Callable) -> torch.Tensor:
        scheduler = CogVideoXDDIMScheduler.from_pretrained(checkpoint / "scheduler")
        pipeline = CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=load(), scheduler=scheduler
        )
        pipeline.set_progress_bar_config(disable=True)
        frames = shape[2] + padding_frames(shape[2], full_config(model.weights.config))
        latents = pipeline(
            prompt_embeds=prompts[0].to(device, dtype),
            negative_prompt_embeds=prompts[1].to(device, dtype),
            width=shape[4] * 8,
            height=shape[3] * 8,
            num_frames=4 * (shape[2] - 1) + 1,
            num_inference_steps=steps,
            guidance_scale=6.0,
            latents=_noise((shape[0], frames, *shape[1:2], *shape[3:])).to(device, dtype),
            output_type="latent",
            callback_on_step_end=lambda *_: on_step() or {},
        ).frames
        return latents[:, frames - shape[2] :].permute(0, 2, 1, 3, 4).float().cpu() / model.latent_scale

    return run


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(NOISE_SEED))


def _run(side: Side, device: torch.device, warm: bool = False, reference: torch.Tensor | None = None) -> None:
    """One run of a side; the first one also takes its peak and its error."""
    ends, inside = [], []

    def on_step() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            if warm and not ends:
                # What loading and compiling took is not of the steps.
                torch.cuda.reset_peak_memory_stats(device)
        ends.append(time.perf_counter())

    with forwards_timed(inside, device):
        latents = side.run(on_step=on_step)
    if not warm:
        taken = ends[-1] - ends[0]
        side.seconds.append(taken / (len(ends) - 1))
        side.own.append((taken - sum(end - start for start, end in inside if start >= ends[0])) / (len(ends) - 1))
        return
    side.latents = latents
    if reference is not None:
        side.error = ((latents - reference).norm() / reference.norm()).item()
    gc.collect()
    if device.type == "cuda":
        side.peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    elif "compile" not in side.name:
        # What counts cannot be compiled.
        with LiveBytes() as live:
            side.run(on_step=on_step)
        side.peak = live.peak


@contextmanager
def forwards_timed(inside: list, device: torch.device):
    """Note when each forward of a transformer began and ended."""
    from diffusers import CogVideoXTransformer3DModel

    own = CogVideoXTransformer3DModel.forward

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        result = own(self, *args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        inside.append((start, time.perf_counter()))
        return result

    CogVideoXTransformer3DModel.forward = timed
    try:
        yield
    finally:
        CogVideoXTransformer3DModel.forward = own


def step_flops(config, shape: tuple[int, ...], text: int) -> float:
    """Matrix products and attention of one guided step: 12 C^2 weights a layer and token, and 4 N^2 C of attention a
    layer."""
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    frames = (shape[2] + padding_frames(shape[2], config)) // config["patch_size_t"]
    tokens = text + frames * (shape[3] // 2) * (shape[4] // 2)
    return 2 * config["num_layers"] * (24 * channels**2 * tokens + 4 * tokens**2 * channels)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken[2:])


def comfyui(
    checkpoint: Path,
    device: torch.device,
    shape: tuple[int, ...],
    prompts: torch.Tensor,
    steps: int,
    rounds: int,
    of_processor: bool = False,
) -> tuple[str, float | None]:
    """Time ComfyUI's own model, in a process of its own: what to call it, or why there is no time, and the seconds of a
    step: the median by the clock, or with ``of_processor`` the least of the processor's, on one thread."""
    if "COMFYUI_PATH" not in os.environ:
        return "ComfyUI's own model: not measured (COMFYUI_PATH names no checkout)", None
    state = {}
    for file in sorted((checkpoint / "transformer").glob("*.safetensors")):
        state |= load_file(file)
    save_file({comfy_name(name): tensor.clone() for name, tensor in state.items()}, checkpoint / "comfy.safetensors")
    given = {
        "prompts": prompts,
        "shape": torch.tensor(shape),
        "steps": torch.tensor(steps),
        "rounds": torch.tensor(rounds),
    }
    save_file(given, checkpoint / "inputs.safetensors")
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        str(ROOT / "tests" / "comfyui" / "step_script.py"),
        str(ROOT),
    ]
    command += [str(checkpoint / name) for name in ("comfy.safetensors", "inputs.safetensors")] + (
        ["--cpu"] if device.type == "cpu" else []
    )
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if of_processor else {})
    done = subprocess.run(command, cwd=os.environ["COMFYUI_PATH"], env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"ComfyUI's own model: did not run: {done.stderr.strip().splitlines()[-1]}", None
    version, taken = json.loads(done.stdout.splitlines()[-1])
    clock, processor = zip(*taken, strict=True)
    return f"ComfyUI core, torch {version}", min(processor) if of_processor else statistics.median(clock)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "CPU",
    )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
