"""The sentinel: no result that is not finite gets past it, and no finished work is lost to one.

What a model makes is checked as it is made (one reduction and one synchronisation with the device). A result that holds
NaN or Inf is made again with a probe at every module, which names the first one whose output is not finite. Then the
part goes on from there in the next safer precision: range-safe fp16, bf16 where native, fp32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .choices import ON_NAN, STOP, check_choice
from .dtypes import Precision, dtype_name
from .events import Events
from .finite import is_finite
from .modules.sharded import Team
from .out_of_memory import empty_cache, is_out_of_memory
from .precision.policy import safer
from .variants import PARTS
from .weights import Placement, Weights
from .words import setting, size_text

Result = TypeVar("Result", torch.Tensor, tuple)


class OutOfMemory(RuntimeError):
    """Memory ran out even in the mode that takes the least, or there is no other.

    Attributes:
        latents: what was finished, ``[B, 16, T, H/8, W/8]``, unscaled, where there is such a thing.
    """

    latents: torch.Tensor | None = None


class NonFiniteError(RuntimeError):
    """A result was not finite and could not be, or was not to be, healed. The message says where, why and what to
    do."""


@dataclass(frozen=True)
class Culprit:
    """The first module whose output was not finite.

    Attributes:
        module: its path in the model (``transformer_blocks.3.ff.net.2``), "" for the model itself.
        kind: its class.
        dtype: what its output was computed in.
        largest: the largest finite magnitude that went into it.
        input_finite: whether what went in was finite; if not, the sum or product just before it was the first to fail.
        weights: ``finite``, ``damaged`` (they hold NaN or Inf) or ``overflown`` (cast to fp16, some became Inf).
    """

    module: str
    kind: str
    dtype: torch.dtype
    largest: float
    input_finite: bool
    weights: str

    @property
    def text(self) -> str:
        name = f"{self.module or 'the model'} ({self.kind})"
        if self.weights == "damaged":
            return f"the weights of {name} themselves hold NaN or Inf"
        if self.weights == "overflown":
            return f"the weights of {name} pass 65504, and cast to fp16 they are Inf"
        where = f"{name} in {dtype_name(self.dtype)}"
        if self.input_finite:
            return (
                f"the first module whose output was not finite is {where}; the largest magnitude before, in its "
                f"input, was {self.largest:.4g}"
            )
        return (
            f"the first module whose output was not finite is {where}, and its input was not either: the sum or "
            f"product just before it overflowed; the largest finite magnitude there was {self.largest:.4g}"
        )


class Sentinel:
    """Runs a part's module piece by piece, inside a ``with`` block, and heals or stops at a result that is not finite.

    Attributes:
        weights: what the part runs with at present: the handle's own, or after healing a safer copy that lives as long
            as the block.
        module: its module, on the device.
        placement: how it runs at present, as far as memory goes; None where there is no other.
    """

    def __init__(
        self,
        weights: Weights,
        on_nan: str = "heal",
        events: Events | None = None,
        prepare: Callable[[nn.Module, Precision, Placement | None], AbstractContextManager] | None = None,
        placements: Sequence[Placement] = (),
        shortcuts: str = "",
        team: Team | None = None,
    ):
        """Args:
            on_nan: ``heal`` or ``stop``.
            events: told whenever weights have to be loaded, and whenever work had to be done again.
            prepare: a context that the module runs in, such as LoRAs applied to it; entered for every module that is
                run.
            placements: how it can run, the first to begin with. Where it runs out of memory, the next is tried.
            shortcuts: what ``prepare`` lets the module run with at first, and not when a piece of work is done again,
                in words.
            team: the processes that run the part together: what one of them finds is found by all, and none changes
                how it runs alone.

        Raises:
            ValueError: for an unknown ``on_nan``.
        """
        check_choice("on_nan", on_nan, ON_NAN)
        self.weights, self._on_nan, self._events = weights, on_nan, events or Events()
        self._prepare, self._shortcuts, self._team = prepare, shortcuts, team
        self.placement: Placement | None = placements[0] if placements else None
        self._smaller = list(placements[1:])
        self.module: nn.Module | None = None
        self._running = ExitStack()

    def __enter__(self) -> "Sentinel":
        """Load the part.

        Raises:
            OutOfMemory: if there is no room for it.
        """
        while self.module is None:
            try:
                self._start()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.placement is None:
                    raise self._unloadable() from error
            if self.module is None:
                # Not in there: the error holds on to what was being made.
                self._make_smaller("loading")
        return self

    def __exit__(self, *error) -> None:
        self.module = None
        self._running.close()

    @property
    def _entered(self) -> nn.Module:
        assert self.module is not None, "the sentinel runs inside a with block"
        return self.module

    def run(self, work: Callable[[nn.Module, Precision], Result], where: str) -> Result:
        """Do a piece of work and return its result, which is finite; in less memory where it runs out.

        Args:
            work: takes the module and how it runs, and returns a tensor, or a tuple whose first entry is checked. It
                may be called again, with the same module or another, and must then start from the same state.
            where: what the work is, for messages: ``step 12 of 50``.

        Raises:
            NonFiniteError: if the result is not finite and ``on_nan`` is ``stop``, or no precision makes it
                finite.
            OutOfMemory: if memory runs out in the last placement too.
        """
        while True:
            try:
                if self.module is None:
                    self._start()
                return self._run_finite(work, where)
            except Exception as error:
                if self.placement is None or not is_out_of_memory(error):
                    raise
            self._make_smaller(where)

    def _unloadable(self) -> OutOfMemory:
        """Make the error for a part that there is no other way to run, and no room for."""
        name = PARTS[self.weights.kind][0]
        return OutOfMemory(
            f"{self.weights.device} ran out of memory while the {name} was loaded, which takes "
            f"{size_text(self.weights.nbytes)}, so something else fills it. Close other programs that use the card."
        )

    def _make_smaller(self, where: str) -> None:
        device, name, ran = self.weights.device, PARTS[self.weights.kind][0], self.placement
        assert ran is not None, "without placements, running out of memory is told by who runs"
        if self._team is not None:
            raise OutOfMemory(
                f"{where}: {device} ran out of memory with the {name} in {ran.text}, and processes that make one video "
                "together cannot change that halfway. Make the video smaller or shorter, or set --memory to "
                "offload_blocks, which goes with --split guidance."
            )
        if not self._smaller and self.weights.kind == "text_encoder":
            raise OutOfMemory(
                f"{where}: {device} ran out of memory with the text encoder even in the mode that takes the least "
                f"({ran.text}), whatever the size of the video. Close other programs that use the card, or quantize "
                "the text encoder."
            )
        if not self._smaller:
            raise OutOfMemory(
                f"{where}: {device} ran out of memory even in the mode that takes the least ({ran.text}). "
                "Make the video smaller or shorter, or close other programs that use the card."
            )
        self.placement = self._smaller.pop(0)
        fact = f"{where}: {device} ran out of memory with the {name} in {ran.text}."
        self._events.healed(f"{fact} Going on from here in {self.placement.text}; no finished step is lost.")
        self.module = None
        self._running.close()
        if self.placement.mode != ran.mode:
            self.weights.release()
        empty_cache(device)

    def _run_finite(self, work: Callable[[nn.Module, Precision], Result], where: str) -> Result:
        """``run``, where memory does not run out."""
        # Not kept in a variable: what is loaded in its place has its room.
        result = work(self._entered, self.weights.precision)
        if self._is_finite(result):
            return result
        del result
        with probes(self._entered, self.weights.precision) as found:
            result = work(self._entered, self.weights.precision)
        culprit = found[0] if found else None
        if self._team is not None:
            culprit = self._team.first_of(culprit)
        finite = self._is_finite(result)
        name, ran = PARTS[self.weights.kind][0], self.weights.precision
        if culprit:
            cause = culprit.text
        elif finite and self._shortcuts:
            cause = f"run again without {self._shortcuts} it is finite"
        elif finite:
            cause = "run again it is finite, so it was a passing fault, as unstable memory or an overclocked card makes"
        else:
            cause = "every module's output is finite, so it is what is done with them after that overflows"
        fact = f"{where}: the {name} in {ran.name} gave NaN or Inf; {cause}."
        if self._on_nan == STOP:
            raise NonFiniteError(
                f"{fact} The run stops here, as {setting('on_nan')} is stop, instead of ending in a black video. "
                f"{_advice(culprit, ran, healing=False)}"
            )
        if finite:
            self._events.healed(f"{fact} The run goes on with the second result.")
            return result
        del result
        for precision in safer(self.weights.kind, ran, self.weights.hardware):
            self._events.healed(f"{fact} Going on from here in {precision.name}; nothing that was finished is lost.")
            self._switch(precision)
            result = work(self._entered, precision)
            if self._is_finite(result):
                return result
            fact = f"{where}: the {name} in {precision.name} gave NaN or Inf too."
        raise NonFiniteError(
            f"{fact} In {ran.name}, {cause}. There is no safer precision left. {_advice(culprit, ran, healing=True)}"
        )

    def _is_finite(self, result: Result) -> bool:
        return is_finite(result) if self._team is None else self._team.agree(is_finite(result))

    def _switch(self, precision: Precision) -> None:
        """Free the module in use and have the part's weights loaded anew to run in ``precision``."""
        self.module = None
        self._running.close()
        self.weights.release()
        self.weights = self.weights.at(precision)
        self._start()

    def _start(self) -> None:
        with ExitStack() as running:
            module = running.enter_context(
                self.weights.running(self._events, None if self.placement is None else self.placement.mode)
            )
            if self._prepare is not None:
                running.enter_context(self._prepare(module, self.weights.precision, self.placement))
            self.module, self._running = module, running.pop_all()


