"""A second copy of the transformer on another device, which evaluates one half of guidance while the first evaluates
the other: the numbers of one device that evaluates them one after the other."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from .dtypes import Precision
from .events import Events
from .modules.sharded import Call
from .modules.speedups import Speedups
from .weights import Weights


class Second:
    """The copy, loaded in a ``with`` block. Where it cannot run, or a step has to be done again, the first device
    evaluates both halves."""

    def __init__(
        self,
        weights: Weights,
        speedups: Speedups,
        prepared: Callable[[nn.Module, Precision, Speedups, torch.device], AbstractContextManager],
        events: Events,
    ):
        """Args:
        weights: the transformer's, on the second device.
        speedups: what the copy is made faster with.
        prepared: a context that it runs in, such as LoRAs applied to it.
        events: told of the loading, and where one device has to do.
        """
        self._weights, self._speedups, self._prepared, self._events = weights, speedups, prepared, events
        self._module: nn.Module | None = None
        self._first: nn.Module | None = None
        self._running = ExitStack()
        self._turn, self._again = (-1, 0), False

    def __enter__(self) -> "Second":
        try:
            with ExitStack() as running:
                module = running.enter_context(self._weights.running(self._events))
                running.enter_context(
                    self._prepared(module, self._weights.precision, self._speedups, self._weights.device)
                )
                self._worker = running.enter_context(ThreadPoolExecutor(1))
                self._module, self._running = module, running.pop_all()
        except torch.OutOfMemoryError:
            self._give_up()
        return self

    def __exit__(self, *error) -> None:
        self._module = None
        self._running.close()

    def begin(self, index: int, guided: bool, window: int = 0) -> None:
        """Note that step ``index`` is about to be run in a window, or run again, guided or not."""
        turn = index, window
        self._again, self._turn = turn <= self._turn, turn
        self._speedups.begin(index, guided, window)

    def evaluate(
        self, calls: Sequence[Call], transformer: nn.Module, restart: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Evaluate prompts, the last of two by the copy.

        Args:
            restart: has the first device begin the step anew.
        """
        self._first = self._first or transformer
        # One that was loaded anew, as the first was not finite or had no room, runs otherwise than the copy.
        if self._module is None or self._again or len(calls) < 2 or transformer is not self._first:
            return [call(transformer) for call in calls]
        other = self._worker.submit(self._run, calls[1], self._module)
        try:
            first = calls[0](transformer)
        finally:
            failed = other.exception()
        if isinstance(failed, torch.OutOfMemoryError):
            self._give_up()
            restart()
            return [call(transformer) for call in calls]
        return [first, other.result()]

    def _run(self, call: Call, module: nn.Module) -> torch.Tensor:
        device = self._weights.device
        # Threads have their own.
        with torch.no_grad(), torch.cuda.device(device if device.type == "cuda" else -1):
            return call(module, device)

    def _give_up(self) -> None:
        device = self._weights.device
        self._events.note(
            f"{device} ran out of memory with the second copy of the transformer, so one device evaluates both halves "
            "of guidance, which takes longer. No finished step is lost. Close other programs that use that card."
        )
        self._module = None
        self._running.close()
        self._running = ExitStack()
        self._weights.release()
        if device.type == "cuda":
            torch.cuda.empty_cache()
