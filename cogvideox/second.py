"""A second copy of the transformer on another device, which evaluates one half of guidance while the first evaluates
the other: the numbers of one device that evaluates them one after the other."""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from .dtypes import Precision
from .events import Events
from .modules.sharded import Call
from .modules.speedups import Speedups
from .out_of_memory import empty_cache, is_out_of_memory
from .weights import Weights


class Second:
    """The copy, loaded in a ``with`` block. Where it cannot run, or a step has to be done again, the first device
    evaluates both halves."""

    def __init__(
        self,
        weights: Weights,
        mode: str,
        speedups: Speedups,
        prepared: Callable[[nn.Module, Precision, Speedups, torch.device], AbstractContextManager],
        events: Events,
    ):
        """Args:
        weights: the transformer's, on the second device.
        mode: one of ``choices.MODES``, as ``memory.choose_mode`` chooses.
        speedups: what the copy is made faster with.
        prepared: a context that it runs in, such as LoRAs applied to it.
        events: told of the loading, and where one device has to do.
        """
        self._weights, self._mode, self._speedups = weights, mode, speedups
        self._prepared, self._events = prepared, events
        self._module: nn.Module | None = None
        # Not kept: one that was not finite makes way for what is loaded in its place.
        self._first: weakref.ref[nn.Module] | None = None
        self._running = ExitStack()
        self._turn, self._again = (-1, 0), False
        # Windows whose last step the first device evaluated alone.
        self._missed = set[int]()

    def __enter__(self) -> "Second":
        try:
            self._start()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if self._module is None:
            # Not in there: the error holds on to what was being made.
            self._give_up()
        return self

    def _start(self) -> None:
        with ExitStack() as running:
            module = running.enter_context(self._weights.running(self._events, self._mode))
            running.enter_context(self._prepared(module, self._weights.precision, self._speedups, self._weights.device))
            self._worker = running.enter_context(ThreadPoolExecutor(1))
            self._module, self._running = module, running.pop_all()

    def __exit__(self, *error) -> None:
        self._module = None
        self._running.close()

    def begin(self, index: int, guided: bool, window: int = 0) -> bool:
        """Note that step ``index`` is about to be run in a window, or run again, guided or not.

        Returns:
            Whether the first device is to forget what it cached: the copy did not run the step before, and both halves
            of guidance have to skip the same steps.
        """
        turn = index, window
        self._again, self._turn = turn <= self._turn, turn
        missed = window in self._missed and not self._again
        self._missed.discard(window)
        self._speedups.begin(index, guided, window, missed)
        return missed

    def evaluate(
        self, calls: Sequence[Call], transformer: nn.Module, restart: Callable[[], None]
    ) -> list[torch.Tensor]:
        """Evaluate prompts, the last of two by the copy.

        Args:
            restart: has the first device begin the step anew.
        """
        self._first = self._first or weakref.ref(transformer)
        # One that was loaded anew, as the first was not finite or had no room, runs otherwise than the copy.
        if self._module is None or len(calls) < 2 or transformer is not self._first():
            return [call(transformer) for call in calls]
        if self._again:
            self._missed.add(self._turn[1])
            return [call(transformer) for call in calls]
        predictions = self._evaluate_both(calls, transformer, self._module)
        if predictions is None:
            # Not in there: the error holds on to what was being made.
            self._give_up()
            restart()
            return [call(transformer) for call in calls]
        return predictions

    def _evaluate_both(
        self, calls: Sequence[Call], transformer: nn.Module, copy: nn.Module
    ) -> list[torch.Tensor] | None:
        """Evaluate both at once; None where the copy ran out of memory."""
        other = self._worker.submit(self._run, calls[1], copy)
        try:
            first = calls[0](transformer)
        finally:
            # Waits for it.
            failed = other.exception()
        return None if is_out_of_memory(failed) else [first, other.result()]

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
        empty_cache(device)
