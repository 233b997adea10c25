"""Runs the cases of a fuzz target in forked children, and judges what each did.

A case is one mutated input and what the project is asked to do with it. It may end in three good ways: it works, it is
refused by a sentence of the project's own (``ok``), or it works and an oracle agrees. Everything else is a finding:

``raw``     an exception that is no sentence of the project: another type, or raised by Python or a library and not by a
``raise`` of the project ``hang``    longer than ``HANG`` seconds ``memory``  more than ``MEMORY`` bytes beside what was
there, or an attempt to take more than ``CEILING`` ``crash``   the process died ``silent``  the oracle of the target
objects: it loads, though it should not, or as something else ``forbidden``  a program was started, a file outside the
case's folder was written, a canary was touched, or a real unpickler ran ``unwieldy``  a refusal of more than ``LONG``
letters, or one that cannot be printed (lone surrogates)
"""

import contextlib
import functools
import importlib
import json
import linecache
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

PROJECT = Path(os.environ.get("FUZZ_PROJECT", Path(__file__).parents[2])).resolve()
WORK = Path(os.environ.get("FUZZ_WORK", Path(tempfile.gettempdir()) / "fuzz-work"))
RESULTS = WORK / "results"
HANG, MEMORY, CEILING, LONG = 10, 1_500_000_000, 4 << 30, 4000
#: Cases a child runs before it is replaced, so that what one leaves behind does not reach far.
PER_CHILD = 400
sys.path.insert(0, str(PROJECT))


class Hang(BaseException):
    pass


def targets() -> list[str]:
    """The names of all targets: the files of targets/ that have cases."""
    return sorted(
        path.stem
        for path in (Path(__file__).parent / "targets").glob("*.py")
        if "\ndef case(" in path.read_text(encoding="utf-8")
    )


@functools.cache
def prepare(name: str) -> tuple:
    """The target, and what it has prepared, once for all its cases."""
    import torch

    torch.set_num_threads(1)
    base = WORK / "base"
    for folder in (base, WORK / "canary"):
        folder.mkdir(parents=True, exist_ok=True)
    target = importlib.import_module(f"targets.{name}")
    return target, target.prepare(base)


# --- What must not happen -----------------------------------------------------

_acting, _allowed, _seen = False, [], []
_SPAWNING = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")

_COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cl")


def _audit(event, args):
    if not _acting:
        return
    if event == "subprocess.Popen" and args[0] in _COMPILERS and list(args[1])[1:] == ["--version"]:
        # torch's, when the node Compile asks it whether there is one.
        return
    if event in _SPAWNING:
        _seen.append(f"{event} {str(args)[:150]}")
    elif event == "pickle.find_class":
        _seen.append(f"a real unpickler asked for {args}")
    elif event == "open":
        path, _, flags = args
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, (str, os.PathLike)):
            return
        path = os.path.realpath(path)
        if "/canary/" in path:
            _seen.append(f"the canary was opened: {path}")
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if (
            writes
            and not path.startswith(tuple(_allowed))
            and "__pycache__" not in path
            and not path.startswith(("/dev/", "/proc/"))
        ):
            _seen.append(f"written outside: {path}")
    elif event == "socket.connect" and not str(args[1][0] if isinstance(args[1], tuple) else args[1]).startswith(
        ("127.", "localhost", "::1", "/")
    ):
        _seen.append(f"connected to {args[1]}")


# --- Judging ------------------------------------------------------------------

_SENTENCES = (ValueError, RuntimeError, OSError)
_NOT_SENTENCES = (UnicodeError, json.JSONDecodeError, RecursionError, NotImplementedError)


def _is_project(frame) -> bool:
    return (
        frame.filename.startswith(str(PROJECT)) and "/tests/" not in frame.filename and "/.venv/" not in frame.filename
    )


