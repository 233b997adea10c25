"""Make many videos of one file: ``generate.py --prompts FILE``.

A ``.txt`` holds a prompt a line, a ``.jsonl`` an object a line with any option of a video by its name, a ``.csv`` a
table whose first row has those names. All lines are checked before anything is made; the text encoder then runs once
for all of them, and the transformer stays where it is from one video to the next.
"""

import argparse
import csv
import difflib
import io
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox.files import parse_json, read_text
from cogvideox.words import listed, reason, short
from commands.terminal import say, told
from commands.video import Work

#: Options of the program that no line sets for itself.
_OF_ALL = (
    *("prompts", "dry_run", "split", "debug", "plan", "decode", "device", "overwrite"),
    *("check", "scan", "fix", "json", "download", "convert", "migrate"),
    *("upscale", "scale", "kind", "references", "reference_frames", "reference_guidance", "empty_prompt"),
)
#: Options by their second name.
_ALSO = {"start_image": "image"}
#: How a table says yes and no.
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")
#: Lines that are made of one file at most: a typo in a name is a book.
_MOST = 100_000


@dataclass(frozen=True)
class Line:
    """A line of the file: its number, from 1, and what it sets, by the options' names."""

    number: int
    words: Mapping[str, Any]


def read_lines(path: Path) -> list[Line]:
    """Read the lines of a ``.txt``, ``.jsonl`` or ``.csv``; empty ones are left out.

    Raises:
        ValueError: for another ending, a file that cannot be read, or with each line that is not what it should be.
    """
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _table_lines}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"--prompts is {short(path, 400)}, and its ending says nothing of what a line is. Give a .txt with a "
            "prompt a line, a .jsonl or a .csv with options by name."
        )
    text = read_text(path, by_hand=True)
    lines = list(readers[path.suffix.lower()](text))
    if not lines:
        raise ValueError(f"{short(path, 400)} holds no prompt, so there is nothing to make. Write one a line.")
    if len(lines) > _MOST:
        raise ValueError(
            f"{short(path, 400)} has {len(lines):,} lines with prompts, and at most {_MOST:,} are read of one file. "
            "Is it the right one? Split it otherwise."
        )
    return lines


def _text_lines(text: str) -> Iterator[Line]:
    # Not splitlines: what Word and web pages break lines with within a paragraph ends no prompt.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            # A prompt as it stands, an @ in front too.
            prompt = line.strip()
            yield Line(number, {"prompt": f"@{prompt}" if prompt.startswith("@") else prompt})


def _json_lines(text: str) -> Iterator[Line]:
    # Not splitlines: in JSON other signs than these do not end a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            words = parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"Line {number} is no JSON ({reason(error)}), and a .jsonl has an object a line, such as "
                '{"prompt": "A panda.", "seed": 1}. Correct it.'
            ) from error
        if not isinstance(words, dict):
            raise ValueError(
                f"Line {number} holds no JSON object but a {type(words).__name__}; options are given by name, such as "
                '{"prompt": "A panda.", "seed": 1}. Correct it.'
            )
        yield Line(number, {name: value for name, value in words.items() if value is not None})


def _table_lines(text: str) -> Iterator[Line]:
    # Where a comma is in numbers, Excel puts semicolons between cells; names of options have neither.
    first = text.lstrip().partition("\n")[0]
    between = next((sign for sign in ",;\t" if sign in first), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"Line {number} is no row of a table ({reason(error)}): a cell with quotes or {short(repr(between))} "
                'stands in quotes, and a quote in it is written "". Correct it.'
            ) from error
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            header = cells
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled or "" in header:
                raise ValueError(
                    f"The first row names the columns, and has names that are empty or twice there "
                    f"({listed(header, 20)}). Give each column the name of one option, such as prompt, seed."
                )
            continue
        if len(cells) > len(header):
            raise ValueError(
                f"Line {number} has {len(cells)} cells, and the first row names {len(header)} columns. Put a cell that "
                f"holds {short(repr(between))}, which stands between cells here, in quotes."
            )
        yield Line(number, {name: cell for name, cell in zip(header, cells, strict=False) if cell})


