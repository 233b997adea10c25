"""The whole truth of a card in one call of under 8 minutes: what a step of CogVideoX1.5-5B at 81 frames of 1360x768
takes in every way that it can run, its decode, its text encoder, and the seconds of a run of 50 steps put together.

Random weights of the full size, all 42 layers. Rows are written as they are done, as Markdown and JSON into ``$OUT``
(or ``--out``), so that a cut leaves a table; rows that the time does not reach say so. ``--tiny`` runs the same script
on a small model, on a CPU too, in two minutes.

- *seconds*: of a guided step, its forward and the sampler's own work. Ways that compile are timed at their second step;
  what compiling took is not in it.
- *x diffusers*: how many times faster than diffusers' pipeline, eager, in bf16 (on a CPU in fp32).
- *peak*: what CUDA had allocated at most beside what was there before, in GB.
- *error*: relative L2 of the clean latents that the first step predicts against plain ours. With random weights it says
  nothing of how a video looks.
- *roofline*: the matrix products and attention of a step, all of them, over the time, as a share of what one large
  product reaches here in that dtype.

TeaCache's rows are put together: a full step and a skipped one are timed, and of 20 steps as many are skipped as its
authors' times say for that threshold, since random weights have no thresholds of their own.

Run as ``python -m benchmarks.card``.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import vae_decode
from benchmarks.step import FULL, NOISE_SEED, build, comfyui, machine, matmul_flops, step_flops, theirs
from cogvideox import memory
from cogvideox.choices import AUTO, FASTEST, SAGE
from cogvideox.events import Events
from cogvideox.geometry import latent_frames
from cogvideox.handles import Model, open_handles, quantized, with_attention, with_cache, with_compile
from cogvideox.modules.attention import available
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from cogvideox.variants import TEACACHE_SECONDS, full_config
from tests.tiny_checkpoint import build_vae

TINY = dict(num_attention_heads=2, num_layers=2, time_embed_dim=64, text_embed_dim=64)
#: Steps of the schedule that TeaCache's rows are of, and of a real run.
SCHEDULE, RUN = 20, 50
NOT_REACHED = "not reached in the time given"
#: Bytes that our decode is given.
BUDGETS = {"no limit": None, "6 GB": 6 * 10**9, "4 GB": 4 * 10**9}


@dataclass
class Row:
    """One line of the table; ``said`` takes the place of what was not measured."""

    name: str
    seconds: float | None = None
    peak: int | None = None
    error: float | None = None
    roofline: float | None = None
    said: str = ""

    @property
    def is_step(self) -> bool:
        """Whether its seconds are those of a step."""
        return not self.name.startswith(("decode", "T5"))


class Table:
    """The rows so far, written anew with each."""

    def __init__(self, title: str, folder: Path, deadline: float):
        self._title, self._folder, self._deadline = title, folder, deadline
        self.rows: list[Row] = []
        self.lines: list[str] = []

    def seconds(self, name: str) -> float | None:
        """Return what a row took; None where it was not measured."""
        return next((row.seconds for row in self.rows if row.name == name), None)

    def measure(self, name: str, work: Callable[[], Row]) -> None:
        """Add a row; what it raises, and that there is no time for it, is told in its place."""
        if time.monotonic() > self._deadline:
            row = Row(name, said=NOT_REACHED)
        else:
            try:
                row = work()
                row.name = name
            # Whatever one way of running raises, the others have their rows.
            except Exception as error:
                row = Row(name, said=f"did not run: {[*str(error).splitlines(), type(error).__name__][0]}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.add(row)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(self._line(row), flush=True)
        self.write()

    def say(self, line: str) -> None:
        """Add a line below the table."""
        self.lines.append(line)
        print(line, flush=True)
        self.write()

    def write(self) -> None:
        head = ["| | seconds | x diffusers | peak GB | error | roofline |", "|---|---|---|---|---|---|"]
        text = "\n".join([f"# {self._title}", "", *head, *map(self._line, self.rows), "", *self.lines, ""])
        (self._folder / "card.md").write_text(text, encoding="utf-8")
        found = {"title": self._title, "rows": [asdict(row) for row in self.rows], "lines": self.lines}
        (self._folder / "card.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def _line(self, row: Row) -> str:
        if row.seconds is None:
            return f"| {row.name} | {row.said} | | | | |"
        base = self.rows[0].seconds if self.rows else row.seconds
        parts = [
            row.name,
            f"{row.seconds:.3f}",
            "-" if base is None or not row.is_step else f"{base / row.seconds:.2f}",
            "-" if row.peak is None else f"{row.peak / 1e9:.1f}",
            "-" if row.error is None else f"{row.error:.0e}",
            "-" if row.roofline is None else f"{row.roofline:.0%}",
        ]
        return f"| {' | '.join(parts)} |"


class _Ends(Events):
    """When each step ended, and what the first one predicted."""

    def __init__(self, device: torch.device):
        self._device = device
        self.ends: list[float] = []
        self.clean: torch.Tensor | None = None

    def step(self, done: int, total: int, clean: torch.Tensor) -> None:
        _wait(self._device)
        self.ends.append(time.perf_counter())
        if self.clean is None:
            self.clean = clean.float().cpu()

    def note(self, text: str, level: int = 0) -> None:
        print(f"    {text}", file=sys.stderr)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """What all rows have in common: the inputs, and how a row is measured."""

    def __init__(self, checkpoint: Path, device: torch.device, shape: tuple[int, ...], first: Model):
        self.checkpoint, self.device, self.shape, self.first = checkpoint, device, shape, first
        self.config = full_config(first.weights.config)
        size = 2, 1, self.config["max_text_seq_length"], self.config["text_embed_dim"]
        self.prompts = torch.randn(size, generator=torch.Generator().manual_seed(2))
        self.flops = step_flops(self.config, shape, size[2])
        self._roofs: dict[torch.dtype, float] = {}
        self._clean: torch.Tensor | None = None

    def share(self, seconds: float, dtype: torch.dtype) -> float | None:
        """Return the share of the roofline that a step of so many seconds reaches; None on a CPU in 16 bits, where a
        product may be a plain loop."""
        if self.device.type == "cpu" and dtype != torch.float32:
            return None
        if dtype not in self._roofs:
            self._roofs[dtype] = matmul_flops(self.device, dtype)
        return self.flops / seconds / self._roofs[dtype]

    def run(self, model: Model, steps: int, batched: bool = True, **settings) -> tuple[list[float], _Ends, int | None]:
        """Run a few steps: the seconds of each, from the first forward, what they told, and the peak."""
        began: list[float] = []
        ends, held = _Ends(self.device), None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _halves(batched), _first_forward(began, self.device):
            sample(
                *(model, *self.prompts, torch.zeros(self.shape)),
                **dict(seed=NOISE_SEED, steps=steps, events=ends) | settings,
            )
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device) - model.weights.resident
        times = [began[0], *ends.ends]
        return [after - before for before, after in pairwise(times)], ends, held

    def ours(self, model: Model, steps: int = 1, **settings) -> Row:
        """Measure a way of running by its last step."""
        taken, ends, peak = self.run(model, steps, **settings)
        if self._clean is None:
            self._clean = ends.clean
        assert ends.clean is not None
        assert self._clean is not None
        error = ((ends.clean - self._clean).norm() / self._clean.norm()).item()
        share = self.share(taken[-1], model.weights.precision.dtype)
        return Row("", taken[-1], peak, error, share)

    def diffusers(self) -> Row:
        """Measure diffusers' pipeline by its second step, after one that warms the card up."""
        ends: list[float] = []

        def on_step() -> None:
            _wait(self.device)
            ends.append(time.perf_counter())

        run = theirs(self.checkpoint, self.first, self.device, self.prompts, self.shape, 2)
        run(on_step)
        seconds = ends[1] - ends[0]
        return Row("", seconds, None, None, self.share(seconds, self.first.weights.precision.dtype))

    def core(self) -> Row:
        """Measure ComfyUI's own model, where there is a checkout."""
        said, seconds = comfyui(self.checkpoint, self.device, self.shape, self.prompts, 2, 1)
        return Row("", seconds, said=said)


