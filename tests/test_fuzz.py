"""Mutated inputs, the same ones each time: each works, or gets a sentence of the project's own. ``make fuzz`` tries
many more."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import forked

FUZZ = ROOT / "tests" / "fuzz"
pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and Path("/proc/self/status").is_file()), reason="the harness needs fork and /proc"
)

#: One case of each kind: what it does, and the kind that the harness has to call it.
PLANTED = """
import ctypes, os, pathlib, socket, subprocess, time
from cogvideox.choices import check_choice

NAME = "planted"
def prepare(base): return None
def foreign(): {}["a"]
def spins():
    while True: pass
def takes(): return None if bytearray(400_000_000) else None
def dies(): ctypes.string_at(0)
def writes(): pathlib.Path("../outside").write_text("x")
def starts(): subprocess.run(["true"])
def connects():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one: one.connect(("192.0.2.1", 9))
CASES = [
    ("works", lambda: None), ("ok", lambda: check_choice("method", "x", ("a", "b"))),
    ("silent", lambda: "it loads as something else"),
    ("raw", foreign), ("raw", lambda: int("x")),
    ("raw", lambda: exec("raise ValueError('a sentence longer than forty letters, but not our own')")),
    ("unwieldy", lambda: check_choice("\\ud800", "x", ("a", "b"))),
    ("unwieldy", lambda: check_choice("x" * 5000, "x", ("a", "b"))),
    ("hang", spins), ("memory", takes), ("crash", dies),
    ("forbidden", writes), ("forbidden", starts), ("forbidden", connects),
]
def case(state, rng, folder):
    index = int(os.environ.setdefault("PLANTED", "0"))
    os.environ["PLANTED"] = str(index + 1)
    return CASES[index]
"""

HARNESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import core, targets
targets.__path__.append(sys.argv[2])
core.HANG, core.MEMORY, core.PER_CHILD = 1, 300_000_000, 1
import os
for index in range(14):
    os.environ["PLANTED"] = str(index)
    result = core.run("planted", 1, 1, 60, first=index)
    print(json.dumps([index, result["tally"]]), file=sys.stderr)
os.environ["PLANTED"] = "3"
core.reproduce("planted", 1, 3)
"""


def run(act, *arguments, work):
    """Call ``act`` as a script with arguments, in a fork of this process."""

    def working():
        os.environ["FUZZ_WORK"] = str(work)
        act()

    return forked(working, *arguments)


def test_no_mutated_input_gets_past_the_projects_own_sentences(tmp_path):
    script = FUZZ / "run.py"
    done = run(
        lambda: runpy.run_path(str(script), run_name="__main__"),
        *(script, "fuzz", "--count", 5, "--seed", 7, "--within", 45),
        work=tmp_path,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    targets = {file.stem for file in (FUZZ / "targets").glob("*.py") if "def case(" in file.read_text(encoding="utf-8")}
    results = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")]
    assert (
        {result["target"] for result in results}
        == targets
        >= {"downloader", "gguf_file", "lora", "nodes_inputs", "pickles", "workflow"}
    )
    assert all(result["tried"] for result in results)


def test_the_harness_finds_what_is_planted(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    done = run(lambda: exec(HARNESS, {}), "-c", FUZZ, tmp_path, work=tmp_path / "work")
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    wanted = [
        "works",
        "ok",
        "silent",
        "raw",
        "raw",
        "raw",
        "unwieldy",
        "unwieldy",
        "hang",
        "memory",
        "crash",
        "forbidden",
        "forbidden",
        "forbidden",
    ]
    assert found == [[index, {kind: 1}] for index, kind in enumerate(wanted)], done.stderr[-2000:]
    assert "KeyError: 'a'" in done.stderr
    assert done.stdout.splitlines()[-1] == "raw"
    table = subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), "table"],
        cwd=ROOT,
        env={**os.environ, "FUZZ_WORK": str(tmp_path / "work")},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert table[1].startswith("planted.1 | 1 | ")