def options_by_line(
    lines: Sequence[Line],
    options: argparse.Namespace,
    parse: Callable[[list[str], argparse.Namespace], argparse.Namespace],
    folder: Path,
) -> dict[int, argparse.Namespace]:
    """Return the options of all lines by their numbers; the arguments are those of ``options_of``.

    Raises:
        ValueError: with the sentences of all lines that cannot be read.
    """
    found, wrong = dict[int, argparse.Namespace](), list[str]()
    for line in lines:
        try:
            found[line.number] = options_of(line, options, parse, folder)
        except ValueError as error:
            wrong.append(of_line(line.number, str(error)))
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(lines)} lines cannot be read, so nothing was begun. Correct them:\n{_first(wrong)}"
        )
    return found


def options_of(
    line: Line,
    options: argparse.Namespace,
    parse: Callable[[list[str], argparse.Namespace], argparse.Namespace],
    folder: Path,
) -> argparse.Namespace:
    """Return the options of one line: those of the program, and over them the line's own.

    Args:
        parse: reads words of a command line into options, and raises ValueError for what they may not be.
        folder: where videos go: a line's ``output`` is a name in it, ``00003.mp4`` by default.

    Raises:
        ValueError: for a name that is no option of a video, or a value that it cannot have.
    """
    found, words, named = copy(options), list[str](), set[str]()
    known = [name for name in vars(options) if name not in _OF_ALL and not name.startswith("_")]
    for given, value in line.words.items():
        name = given.removeprefix("--").replace("-", "_")
        name = _ALSO.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or ["prompt"]
            raise ValueError(
                f"{short(repr(given))} is no option of a single video; {near[0]} is one. Give options by the names of "
                "generate.py --help."
            )
        named.add(name)
        words += _as_words(found, name, value)
    found = parse(words, found)
    if "-" in (found.prompt, found.negative):
        raise ValueError("A prompt is -, which is the standard input, and lines hold their own. Write its words there.")
    found.output = folder / (found.output if "output" in named else f"{line.number:05}.mp4")
    return found


def _as_words(options: argparse.Namespace, name: str, value: Any) -> list[str]:
    """Write what a line sets as words of a command line; a switch that is off is set in ``options`` at once."""
    option = f"--{name.replace('_', '-')}"
    before = getattr(options, name)
    answer = str(value).lower()
    if isinstance(before, bool) or (name == "compile" and answer in (*_YES, *_NO)):
        if answer not in (*_YES, *_NO):
            raise ValueError(f"{name} is {short(repr(value))}, and it is a switch: give true or false.")
        setattr(options, name, False if isinstance(before, bool) else None)
        return [option] if answer in _YES else []
    if isinstance(value, dict | bool):
        raise ValueError(f"{name} is {short(repr(value))}, which is no value of this option. Give a text or a number.")
    if name == "lora":
        options.lora = []
        return [f"{option}={one}" for one in (value if isinstance(value, list) else [value])]
    if name in ("cfg_range", "cache_range"):
        return [option, *(str(one) for one in (value if isinstance(value, list) else str(value).split()))]
    if isinstance(value, list):
        raise ValueError(f"{name} is a list, and takes one value. Give one, or write several lines.")
    return [f"{option}={value}"]