@contextmanager
def _halves(batched: bool) -> Iterator[None]:
    own = memory.placements
    memory.placements = lambda _: own([batched])
    try:
        yield
    finally:
        memory.placements = own


@contextmanager
def _first_forward(began: list[float], device: torch.device) -> Iterator[None]:
    """Note when the first forward of a transformer begins: what is loaded before is not of a step."""
    from diffusers import CogVideoXTransformer3DModel

    own = CogVideoXTransformer3DModel.forward

    def noted(self, *args, **kwargs):
        if not began:
            _wait(device)
            began.append(time.perf_counter())
        return own(self, *args, **kwargs)

    CogVideoXTransformer3DModel.forward = noted
    try:
        yield
    finally:
        CogVideoXTransformer3DModel.forward = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU and for tests of this script")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="where the table goes")
    parser.add_argument("--minutes", type=float, help="rows that begin later are left out (default: 7, tiny: 1.5)")
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no CUDA card here: give --tiny to run the same on a small model")
    width, height, frames = (96, 64, 17) if options.tiny else (1360, 768, 81)
    shape = (1, 16, latent_frames(frames), height // 8, width // 8)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build(Path(folder) / "random", TINY if options.tiny else FULL, device)
        hardware = Hardware.detect(device)
        first = open_handles(checkpoint, "fp32" if device.type == "cpu" else "bf16", hardware).model
        bench = Bench(checkpoint, device, shape, first)
        minutes = (1.5 if options.tiny else 7) if options.minutes is None else options.minutes
        title = (
            f"{machine(device)}: {bench.config['num_layers']} layers x {bench.config['num_attention_heads']} heads, "
            f"{frames} frames of {width}x{height}, {first.weights.precision.name}"
        )
        table = Table(title, options.out, started + 60 * minutes)
        print(f"# {title}", flush=True)
        # What compiles comes last: it takes the most time, and everything else is in the table by then.
        _plain_rows(bench, table)
        _other_rows(bench, table, hardware, compiled=False)
        _decode_rows(bench, table, options.tiny)
        _text_rows(bench, table, options.tiny)
        _fast_rows(bench, table)
        if missing_compiler(device) is None:
            _other_rows(bench, table, hardware, compiled=True)
        first.weights.park()
        table.measure("ComfyUI core", bench.core)
        _whole_runs(table)
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)


