"""``run.py fuzz TARGET [--count N] [--seed S] [--budget SECONDS]``, ``run.py repro TARGET SEED INDEX``, ``run.py table``."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import core

KINDS = ("ok", "works", "raw", "unwieldy", "hang", "memory", "crash", "silent", "forbidden", "harness")


def main():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fuzz = commands.add_parser("fuzz")
    fuzz.add_argument("targets", nargs="+", metavar="TARGET[=COUNT]")
    fuzz.add_argument("--count", type=int, default=1000)
    fuzz.add_argument("--first", type=int, default=0)
    fuzz.add_argument("--seed", type=int, default=1)
    fuzz.add_argument("--budget", type=float, default=300)
    fuzz.add_argument("--loud", action="store_true")
    repro = commands.add_parser("repro")
    repro.add_argument("target")
    repro.add_argument("seed", type=int)
    repro.add_argument("index", type=int)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "repro":
        core.reproduce(options.target, options.seed, options.index)
    elif options.command == "fuzz":
        for target in options.targets:
            name, _, count = target.partition("=")
            show(core.run(name, int(count or options.count), options.seed, options.budget, options.first, not options.loud))
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


def show(result):
    print(f"{result['target']}: {result['tried']} in {result['seconds']} s, {result['tally']}; slowest {result['slowest']}")
    for entry in result["findings"]:
        print(f"\n[{entry['kind']}] x{entry['count']} {entry['type']} at {entry['place']}  (case {entry['index']})")
        print(f"    said: {entry.get('said', '')[:400]}")
        print(f"    tail: {entry.get('tail', '')}")
        for label in entry["labels"][:3]:
            print(f"    - {label[:200]}")


if __name__ == "__main__":
    main()
