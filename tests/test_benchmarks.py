"""The table of a card is whole at any moment, and what cannot be measured is told in its place."""

import json
import signal
import time
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import card
from benchmarks.card import TINY, Bench, Row, Table
from benchmarks.length import draw
from benchmarks.step import build
from cogvideox.handles import open_handles, with_compile
from cogvideox.modules import compiled
from cogvideox.modules.compiled import Compiled, missing_compiler
from cogvideox.precision.hardware import Hardware

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    checkpoint = build(tmp_path_factory.mktemp("card") / "random", TINY, CPU)
    model = open_handles(checkpoint, "fp32", Hardware.detect(CPU)).model
    return Bench(checkpoint, CPU, (1, 16, 3, 8, 8), model)


def read(folder):
    return (folder / "card.md").read_text(encoding="utf-8"), json.loads((folder / "card.json").read_text("utf-8"))


def test_a_row_is_written_as_it_is_done_and_one_that_fails_says_why(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() + 100)
    table.measure("diffusers, eager", lambda: Row("", 2.0, roofline=0.5))
    text, found = read(tmp_path)
    assert "| diffusers, eager | 2.000 | 1.00 | - | - | 50% |" in text
    assert found["rows"][0]["seconds"] == 2.0

    def fail():
        raise ValueError("no such kernel\nmore")

    table.measure("broken", fail)
    table.measure("plain", lambda: Row("", 1.6, 3 * 10**9, 1e-6, 0.6))
    table.measure("decode", lambda: Row("", 30.0))
    text, _ = read(tmp_path)
    assert "| broken | did not run: no such kernel | | | | |" in text
    assert "| plain | 1.600 | 1.25 | 3.0 | 1e-06 | 60% |" in text
    assert "| decode | 30.000 | - | - | - | - |" in text
    assert table.seconds("plain") == 1.6
    assert table.seconds("broken") is None


def test_rows_after_the_deadline_do_not_begin(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() - 1)
    table.measure("late", lambda: 1 / 0)
    assert "| late | not reached in the time given |" in read(tmp_path)[0]


def test_a_row_that_is_measured_stands_in_the_table_before_it_is_done(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() + 100)
    begun = []
    table.measure("hangs", lambda: begun.append(read(tmp_path)[0]) or Row("", 1.0))
    assert "| hangs | begun, and not finished |" in begun[0]
    assert "begun" not in read(tmp_path)[0]


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no alarm")
def test_a_row_that_takes_too_long_is_stopped_whatever_catches_errors_in_it(tmp_path):
    def compiling():
        try:
            time.sleep(20)
        except Exception:
            return Row("", 1.0)

    table, before = Table("a card", tmp_path, time.monotonic() + 100, longest=0.1), time.monotonic()
    table.measure("slow", compiling)
    table.measure("plain", lambda: Row("", 2.0))
    assert time.monotonic() - before < 10
    assert [row.seconds for row in table.rows] == [None, 2.0]
    assert "| slow | stopped after 0 s |" in read(tmp_path)[0]
    assert not table.failed


def test_what_an_error_says_does_not_break_the_table(tmp_path):
    table = Table("a card", tmp_path, time.monotonic() + 100)
    table.measure("broken", lambda: open("a | b" + "x" * 400))
    line = read(tmp_path)[0].splitlines()[4]
    assert line.count("|") == 7
    assert len(line) < 250
    assert table.failed == ["broken"]


@pytest.mark.skipif(missing_compiler(CPU) is not None, reason="nothing compiles here")
def test_a_row_that_could_not_be_compiled_has_no_seconds(bench, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "_BACKEND", broken)
    table = Table("a card", tmp_path, time.monotonic() + 100)
    table.measure("compile", lambda: bench.ours(with_compile(bench.first, Compiled())))
    assert "| compile | did not run: Compiling failed" in read(tmp_path)[0]


def test_a_row_that_is_healed_has_no_seconds(bench, tmp_path):
    def overflow(_, __, output):
        output[0][0, 0, 0] = torch.inf

    table = Table("a card", tmp_path, time.monotonic() + 100)
    with bench.first.weights.running() as module:
        hook = module.transformer_blocks[0].register_forward_hook(overflow)
    table.measure("plain", lambda: bench.ours(bench.first))
    hook.remove()
    table.measure("sdpa", lambda: bench.ours(bench.first))
    assert [row.seconds is None for row in table.rows] == [True, False]
    assert "did not run: step 1 of 2: the transformer in fp32 gave NaN or Inf" in table.rows[0].said


def test_what_only_the_first_step_waits_for_is_not_of_a_ways_seconds(bench):
    waits = [2.0]
    with bench.first.weights.running() as module:
        block = module.transformer_blocks[0]
        hook = block.register_forward_pre_hook(lambda *_: time.sleep(waits.pop() if waits else 0))
    row = bench.ours(bench.first)
    hook.remove()
    assert not waits
    assert row.seconds < 2.0


def test_whatever_fails_all_rows_are_there_and_what_is_claimed_comes_first(bench, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("run", "ours", "diffusers", "core"):
        monkeypatch.setattr(bench, name, fail)
    monkeypatch.setattr(card, "build_vae", fail)
    monkeypatch.setattr(card, "_timed", fail)
    # Installed, and built for another PyTorch: it is listed, and refused when it is asked for.
    monkeypatch.setattr(card, "available", lambda _: ("auto", "sdpa", "sage"))
    table = Table("a card", tmp_path, time.monotonic() + 100)
    card._rows(bench, table, Hardware.detect(CPU), tiny=True)
    card._whole_runs(table)
    names = [row.name for row in table.rows]
    assert names[:2] == ["diffusers, eager", "plain"]
    assert names.index("decode, ours, 6 GB") < names.index("attention sdpa") < names.index("int8_dynamic")
    assert {"fp16, range-safe", "T5, both prompts", "halves one by one", "ComfyUI core"} < set(names)
    assert len(names) == len(set(names))
    assert all(row.seconds is None and row.said for row in table.rows)


def test_the_plot_has_a_line_a_side_and_is_readable():
    found = [
        {"tokens": tokens, "seconds": {"diffusers": tokens / 1000, "ours": tokens / 1100}}
        for tokens in (400, 1000, 4000)
    ]
    drawn = ElementTree.fromstring(draw(found))
    lines = [child for child in drawn if child.tag.endswith("polyline")]
    assert len(lines) == 2
    theirs, ours = ([float(point.split(",")[1]) for point in line.get("points").split()] for line in lines)
    # Up is down in an SVG: what takes less is drawn lower.
    assert all(mine > other for mine, other in zip(ours, theirs, strict=True))
    assert theirs == sorted(theirs, reverse=True)
