"""``run.py fuzz [TARGET[=COUNT] …] [--count N] [--seed S …] [--budget SECONDS]``, ``run.py repro TARGET SEED INDEX``,
``run.py table``."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import core

KINDS = ("ok", "works", "raw", "unwieldy", "hang", "memory", "crash", "silent", "forbidden", "harness")


def main():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fuzz = commands.add_parser("fuzz", help="try mutated inputs; ends with status 1 if there are findings")
    fuzz.add_argument(
        "targets", nargs="*", metavar="TARGET[=COUNT]", help=f"by default all: {', '.join(core.targets())}"
    )
    fuzz.add_argument("--count", type=int, default=1000, help="inputs for each target and seed")
    fuzz.add_argument("--total", type=int, help="inputs in all, instead of --count")
    fuzz.add_argument("--first", type=int, default=0, help="index of the first")
    fuzz.add_argument("--seed", type=int, nargs="+", default=[1])
    fuzz.add_argument("--budget", type=float, default=300, help="seconds for each target and seed")
    fuzz.add_argument("--within", type=float, help="seconds in all, shared among what is to be done")
    fuzz.add_argument("--loud", action="store_true", help="show what the children print")
    repro = commands.add_parser("repro")
    repro.add_argument("target")
    repro.add_argument("seed", type=int)
    repro.add_argument("index", type=int)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "repro":
        core.reproduce(options.target, options.seed, options.index)
    elif options.command == "fuzz":
        sys.exit(fuzz_all(options))
    else:
        print(" | ".join(("target", "tried", *KINDS, "seconds")))
        total = {}
        for path in sorted(core.RESULTS.glob("*.json")):
            result = json.loads(path.read_text())
            row = [result["tally"].get(kind, 0) for kind in KINDS]
            print(" | ".join(map(str, (path.stem, result["tried"], *row, result["seconds"]))))
            for kind, count in zip(("tried", *KINDS), (result["tried"], *row), strict=False):
                total[kind] = total.get(kind, 0) + count
        print(total)


def fuzz_all(options) -> int:
    """What is asked for, target by target: the exit status, 1 if anything was found."""
    begun = time.monotonic()
    todo = [
        (*target.partition("=")[::2], seed) for seed in options.seed for target in options.targets or core.targets()
    ]
    count = options.count if options.total is None else math.ceil(options.total / len(todo))
    for name in dict.fromkeys(name for name, *_ in todo):
        core.prepare(name)
    found = 0
    for number, (name, wanted, seed) in enumerate(todo):
        budget = options.budget
        if options.within is not None:
            budget = min(budget, (options.within - (time.monotonic() - begun)) / (len(todo) - number))
        result = core.run(name, int(wanted or count), seed, budget, options.first, not options.loud)
        show(result)
        found += len(result["findings"])
    return int(found > 0)


def show(result):
    print(
        f"{result['target']}: {result['tried']} in {result['seconds']} s, {result['tally']}; slowest "
        f"{result['slowest']}"
    )
    for entry in result["findings"]:
        print(f"\n[{entry['kind']}] x{entry['count']} {entry['type']} at {entry['place']}  (case {entry['index']})")
        print(f"    said: {entry.get('said', '')[:400]}")
        print(f"    tail: {entry.get('tail', '')}")
        for label in entry["labels"][:3]:
            print(f"    - {label[:200]}")


if __name__ == "__main__":
    main()
