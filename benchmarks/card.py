"""The whole truth of a card in one call of under 8 minutes: what a step of CogVideoX1.5-5B at 81 frames of 1360x768
takes in every way that it can run, its decode, its text encoder, and the seconds of a run of 50 steps put together.

Random weights of the full size, all 42 layers. Rows are written as they begin and as they are done, as Markdown and
JSON into ``$OUT`` (or ``--out``), so that a cut leaves a table. What is claimed of a card comes first; rows that the
time does not reach say so, as do those that fail, take too long, or would run otherwise than they are called.
``--tiny`` runs the same script on a small model, on a CPU too, in two minutes. The process ends with 1 where a row
failed.

Beside PyTorch with CUDA and a C compiler for Triton it needs accelerate, diffusers, einops, pytest, safetensors,
sentencepiece and transformers, and nothing of the network.

- *seconds*: of a guided step, its forward and the sampler's own work. Each way is timed at its second step: what loads,
  plans or compiles kernels, and notes the order of what is brought to the card, in the first is not in it.
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
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import vae_decode
from benchmarks.step import FULL, NOISE_SEED, AsAsked, build, comfyui, machine, matmul_flops, step_flops, theirs
from cogvideox import memory
from cogvideox.choices import AUTO, FASTEST, OFFLOAD_BLOCKS, OFFLOAD_LAYERS, SAGE
from cogvideox.geometry import latent_frames
from cogvideox.handles import Model, open_handles, quantized, with_attention, with_cache, with_compile
from cogvideox.modules.attention import available
from cogvideox.modules.cache import Cache
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.precision.hardware import Hardware
from cogvideox.sampling import sample
from cogvideox.variants import TEACACHE_SECONDS, full_config
from cogvideox.weights import make_room
from tests.tiny_checkpoint import build_vae

TINY = dict(num_attention_heads=2, num_layers=2, time_embed_dim=64, text_embed_dim=64)
#: Steps of the schedule that TeaCache's rows are of, and of a real run.
SCHEDULE, RUN = 20, 50
NOT_REACHED, BEGUN = "not reached in the time given", "begun, and not finished"
#: Seconds that one row may take, and that the last one may take beyond the time given. A process that does not answer
#: to that is ended so long after.
LONGEST, BEYOND = 150, 20
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


class _TooLong(BaseException):
    """A row took longer than it may. No ``Exception``: a compiler that is interrupted would take it for a failure of
    its own, and go on."""


class Table:
    """The rows so far, written anew with each.

    Attributes:
        failed: the names of those that raised what is no refusal.
    """

    def __init__(self, title: str, folder: Path, deadline: float, longest: float = LONGEST):
        self._title, self._folder, self._deadline, self._longest = title, folder, deadline, longest
        self.rows: list[Row] = []
        self.lines: list[str] = []
        self.failed: list[str] = []
        self.write()

    def seconds(self, name: str) -> float | None:
        """Return what a row took; None where it was not measured."""
        return next((row.seconds for row in self.rows if row.name == name), None)

    def measure(self, name: str, work: Callable[[], Row]) -> None:
        """Add a row; what it raises, and that it took too long or there is no time for it, is told in its place."""
        left = self._deadline - time.monotonic()
        if left < 0:
            self.add(Row(name, said=NOT_REACHED))
            return
        self.rows.append(Row(name, said=BEGUN))
        self.write()
        most = min(self._longest, left + BEYOND)
        try:
            with _at_most(most):
                row = work()
            row.name = name
        except _TooLong:
            row = Row(name, said=f"stopped after {most:.0f} s")
        # Whatever one way of running raises, the others have their rows.
        except Exception as error:
            row = Row(name, said=f"did not run: {[*str(error).splitlines(), type(error).__name__][0]}")
            if not isinstance(error, ValueError):
                self.failed.append(name)
        gc.collect()
        if torch.cuda.is_available():
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:
                # An error of the device comes back whatever is asked of it.
                print(f"    {error}", file=sys.stderr)
        self.rows.pop()
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
            said = row.said.replace("|", "/")
            return f"| {row.name} | {said if len(said) <= 200 else said[:199] + '…'} | | | | |"
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


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise ``_TooLong`` in what takes longer, once it is in Python; where the system has no such alarm, never."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: one that comes in a finalizer is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Ends(AsAsked):
    """When each step ended, and what the first one predicted."""

    def __init__(self, device: torch.device, model: Model, shape: tuple[int, ...]):
        super().__init__(model, shape)
        self._device = device
        self.ends: list[float] = []
        self.clean: torch.Tensor | None = None

    def step(self, done: int, total: int, clean: torch.Tensor) -> None:
        _wait(self._device)
        self.ends.append(time.perf_counter())
        if self.clean is None:
            self.clean = clean.float().cpu()


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
        ends, peak, others = _Ends(self.device, model, self.shape), None, 0
        if self.device.type == "cuda":
            # What other rows left there is not of this one's peak.
            make_room(self.device, model.weights)
            others = torch.cuda.memory_allocated(self.device) - model.weights.resident
            torch.cuda.reset_peak_memory_stats(self.device)
        with _halves(batched), _first_forward(began, self.device):
            sample(
                *(model, *self.prompts, torch.zeros(self.shape)),
                **dict(seed=NOISE_SEED, steps=steps, on_nan="stop", events=ends) | settings,
            )
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - others - model.weights.resident
        times = [began[0], *ends.ends]
        return [after - before for before, after in pairwise(times)], ends, peak

    def ours(self, model: Model, batched: bool = True) -> Row:
        """Measure a way of running by its second step."""
        taken, ends, peak = self.run(model, 2, batched)
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
        cuda, held, peak = self.device.type == "cuda", 0, None

        def on_step() -> None:
            nonlocal held
            _wait(self.device)
            ends.append(time.perf_counter())
            if cuda and len(ends) == 1:
                held = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)

        run = theirs(self.checkpoint, self.first, self.device, self.prompts, self.shape, 2)
        run(on_step)
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device) - held
        seconds = ends[1] - ends[0]
        return Row("", seconds, peak, None, self.share(seconds, self.first.weights.precision.dtype))

    def core(self) -> Row:
        """Measure ComfyUI's own model, where there is a checkout."""
        make_room(self.device)
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
    minutes = (1.5 if options.tiny else 7) if options.minutes is None else options.minutes
    # Whatever it hangs in, what is written stays.
    faulthandler.dump_traceback_later(60 * minutes + 2 * BEYOND, exit=True)
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
        title = (
            f"{machine(device)}: {bench.config['num_layers']} layers x {bench.config['num_attention_heads']} heads, "
            f"{frames} frames of {width}x{height}, {first.weights.precision.name}"
        )
        table = Table(title, options.out, started + 60 * minutes)
        print(f"# {title}", flush=True)
        _rows(bench, table, hardware, options.tiny)
        _whole_runs(table)
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    faulthandler.cancel_dump_traceback_later()
    sys.exit(1 if table.failed else 0)