@dataclass
class Many:
    """The videos of one file.

    Attributes:
        lines: their options by line number.
        shared: which of the lines this process makes, of those that are not there: all of them, unless several
            processes share them.
    """

    lines: Mapping[int, argparse.Namespace]
    work: Work
    shared: Callable[[Sequence[int]], Sequence[int]] = list
    existing: Callable[[Sequence[int]], Sequence[int]] = list
    _failed: dict[int, str] = field(default_factory=dict)
    _made: list[int] = field(default_factory=list)

    def checked(self) -> tuple[list[int], list[int]]:
        """Check every line that is to be made.

        Returns:
            The lines whose videos are there already, and those that are to be made.

        Raises:
            ValueError: with the sentences of all lines that cannot be made.
        """
        there = self.existing(
            [number for number, line in self.lines.items() if os.path.isfile(line.output) and not line.overwrite]
        )
        wrong, taken = list[str](), dict[Path, int]()
        pending = [number for number in self.lines if number not in there]
        for number, options in self.lines.items():
            path = Path(os.path.abspath(options.output))
            if path in taken:
                wrong.append(
                    of_line(number, f"Its output is {short(path, 400)}, as that of line {taken[path]}. Name another.")
                )
            taken.setdefault(path, number)
        for number in pending:
            try:
                self.work.prepared(self.lines[number])
            except (ValueError, RuntimeError, OSError) as error:
                wrong.append(of_line(number, told(error)))
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(self.lines)} lines cannot be made, so nothing was begun. Correct them:\n"
                f"{_first(wrong)}"
            )
        return list(there), pending

    def list(self) -> int:
        """Say for each line what would be made, and where."""
        there, pending = self.checked()
        for number, options in self.lines.items():
            if number in there:
                say(of_line(number, f"{options.output} is there already."))
            else:
                size = self.work.prepared(options).size
                what = f"{options.output}, {size}, seed {options.seed}: {short(options.prompt)}"
                say(of_line(number, what))
        say(f"{len(pending)} videos to make, {len(there)} there already; nothing was made (--dry-run).")
        return 0

    def run(self) -> tuple[int, int, dict[int, str]]:
        """Make all that is not there; what fails does not stop the others.

        Returns:
            How many were there already, how many were made here, and by its line what failed.
        """
        there, pending = self.checked()
        mine = self.shared(pending)
        prompts = self._encoded(mine)
        waiting: list[tuple[int, Any, Any]] = []
        try:
            for count, number in enumerate(mine, 1):
                if number in self._failed:
                    continue
                say(f"line {number} ({count} of {len(mine)}): {self.lines[number].output}")
                with self._failures(number):
                    job = self.work.agreed(self.lines[number])
                    latent = self.work.sampled(job, prompts[number])
                    if self.work.decodes_later(job):
                        waiting.append((number, job, latent))
                        continue
                    self.work.finished(job, latent)
                    self._made.append(number)
            while waiting:
                number, job, latent = waiting[0]
                with self._failures(number):
                    self.work.finished(job, latent)
                    self._made.append(number)
                waiting.pop(0)
        except BaseException:
            for _, job, latent in waiting:
                say(self.work.kept(job, latent))
            say(summary(len(there), len(self._made), self._failed))
            raise
        return len(there), len(self._made), self._failed

    def _encoded(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Encode the prompts of all lines, each text once, and free the text encoders."""
        known: dict[Hashable, Any] = {}
        found: dict[int, dict[str, Any]] = {}
        encoders: dict[int, Any] = {}
        for number in numbers:
            with self._failures(number):
                job = self.work.agreed(self.lines[number])
                weights = job.text_encoder.weights
                encoders[id(weights)] = weights
                for name in job.read:
                    key = id(weights), job.texts[name]
                    if key not in known:
                        known[key] = self.work.encoded(job, name)
                    found.setdefault(number, {})[name] = known[key]
        for weights in encoders.values():
            weights.release()
        return found

    @contextmanager
    def _failures(self, number: int) -> Iterator[None]:
        """Note what a line fails of in a ``with`` block, and have the others go on; what ends all goes through."""
        try:
            yield
        # Of any type, as in ``generate.main``: one line is not to take the others with it.
        except Exception as error:
            if isinstance(error, self.work.ends_all):
                raise
            self._failed[number] = told(error)
            say(of_line(number, self._failed[number]))


def summary(there: int, made: int, failed: Mapping[int, str]) -> str:
    """Say what became of all lines."""
    counts = f"{made} videos made, {there} there already, {len(failed)} failed."
    return "\n".join([counts, *(of_line(number, failed[number]) for number in sorted(failed))])


def of_line(number: int, said: str) -> str:
    """Say which line a sentence is about."""
    return f"line {number}: {said}"


def _first(wrong: Sequence[str]) -> str:
    """Show the first of many sentences, a line each."""
    return "\n".join([*wrong[:20], *(["…"] if len(wrong) > 20 else [])])