def _advice(culprit: Culprit | None, ran: Precision, healing: bool) -> str:
    if culprit and culprit.weights == "damaged":
        return (
            "The file is damaged: download it again (scan_weights in the loader, or generate.py --check PATH --scan, "
            "lists what is wrong in it)."
        )
    if healing:
        return (
            "Every precision was tried: check the inputs and the weights (scan_weights in the loader, or generate.py "
            "--check PATH --scan)."
        )
    if ran.dtype == torch.float16 and not ran.range_safe:
        return (
            f"Set {setting('on_nan')} to heal, or in the loader dtype (--dtype) to auto or {setting('on_mismatch')} to "
            "fix."
        )
    return (
        f"Set {setting('on_nan')} to heal, or check the inputs and the weights (scan_weights in the loader, or "
        "generate.py --check PATH --scan)."
    )


@contextmanager
def probes(module: nn.Module, precision: Precision) -> Iterator[list[Culprit]]:
    """Watch the output of every module below ``module``; the list given holds the first culprit, once there is one."""
    found: list[Culprit] = []

    def probe(name: str):
        def look(child: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if found:
                return
            outputs = list(_tensors(output))
            if all(is_finite(tensor) for tensor in outputs):
                return
            inputs = list(_tensors((args, kwargs)))
            found.append(
                Culprit(
                    module=name,
                    kind=type(child).__name__,
                    dtype=outputs[0].dtype,
                    largest=max((_largest_finite(tensor) for tensor in inputs), default=0.0),
                    input_finite=all(is_finite(tensor) for tensor in inputs),
                    weights=_weights_state(child, precision, [] if inputs else outputs),
                )
            )

        return look

    hooks = [child.register_forward_hook(probe(name), with_kwargs=True) for name, child in module.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _weights_state(module: nn.Module, precision: Precision, made: Sequence[torch.Tensor]) -> str:
    """Say what a module's weights are. ``made`` is what it gave of them alone, without an input: of quantized blocks
    that shows more than their bytes do."""
    # Widened: what is in fp8 cannot be asked itself.
    own = [
        tensor.float()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *made)
        if tensor.is_floating_point()
    ]
    if all(is_finite(tensor) for tensor in own):
        return "finite"
    plain_fp16 = precision == Precision(torch.float16)
    return "overflown" if plain_fp16 and not any(tensor.isnan().any().item() for tensor in own) else "damaged"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if torch.is_tensor(value):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _largest_finite(tensor: torch.Tensor) -> float:
    # float32: a reduction in fp8 or fp16 is not to be had on every device.
    return torch.where(tensor.isfinite(), tensor, 0).float().abs().max().item()