def judge(error: BaseException) -> dict:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_project(frame)]
    place = (
        f"{Path(own[-1].filename).relative_to(PROJECT)}:{own[-1].lineno} {own[-1].name}"
        if own
        else "outside the project"
    )
    if any(frame.name in ("list_checkpoints", "list_parts", "INPUT_TYPES") for frame in own):
        place += " [while listing: no model can be chosen]"
    said = str(error)
    names = [cls.__name__ for cls in type(error).__mro__]
    raised_here = (
        bool(frames)
        and _is_project(frames[-1])
        and linecache.getline(frames[-1].filename, frames[-1].lineno).strip().startswith("raise")
    )
    found = {
        "type": type(error).__name__,
        "place": place,
        "said": said[:600],
        "tail": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-6:]],
    }
    if isinstance(error, Hang):
        return found | {"kind": "hang"}
    if (
        isinstance(error, MemoryError)
        or "OutOfMemory" in names
        or any(w in said for w in ("not enough memory", "can't allocate memory", "Cannot allocate memory"))
    ):
        return found | {"kind": "memory"}
    friendly = isinstance(error, _SENTENCES) and not isinstance(error, _NOT_SENTENCES) and raised_here
    if not friendly:
        return found | {"kind": "raw"}
    if len(said) < 40:
        return found | {"kind": "raw", "type": found["type"] + " (short)"}
    try:
        said.encode("utf-8")
    except UnicodeEncodeError:
        return found | {"kind": "unwieldy", "type": found["type"] + " (unprintable)"}
    if len(said) > LONG:
        return found | {
            "kind": "unwieldy",
            "type": found["type"] + " (long)",
            "said": f"{len(said)} letters: {said[:300]}",
        }
    return found | {"kind": "ok"}


