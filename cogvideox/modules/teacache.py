"""TeaCache (https://arxiv.org/abs/2411.19108): skip all blocks at steps whose timestep embedding says that little
changes.

The measure depends on the timesteps and the weights of the timestep embedding alone, not on the prompt or the size. So
which steps are skipped is decided before the run (``schedule_skips``), for exactly as many as were asked for, and no
step waits for the device to decide. A skipped step adds what the blocks added in the last full one to its own patch
embeddings, for video and text apart.

Polynomials and times are those of https://github.com/ali-vilab/TeaCache (Apache-2.0), TeaCache4CogVideoX1.5.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..variants import TEACACHE_SECONDS, TEACACHE_SECONDS_I2V
from . import internals
from .internals import LibraryModule


@dataclass(frozen=True)
class Family:
    """What is published for the models of one family, which its fine-tunes share.

    Attributes:
        polynomial: from the relative change of the timestep embedding to that of the output, the highest power first.
        seconds: of a run, by threshold, as ``TEACACHE_SECONDS`` has them; empty where none are published.
    """

    name: str
    polynomial: tuple[float, ...]
    seconds: Mapping[float, int]

    def change(self, distance: float) -> float:
        """Return the change that a relative distance of the embedding stands for.

        The polynomials of 5b and 2b fall below 0 outside the distances they were fitted to: from there the reference
        skips every step. Here their size is taken.
        """
        value = 0.0
        for coefficient in self.polynomial:
            value = value * distance + coefficient
        return abs(value)

    @property
    def text(self) -> str:
        """What was published, a sentence."""
        if not self.seconds:
            return f"For {self.name} its authors publish no times."
        times = ", ".join(f"{seconds} s at {threshold}" for threshold, seconds in self.seconds.items() if threshold)
        return (
            f"Published for {self.name} (one H100, 50 steps, 81 frames of 1360x768): {self.seconds[0]} s without, "
            f"{times}; no measure of quality."
        )


_5B = (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02)
FAMILIES = {
    "1.5": Family(
        "CogVideoX1.5-5B",
        (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
        TEACACHE_SECONDS,
    ),
    "1.5-i2v": Family(
        "CogVideoX1.5-5B-I2V",
        (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
        TEACACHE_SECONDS_I2V,
    ),
    "5b": Family("CogVideoX-5b", _5B, {}),
    "2b": Family("CogVideoX-2b", (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03), {}),
}


def family_of(config: Mapping) -> Family:
    """Return the family of a transformer, from its full config."""
    if config["patch_size_t"] is not None:
        return FAMILIES["1.5" if config["ofs_embed_dim"] is None else "1.5-i2v"]
    return FAMILIES["5b" if config["use_rotary_positional_embeddings"] else "2b"]


@dataclass(frozen=True)
class Schedule:
    """Which steps of a run are skipped.

    Attributes:
        steps: of the run.
        skipped: their indices.
        early, late: the thresholds of the paper's rule before step ``switch`` and from there. They differ only where no
            single threshold skips as many steps as were asked for.
    """

    steps: int
    skipped: frozenset[int]
    early: float
    late: float
    switch: int = 0

    @property
    def text(self) -> str:
        """What is skipped, a clause."""
        early, late = (f"{threshold:.12g}" for threshold in (self.early, self.late))
        threshold = (
            f"the paper's threshold {late}"
            if early == late
            else f"the paper's threshold {early} before step {self.switch + 1} and {late} from there"
        )
        return f"{len(self.skipped)} of {self.steps} steps" + (f", {threshold}" if self.skipped else "")


def schedule_skips(changes: Sequence[float], count: int, allowed: Collection[int]) -> Schedule:
    """Choose ``count`` steps to skip by the paper's rule: the changes since the last full step are added up, and a step
    is skipped while their sum is below a threshold.

    The threshold is the roundest that skips so many. Where none does, as several steps change alike, the run begins
    with the lower of the two nearest: the first steps decide what the video shows.

    Args:
        changes: of each step since the one before, none below 0; the first is not read.
        allowed: the steps that may be skipped, at least ``count`` of them.
    """
    steps = len(changes)

    def skipped(early: float, late: float, switch: int) -> list[int]:
        total, found = 0.0, []
        for index, change in enumerate(changes):
            total += change
            if index in allowed and total < (early if index < switch else late):
                found.append(index)
            else:
                total = 0.0
        return found

    if count == 0:
        return Schedule(steps, frozenset(), 0.0, 0.0)
    # The sums that a threshold can lie above: between two of them it is all one.
    sums = {total for start in range(1, steps) for total in accumulate(changes[start:]) if total > 0}
    bounds = [0.0, *sorted(sums), math.inf]

    def skips(bound: float) -> int:
        return len(skipped(bound, bound, 0))

    low = bisect_left(bounds, count, key=skips)
    high = bisect_right(bounds, count, key=skips) - 1
    if skips(bounds[low]) == count:
        threshold = _roundest(bounds[low - 1], bounds[high])
        return Schedule(steps, frozenset(skipped(threshold, threshold, 0)), threshold, threshold)
    early, late = _roundest(bounds[max(low - 2, 0)], bounds[low - 1]), _roundest(bounds[low - 1], bounds[low])
    # From one switch to the next a single step more, or less, is skipped: none of the counts between is passed over.
    switch = next(switch for switch in range(steps + 1) if len(skipped(early, late, switch)) == count)
    return Schedule(steps, frozenset(skipped(early, late, switch)), early, late, switch)


def _roundest(above: float, most: float) -> float:
    """Return the number over ``above`` and up to ``most`` with the fewest decimals."""
    for decimals in range(12):
        rounded = round((math.floor(above * 10**decimals) + 1) / 10**decimals, decimals)
        if above < rounded <= most:
            return rounded
    return most


class TeaRun:
    """One run's TeaCache: ``attached`` to the transformer, told of each step as it begins, and asked for a report at
    the end.

    A step that is done again, or in another module, or with another guidance than the one before, begins with nothing
    cached, and runs in full.

    Attributes:
        ran, total: block evaluations that ran, and that there would have been, by step and context window.
    """

    def __init__(self, schedule: Schedule):
        """Set up an empty cache."""
        self._schedule = schedule
        self.ran: dict[tuple[int, int], int] = {}
        self.total: dict[tuple[int, int], int] = {}
        self._at, self._guided = (-1, 0), True
        # By window the step it was at last.
        self._last: dict[int, int] = {}
        self._module: LibraryModule = None
        self._forget()

    def _forget(self) -> None:
        # What the blocks added in the last full step: (video, text), one a forward of the step. By window, and that
        # of the one that runs.
        self._added_in: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._added: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._entered: tuple[torch.Tensor, torch.Tensor] | None = None
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        self._branch, self._skips = 0, False

    @property
    def text(self) -> str:
        """How much was skipped, in a sentence."""
        ran, total = sum(self.ran.values()), sum(self.total.values())
        share = (total - ran) / total if total else 0.0
        return (
            f"TeaCache skipped {total - ran:,} of {total:,} block evaluations ({share:.0%}). Planned were "
            f"{self._schedule.text}."
        )

    @contextmanager
    def attached(self, module: LibraryModule, batched: bool) -> Iterator[None]:
        """Have ``module`` run with the cache for the length of a ``with`` block. Afterwards nothing of it is left.

        Args:
            batched: not read: what is kept is kept a forward.
        """
        blocks = list(module.transformer_blocks)
        watching = module.register_forward_pre_hook(self._before_forward)
        # Below all hooks, as diffusers takes some off the modules during the first forward.
        undo = []
        for block in {id(block): block for block in (blocks[0], blocks[-1])}.values():
            forward = partial(self._watch, internals.innermost_forward(block), block is blocks[0], block is blocks[-1])
            undo.append(internals.replace_forward(block, forward))
        self._module = module
        try:
            self._attach()
            yield
        finally:
            before, self._module = self._before, None
            self._forget()
            watching.remove()
            for block, had in before:
                vars(block).pop("forward", None)
                vars(block).update(had)
            for restore in undo:
                restore()

    def begin(self, index: int, guided: bool, window: int = 0) -> None:
        """Note that step ``index`` is about to be run in a window, or run again, guided or not."""
        if guided != self._guided:
            self._added_in.clear()
        if index <= self._last.get(window, -1):
            self._added_in.pop(window, None)
        self._at, self._last[window] = (index, window), index
        self._guided, self._branch = guided, 0
        self.ran[self._at] = self.total[self._at] = 0
        if self._module is None:
            return
        self._attach()
        added = self._added_in.pop(window, [])
        self._skips = bool(self._before and added) and index in self._schedule.skipped
        # Freed before the step makes others.
        self._added = self._added_in[window] = added if self._skips else []

    def _attach(self) -> None:
        """Put what skips above all hooks, so that skipped blocks are not brought to the device; at the next step where
        diffusers is about to take hooks off."""
        if self._before or internals.notes_offload_order(self._module):
            return
        blocks = list(self._module.transformer_blocks)
        self._before = [(block, internals.had(block, ("forward",))) for block in blocks]
        for block in blocks:
            block.forward = partial(self._run, block.forward, block is blocks[0])

    def _before_forward(self, module: LibraryModule, _: Any) -> None:
        count = len(module.transformer_blocks)
        self.total[self._at] += count
        if not self._before:
            self.ran[self._at] += count
        self._branch += 1

    def _run(self, forward, is_first: bool, *args, **kwargs) -> Any:
        """Stand in for the ``forward`` of a block."""
        if not self._skips:
            self.ran[self._at] += 1
            return forward(*args, **kwargs)
        streams = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        if is_first:
            for stream, added in zip(streams, self._added[self._branch - 1], strict=True):
                stream.add_(added)
        return streams

    def _watch(self, forward, is_first: bool, is_last: bool, *args, **kwargs) -> Any:
        """Stand in for the first and last block's own ``forward``: keep what all blocks add."""
        if is_first:
            self._entered = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        left = forward(*args, **kwargs)
        if is_last:
            assert self._entered is not None, "the first block runs before the last"
            video, text = (after - before for after, before in zip(left, self._entered, strict=True))
            self._added.append((video, text))
            self._entered = None
        return left