def _plain_rows(bench: Bench, table: Table) -> None:
    """diffusers, ours as it is, and each kernel of the attention."""
    table.measure("diffusers, eager", bench.diffusers)
    table.measure("plain", partial(bench.ours, bench.first))
    for choice in available(bench.device):
        # Those of the hub download code.
        if choice != AUTO and not choice.endswith("_hub"):
            table.measure(f"attention {choice}", lambda choice=choice: bench.ours(with_attention(bench.first, choice)))


def _fast_rows(bench: Bench, table: Table) -> None:
    """Compile, TeaCache and guidance in a part of the steps, together."""
    fast, compiles = with_attention(bench.first, FASTEST), missing_compiler(bench.device) is None
    if compiles:
        fast = with_compile(fast, Compiled())
        table.measure("compile + fastest", lambda: bench.ours(fast, 2))
    _teacache_rows(bench, table, "compile + fastest" if compiles else "fastest", fast)
    if SAGE in available(bench.device):
        eight = with_attention(bench.first, SAGE)
        eight = with_compile(eight, Compiled()) if compiles else eight
        _teacache_rows(bench, table, f"compile + {SAGE}" if compiles else SAGE, eight)
    if compiles:
        table.measure("compile", lambda: bench.ours(with_compile(bench.first, Compiled()), 2))


def _teacache_rows(bench: Bench, table: Table, name: str, model: Model) -> None:
    """Time a full, a skipped and an unguided step, and put the thresholds' schedules together from them."""
    taken: dict[str, float] = {}

    def steps() -> Row:
        # Full, skipped, skipped, full: the last one is compiled already.
        cached = with_cache(model, Cache("teacache", 0.5, 0.0, 1.0))
        (_, _, taken["skipped"], taken["full"]), _, peak = bench.run(cached, 4)
        return Row("", taken["skipped"], peak)

    def unguided() -> Row:
        *_, taken["unguided"] = bench.run(model, 2, cfg=1.0)[0]
        return Row("", taken["unguided"])

    table.measure(f"{name}: a step that TeaCache skips", steps)
    table.measure(f"{name}: an unguided step", unguided)
    for threshold, seconds in list(TEACACHE_SECONDS.items())[1:]:
        skipped = round(SCHEDULE * (1 - seconds / TEACACHE_SECONDS[0]))
        if "full" not in taken:
            table.add(Row(f"{name} + teacache {threshold} ({skipped} of {SCHEDULE} skipped)", said=NOT_REACHED))
            if threshold == 0.2:
                table.add(Row(f"{name} + teacache 0.2 + cfg_end 0.8", said=NOT_REACHED))
            continue
        mean = (skipped * taken["skipped"] + (SCHEDULE - skipped) * taken["full"]) / SCHEDULE
        table.add(Row(f"{name} + teacache {threshold} ({skipped} of {SCHEDULE} skipped)", mean))
        if threshold == 0.2 and "unguided" in taken:
            # Of the full steps as many are unguided as of all.
            full = 0.8 * taken["full"] + 0.2 * taken["unguided"]
            mean = (skipped * taken["skipped"] + (SCHEDULE - skipped) * full) / SCHEDULE
            table.add(Row(f"{name} + teacache 0.2 + cfg_end 0.8", mean))