def _rows(bench: Bench, table: Table, hardware: Hardware, tiny: bool) -> None:
    """Measure all, what was claimed of a card first: a step as it is, compiled, with TeaCache, and in fp16, the decode
    in 6 GB, and T5."""

    def opened(*how: str, memory: str = AUTO) -> Callable[[], Model]:
        return lambda: open_handles(bench.checkpoint, how[0], hardware, *how[1:], memory=memory).model

    halves = {"fp16, range-safe": opened("fp16"), "fp16, plain": opened("fp16", "warn")}
    eight = {method: partial(quantized, bench.first, method) for method in ("fp8_dynamic", "int8_dynamic")}
    table.measure("diffusers, eager", bench.diffusers)
    table.measure("plain", lambda: bench.ours(bench.first))
    missing = missing_compiler(bench.device)
    best, compiled = (FASTEST, False), [(FASTEST, True), (AUTO, True)] if missing is None else []
    if missing is not None:
        table.add(Row("compile", said=f"not measured: {missing}"))
    while compiled and best == (FASTEST, False):
        # Where one kernel cannot be compiled, another may be; what takes too long does so with both.
        way, name = compiled[0], _name(*compiled.pop(0))
        _way_row(bench, table, *way)
        best = best if table.seconds(name) is None else way
        compiled = compiled if best == way or name in table.failed else []
    _teacache_rows(bench, table, *best)
    _made_rows(bench, table, halves)
    decodes = _decodes(bench, tiny)
    for name in ("decode, ours, 6 GB", "decode, diffusers tiled"):
        table.measure(name, decodes.pop(name))
    _text_rows(bench, table, tiny)
    if SAGE in available(bench.device):
        _teacache_rows(bench, table, SAGE, best[1])
    for way in compiled:
        _way_row(bench, table, *way)
    for choice in available(bench.device):
        # Those of the hub download code.
        if choice != AUTO and not choice.endswith("_hub"):
            _way_row(bench, table, choice, False)
    if best[1]:
        _made_rows(bench, table, eight | halves, compiled=True)
    _made_rows(bench, table, eight)
    table.measure("halves one by one", lambda: bench.ours(bench.first, batched=False))
    if bench.device.type == "cuda":
        dtype = bench.first.weights.precision.name
        _made_rows(bench, table, {mode: opened(dtype, memory=mode) for mode in (OFFLOAD_BLOCKS, OFFLOAD_LAYERS)})
    for name, work in decodes.items():
        table.measure(name, work)
    table.measure("ComfyUI core", bench.core)


