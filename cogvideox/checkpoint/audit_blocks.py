"""The weights of a part in the order they lie in, read block by block by whoever asks next."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path

import torch

from ..words import short
from .headers import StoredTensor


@dataclass
class Run:
    """Tensors of one dtype that lie one after the other in a file: read as one, however small they are."""

    file: Path
    dtype: torch.dtype
    starts: list[int]
    names: list[str]
    end: int


def runs_of(tensors: Mapping[str, StoredTensor]) -> list[Run]:
    """Join floating-point tensors that lie one behind the other in a file to runs, which are read in one go."""
    places = [
        (stored.file, offset, nbytes, stored.dtype, name)
        for name, stored in tensors.items()
        if stored.dtype.is_floating_point
        for offset, nbytes in stored.ranges
        if nbytes
    ]
    runs: list[Run] = []
    for file, offset, nbytes, dtype, name in sorted(places, key=lambda place: place[:2]):
        if not runs or (runs[-1].file, runs[-1].dtype, runs[-1].end) != (file, dtype, offset):
            runs.append(Run(file, dtype, [], [], offset))
        runs[-1].starts.append(offset)
        runs[-1].names.append(name)
        runs[-1].end = offset + nbytes
    return runs


@dataclass(frozen=True)
class Block:
    """A piece of a run, read at once."""

    run: Run
    offset: int
    nbytes: int

    def pieces(self) -> Iterator[tuple[str, slice]]:
        """The tensors in it: (name, which of the block's values)."""
        size, starts = self.run.dtype.itemsize, self.run.starts
        first, last = bisect_right(starts, self.offset), bisect_right(starts, self.offset + self.nbytes - 1)
        edges = [self.offset, *starts[first:last], self.offset + self.nbytes]
        for index, (begin, end) in enumerate(pairwise(edges), first - 1):
            yield self.run.names[index], slice((begin - self.offset) // size, (end - self.offset) // size)


class Reader:
    """Hands out the blocks to whoever asks next, in order: one file open, one read at a time, as a disk likes it.

    Args:
        nbytes: of a block.
    """

    def __init__(self, runs: list[Run], nbytes: int):
        self._blocks = (
            Block(run, at, min(nbytes, run.end - at)) for run in runs for at in range(run.starts[0], run.end, nbytes)
        )
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._run: Run | None = None
        self._stopped = False

    def fill(self, buffer: memoryview) -> Block | None:
        """Read the next block to the start of ``buffer``; None when there is none, or the scan was stopped."""
        with self._lock:
            block = None if self._stopped else next(self._blocks, None)
            if block is None:
                return None
            file = self._at(block.run)
            done = 0
            while done < block.nbytes:
                count = file.readinto(buffer[done : block.nbytes])
                if not count:
                    raise ValueError(
                        f"{short(block.run.file, 400)} ended while its weights were read: it is truncated or being "
                        "written. Download it again."
                    )
                done += count
            return block

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        with self._lock:
            self._close()

    def _at(self, run: Run) -> FileIO:
        """The file of a run, open where its next block begins."""
        file = self._file
        if file is None or self._run is None or self._run.file != run.file:
            self._close()
            self._file = file = run.file.open("rb", buffering=0)
        if self._run is not run:
            file.seek(run.starts[0])
            self._run = run
        return file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._run = None


class Progress:
    """Counts what all workers did; only the caller's own thread tells of it, as an interface expects it."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None):
        self._total, self._on_progress = total, on_progress
        self._done = self._told = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def add_and_tell(self, count: int) -> None:
        self.add(count)
        self.tell()

    def tell(self) -> None:
        done = self._done
        if self._on_progress is not None and done != self._told:
            self._told = done
            self._on_progress(done, self._total)