def _other_rows(bench: Bench, table: Table, hardware: Hardware, compiled: bool) -> None:
    """Quantization and fp16, each as it is or compiled; and as it is what takes little memory."""
    dtype = bench.first.weights.precision.name
    ways = {method: partial(quantized, bench.first, method) for method in ("fp8_dynamic", "int8_dynamic")}
    ways |= {
        "fp16, range-safe": lambda: open_handles(bench.checkpoint, "fp16", hardware).model,
        "fp16, plain": lambda: open_handles(bench.checkpoint, "fp16", hardware, "warn").model,
    }
    if not compiled and bench.device.type == "cuda":
        ways |= {
            mode: partial(lambda mode: open_handles(bench.checkpoint, dtype, hardware, memory=mode).model, mode)
            for mode in ("offload_blocks", "offload_layers")
        }

    def measured(make: Callable[[], Model]) -> Row:
        model = make()
        try:
            return bench.ours(with_compile(model, Compiled()), 2) if compiled else bench.ours(model)
        finally:
            model.weights.release()

    if not compiled:
        table.measure("halves one by one", lambda: bench.ours(bench.first, batched=False))
    for name, make in ways.items():
        table.measure(f"{name} + compile" if compiled else name, partial(measured, make))


def _decode_rows(bench: Bench, table: Table, tiny: bool) -> None:
    """The decode of the whole clip, ours at three budgets and diffusers tiled; seconds of all of it."""
    dtype = bench.first.weights.precision.dtype
    with torch.no_grad():
        vae = build_vae().to(dtype).eval() if tiny else vae_decode.build(str(bench.device), dtype)
        vae, shape = vae.to(bench.device), bench.shape[2:]
        latent = torch.randn(1, 16, *shape, dtype=dtype).to(bench.device)
        works = {f"decode, ours, {name}": partial(vae_decode.ours, vae, latent, most) for name, most in BUDGETS.items()}
        works["decode, diffusers tiled"] = partial(vae_decode.theirs, vae, latent, True)
        for name, work in works.items():
            table.measure(name, partial(_timed, bench.device, work))


def _text_rows(bench: Bench, table: Table, tiny: bool) -> None:
    """T5, both prompts of 226 tokens, one after the other, as a run encodes them."""
    from transformers import T5Config, T5EncoderModel

    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    sizes = dict(d_model=64, d_ff=128, num_layers=2, num_heads=2) if tiny else {}
    full = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128)
    config = T5Config(**full | sizes, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)

    def work() -> Row:
        with torch.no_grad(), bench.device:
            encoder = T5EncoderModel(config).to(dtype).eval()
            ids = torch.ones(1, 226, dtype=torch.long)
            encoder(ids)
            return _timed(bench.device, lambda: [encoder(ids) for _ in range(2)])

    table.measure("T5, both prompts", work)


def _timed(device: torch.device, work: Callable) -> Row:
    held = 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    seconds = time.perf_counter() - start
    del result
    return Row("", seconds, torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None)


def _whole_runs(table: Table) -> None:
    """The seconds of a run of 50 steps: T5, steps and decode."""
    decode, text = table.seconds("decode, ours, 6 GB"), table.seconds("T5, both prompts")
    if decode is None or text is None:
        table.say(f"A run of {RUN} steps: not put together, as decode or T5 were not measured.")
        return
    table.say(f"A run of {RUN} steps, put together: T5 {text:.1f} s, decode in 6 GB {decode:.1f} s, and the steps.")
    table.say("")
    for row in table.rows:
        if row.seconds is not None and row.is_step and ": a" not in row.name:
            table.say(f"- {row.name}: {RUN * row.seconds + decode + text:.0f} s")


if __name__ == "__main__":
    main()
