"""Attach all that makes one run faster to the transformer, together."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata

import torch
from torch import nn

from ..combinations import loses_layers
from ..dtypes import Precision
from .attention import attends_in_pieces, attention_attached
from .cache import Cache, CacheRun
from .compiled import Compiled, CompileRun, offloads_layers
from .fastest import Shape
from .joint import projection_attached, room_attached
from .teacache import Schedule, TeaRun


class Speedups:
    """What one run of a model is made faster with: what the handle says, and what is always done.

    Attributes:
        shortcuts: what a step that is done again runs without, in words; "" where there is no such thing.
    """

    def __init__(
        self,
        attention: str,
        cache: Cache | None,
        compiled: Compiled | None,
        device: torch.device,
        timesteps: Sequence[float],
        shape: Shape,
        tell: Callable[[str, int], None],
        skips: Schedule | None = None,
    ):
        """Set them up.

        Args:
            attention: one of ``choices.BACKENDS``.
            device: where the model runs.
            timesteps: of all steps of the run.
            shape: of queries, keys and values for one half of guidance.
            tell: called with sentences for the user, and logging's level of each.
            skips: the steps that TeaCache skips, where that is the cache.
        """
        self._device = device
        self._tell, self._attention, self._shape = tell, attention, shape
        self._cache: CacheRun | TeaRun | None = None
        if skips is not None:
            self._cache = TeaRun(skips)
        elif cache is not None:
            self._cache = CacheRun(cache, timesteps)
        #: The method of a cache that does not go with layers brought to the device one by one.
        self._loses_layers = cache.method if cache and cache.strength > 0 and loses_layers(cache.method) else None
        self._compiled = None if compiled is None else CompileRun(compiled, device, tell)
        named = (("the cache", self._cache), ("compiled code", self._compiled))
        self.shortcuts = " and ".join(name for name, there in named if there is not None)

    @contextmanager
    def attached(self, module: nn.Module, batched: bool, precision: Precision) -> Iterator[None]:
        """Have ``module`` run with them for the length of a ``with`` block. Afterwards nothing of them is left on it.

        Args:
            batched: whether both halves of guidance run as one batch, the unconditional first.
            precision: what the module runs in.
        """
        shape = replace(self._shape, batch=self._shape.batch * (2 if batched else 1))
        dtype = torch.float16 if precision.range_safe else precision.dtype
        with ExitStack() as stack:
            stack.enter_context(attention_attached(self._attention, module, shape, dtype, self._device, self._tell))
            stack.enter_context(projection_attached(module))
            # What is compiled lies below what may skip it.
            if self._compiled is not None and attends_in_pieces(module):
                self._tell(
                    "The model runs without compiling: this device has no kernel for attention that goes without its "
                    "scores, so a piece of them is computed at a time, which no compiler takes.",
                    logging.WARNING,
                )
            elif self._compiled is not None:
                stack.enter_context(self._compiled.attached(module))
            elif self._device.type == "cpu":
                stack.enter_context(room_attached(module))
            if self._loses_layers is not None and offloads_layers(module):
                # Refused where it was asked for: this is what memory auto came to.
                self._tell(
                    f"The model runs without the cache {self._loses_layers}: its layers are brought to the card one by "
                    f"one, and diffusers {metadata.version('diffusers')} does not bring those again that were "
                    "skipped. Install diffusers 0.37 or newer.",
                    logging.WARNING,
                )
            elif self._cache is not None:
                stack.enter_context(self._cache.attached(module, batched))
            yield

    def begin(self, index: int, guided: bool, window: int = 0, anew: bool = False) -> None:
        """Note that step ``index`` is about to be run in a window, or run again, guided or not; ``anew`` where nothing
        that was cached is to be reused."""
        if self._compiled is not None:
            self._compiled.begin(index)
        if self._cache is not None:
            # Of a step that is run again, caches forget what they had.
            for _ in range(2 if anew else 1):
                self._cache.begin(index, guided, window)

    def report(self) -> None:
        """Tell at the end of the run what they did."""
        if self._cache is not None:
            self._tell(self._cache.text, logging.INFO)