def _memory() -> tuple[int, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def _run_case(target, state, seed, index, folder: Path) -> dict:
    global _acting
    rng = random.Random(f"{target.NAME}:{seed}:{index}")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    label, act = target.case(state, rng, folder)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resets = True
    except OSError:
        # Not in every container: then only what is still there afterwards is seen.
        resets = False
    before, start = _memory()[0], time.monotonic()
    _seen.clear()
    _allowed[:] = [str(folder.resolve())]
    cwd = os.getcwd()
    os.chdir(folder)
    global _case_start
    _case_start = (time.monotonic(), time.process_time())
    signal.alarm(HANG)
    _acting = True
    try:
        said = act()
        result = (
            {"kind": "silent", "type": "-", "place": str(said).split(":")[0], "said": str(said)[:600]}
            if said
            else {"kind": "works"}
        )
    except (SystemExit, KeyboardInterrupt, Exception, Hang) as error:
        signal.alarm(0)
        result = judge(error)
        error.__traceback__ = None
    finally:
        _acting = False
        signal.alarm(0)
        os.chdir(cwd)
    peak = _memory()[resets] - before
    if peak > MEMORY and result["kind"] != "memory":
        result = {
            "kind": "memory",
            "type": "peak",
            "place": result.get("place", "works"),
            "said": f"{peak / 1e9:.2f} GB more; {result.get('said', 'works')[:300]}",
        }
    canaries = [str(path) for path in (Path(tempfile.gettempdir()) / "FUZZ_PWNED", WORK / "PWNED") if path.exists()]
    if canaries or _seen:
        result = {
            "kind": "forbidden",
            "type": "-",
            "place": (_seen or canaries)[0][:120],
            "said": "; ".join((_seen + canaries)[:5]),
        }
        for path in canaries:
            os.unlink(path)
    return result | {"index": index, "label": label[:300], "seconds": round(time.monotonic() - start, 2)}


_case_start = (0.0, 0.0)


def _alarm(*_):
    """Ten seconds of the processor, or ten of waiting for nothing: others may be using the machine."""
    wall, cpu = time.monotonic() - _case_start[0], time.process_time() - _case_start[1]
    if cpu >= HANG or cpu < 0.02 * wall or wall > 8 * HANG:
        raise Hang(f"{wall:.0f} s, of the processor {cpu:.1f} s")
    signal.alarm(max(HANG // 2, 1))


def _child(target, state, seed, indices, pipe) -> None:
    signal.signal(signal.SIGALRM, _alarm)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + CEILING, -1))
    sys.addaudithook(_audit)
    getattr(target, "in_child", lambda state: None)(state)
    folder = WORK / target.NAME / "case"
    with os.fdopen(pipe, "w") as out:
        for index in indices:
            print(json.dumps({"begin": index}), file=out, flush=True)
            try:
                result = _run_case(target, state, seed, index, folder)
            except BaseException as error:
                result = {
                    "kind": "harness",
                    "type": type(error).__name__,
                    "place": "harness",
                    "said": traceback.format_exc()[-1500:],
                    "index": index,
                    "label": "",
                }
            print(json.dumps(result), file=out, flush=True)


def run(name: str, count: int, seed: int, budget: float, first: int = 0, quiet: bool = True) -> dict:
    """``count`` cases of a target, or fewer where the time is up; the tally and one entry for each kind of finding."""
    target, state = prepare(name)
    tally, findings, started, todo = {}, {}, time.monotonic(), list(range(first, first + count))
    slowest = (0.0, "")

    def note(result):
        nonlocal slowest
        tally[result["kind"]] = tally.get(result["kind"], 0) + 1
        slowest = max(slowest, (result.get("seconds", 0.0), result.get("label", "")))
        if result["kind"] in ("ok", "works"):
            return
        key = "|".join((result["kind"], result["type"], result["place"]))
        entry = findings.setdefault(key, {**result, "count": 0, "labels": []})
        entry["count"] += 1
        if len(entry["labels"]) < 6 and result["label"] not in entry["labels"]:
            entry["labels"].append(result["label"])

    # A case at least, however late it is.
    while todo and (time.monotonic() - started < budget or not tally):
        chunk = todo[:PER_CHILD]
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            if quiet:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            with contextlib.suppress(BaseException):
                _child(target, state, seed, chunk, writer)
            os._exit(0)
        os.close(writer)
        buffer, current, done, killed = b"", None, 0, False
        while True:
            ready, _, _ = select.select([reader], [], [], 12 * HANG)
            if not ready:
                os.kill(pid, signal.SIGKILL)
                killed = True
                break
            piece = os.read(reader, 1 << 16)
            if not piece:
                break
            buffer += piece
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                entry = json.loads(line)
                if "begin" in entry:
                    current = entry["begin"]
                else:
                    note(entry)
                    current, done = None, done + 1
            if time.monotonic() - started > budget and current is None:
                os.kill(pid, signal.SIGKILL)
                break
        os.close(reader)
        status = os.waitpid(pid, 0)[1]
        if current is not None:
            kind = "hang" if killed else "crash"
            why = "in code that no alarm interrupts" if killed else f"status {status} (signal {status & 127})"
            note(
                {
                    "kind": kind,
                    "type": why,
                    "place": "the process",
                    "said": "",
                    "index": current,
                    "label": f"case {current}",
                }
            )
            done += 1
        todo = todo[done:]
        print(f"{name}: {sum(tally.values())} of {count}, {tally}", flush=True)
        if done == 0:
            print(f"{name}: a child ended without a case, status {status}", file=sys.stderr)
            todo = todo[1:]
    result = {
        "target": name, "seed": seed, "tried": sum(tally.values()), "tally": tally, "seconds": round(time.monotonic() - started, 1),
        "slowest": slowest, "findings": sorted(findings.values(), key=lambda entry: (entry["kind"], -entry["count"])),
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.{seed}.json"
    path.write_text(json.dumps(result, indent=1))
    return result


def reproduce(name: str, seed: int, index: int, keep: bool = True) -> None:
    """One case again, in this process, with its traceback; its files stay in the work folder."""
    target, state = prepare(name)
    getattr(target, "in_child", lambda state: None)(state)
    folder = WORK / target.NAME / "repro"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    label, act = target.case(state, random.Random(f"{target.NAME}:{seed}:{index}"), folder)
    print(label)
    os.chdir(folder)
    try:
        print("works:", act())
    except BaseException as error:
        traceback.print_exc()
        print(judge(error)["kind"])