def _name(attention: str, compiled: bool) -> str:
    if not compiled:
        return f"attention {attention}"
    return "compile" if attention == AUTO else f"compile + {attention}"


def _way(bench: Bench, attention: str, compiled: bool) -> Model:
    model = with_attention(bench.first, attention)
    return with_compile(model, Compiled()) if compiled else model


def _way_row(bench: Bench, table: Table, attention: str, compiled: bool) -> None:
    table.measure(_name(attention, compiled), lambda: bench.ours(_way(bench, attention, compiled)))


def _teacache_rows(bench: Bench, table: Table, attention: str, compiled: bool) -> None:
    """Time a full, a skipped and an unguided step, and put the thresholds' schedules together from them."""
    name = _name(attention, compiled)
    taken: dict[str, float] = {}

    def steps() -> Row:
        # Full, skipped, skipped, full: the last one is compiled already.
        cached = with_cache(_way(bench, attention, compiled), Cache("teacache", 0.5, 0.0, 1.0))
        (_, _, taken["skipped"], taken["full"]), _, peak = bench.run(cached, 4)
        return Row("", taken["skipped"], peak)

    def unguided() -> Row:
        *_, taken["unguided"] = bench.run(_way(bench, attention, compiled), 2, cfg=1.0)[0]
        return Row("", taken["unguided"])

    table.measure(f"{name}: a step that TeaCache skips", steps)
    table.measure(f"{name}: an unguided step", unguided)
    for threshold, seconds in list(TEACACHE_SECONDS.items())[1:]:
        skipped = round(SCHEDULE * (1 - seconds / TEACACHE_SECONDS[0]))
        mean = fewer = None
        if "full" in taken:
            mean = (skipped * taken["skipped"] + (SCHEDULE - skipped) * taken["full"]) / SCHEDULE
        if mean is not None and "unguided" in taken:
            # Of the full steps as many are unguided as of all.
            fewer = mean - (SCHEDULE - skipped) / SCHEDULE * 0.2 * (taken["full"] - taken["unguided"])
        found = {f"{name} + teacache {threshold} ({skipped} of {SCHEDULE} skipped)": mean}
        if threshold == 0.2:
            found[f"{name} + teacache 0.2 + cfg_end 0.8"] = fewer
        for together, seconds_of in found.items():
            table.add(Row(together, seconds_of, said="not put together, as a step of it was not measured"))


def _made_rows(bench: Bench, table: Table, ways: Mapping[str, Callable[[], Model]], compiled: bool = False) -> None:
    """Measure models with weights of their own, which are freed after their row; each as it is, or compiled."""

    def measured(make: Callable[[], Model]) -> Row:
        model = make()
        try:
            return bench.ours(with_compile(model, Compiled()) if compiled else model)
        finally:
            model.weights.release()

    for name, make in ways.items():
        table.measure(f"{name} + compile" if compiled else name, partial(measured, make))


def _decodes(bench: Bench, tiny: bool) -> dict[str, Callable[[], Row]]:
    """Return what measures the decode of the whole clip, ours at three budgets and diffusers tiled: seconds of all of
    it."""
    dtype = bench.first.weights.precision.dtype

    @cache
    def parts() -> tuple[torch.nn.Module, torch.Tensor]:
        vae = build_vae().to(dtype).eval() if tiny else vae_decode.build(str(bench.device), dtype)
        latent = torch.randn(1, 16, *bench.shape[2:], dtype=dtype).to(bench.device)
        vae = vae.to(bench.device)
        # Loading a card's libraries is not of the first one's time.
        for work in works.values() if bench.device.type == "cuda" else ():
            work(vae, latent[:, :, :3, :8, :8])
        return vae, latent

    def measured(work: Callable) -> Row:
        with torch.no_grad():
            return _timed(bench.device, partial(work, *parts()))

    works = {f"decode, ours, {name}": partial(vae_decode.ours, budget=most) for name, most in BUDGETS.items()}
    works["decode, diffusers tiled"] = partial(vae_decode.theirs, tiled=True)
    return {name: partial(measured, work) for name, work in works.items()}


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
