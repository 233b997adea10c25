"""Cache steps: what changes little from one step to the next is not computed again. That is faster, and gives another
video than without.

``teacache`` is in a file of its own. The other methods are diffusers' own hooks. What is added here is when they act:
diffusers asks for thresholds and intervals, each method for others, whose effect on a run is not known before; here
every method is told how large a share of its work it is to save, and where.

``first_block`` (https://github.com/chengzeyi/ParaAttention) runs the first block; where its change is close to that of
    the last full evaluation, it reuses the change that all other blocks made then.
``taylorseer`` (https://huggingface.co/papers/2503.06923) runs nothing at all, and extrapolates the transformer's output
    from the last full evaluations: diffusers' "lite" variant, as the one that keeps every layer's output takes 46 GB at
    full size.
``pab``, pyramid attention broadcast (https://huggingface.co/papers/2408.12588), reuses each block's attention; the
feed-forwards run. ``faster_cache`` (https://huggingface.co/papers/2410.19355) extrapolates each block's attention from
its last two, and the unconditional half of a guided batch from the conditional one.

Not offered: MagCache needs ratios measured on the model itself, and none are published for CogVideoX-1.5. SeaCache came
after the oldest diffusers that is supported. cache-dit counts steps by itself, so that one that is done again would
shift all that follow, and does not go with offloading.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..choices import (
    CACHES,
    FASTER_CACHE,
    FIRST_BLOCK,
    PAB,
    TAYLORSEER,
    TEACACHE,
    check_choice,
    check_share,
    steps_between,
)
from . import internals
from .internals import LibraryModule

#: What is reused of each block, in words.
_PARTS = {PAB: "the attention of ", FASTER_CACHE: "the attention of "}
_NAMES = {
    TEACACHE: "TeaCache",
    FIRST_BLOCK: "FirstBlockCache",
    TAYLORSEER: "TaylorSeer",
    PAB: "PAB",
    FASTER_CACHE: "FasterCache",
}
#: ``first_block``: the threshold of change that a run begins with. It follows the strength from there, so this moves a
#: few steps at most.
_FIRST_THRESHOLD = 0.08
#: How fast it follows: its logarithm moves by this much for every step that was to be skipped and was not, or the
#: reverse. The number of skipped steps is off by the logarithm of how far the threshold has come since the beginning,
#: over this.
_GAIN = 1.5
#: ``faster_cache``: how far attention is extrapolated, and from where to where in the noise schedule, and by how much,
#: the differences between the two halves grow with each step: as diffusers documents it for CogVideoX, and as in the
#: paper.
_EXTRAPOLATION = 0.3
_LOW_FREQUENCIES, _HIGH_FREQUENCIES, _ALPHA = (99, 641), (-1, 301), 1.1
#: What is put on modules while a cache is attached, and how it was before is restored.
_ATTACHED = ("forward", internals.HOOKS, internals.CACHE_CONFIG)


@dataclass(frozen=True)
class Cache:
    """How a run is cached.

    Attributes:
        method: one of ``choices.CACHES``.
        strength: 0..1, the share of the evaluations that are to be skipped among those the method can skip between
            ``start`` and ``end``: whole blocks, or with ``pab`` and ``faster_cache`` blocks' attention. 0 changes
            nothing.
        start, end: 0..1, shares of the run's steps between which it may skip; outside them every step is evaluated in
            full.
    """

    method: str = TEACACHE
    strength: float = 0.6
    start: float = 0.1
    end: float = 0.95

    def __post_init__(self):
        """Refuse what it cannot run with.

        Raises:
            ValueError: for an unknown method, or a number that is no share.
        """
        check_choice("The cache's method", self.method, CACHES)
        for name in ("strength", "start", "end"):
            check_share(f"The cache's {name}", getattr(self, name), "Set it to one; 0 for strength changes nothing.")
        if self.start > self.end:
            raise ValueError(
                f"The cache's start is {self.start} and its end {self.end}, so it would never act. Set start below end."
            )

    def within(self, steps: int) -> range:
        """Return the steps of a run between ``start`` and ``end``."""
        return steps_between(self.start, self.end, steps)

    @property
    def name(self) -> str:
        """The method as its authors call it."""
        return _NAMES[self.method]

    @property
    def text(self) -> str:
        """What is to be skipped, in words."""
        if self.strength == 0:
            return f"{self.name}: strength 0, nothing is skipped"
        return (
            f"{self.name}: {self.strength:.0%} of {_PARTS.get(self.method, '')}the block evaluations between "
            f"{self.start:.0%} and {self.end:.0%} of the steps are to be skipped; the sampler says how many were"
        )

    def nbytes(self, config: Mapping, shape: Sequence[int], copies: int, tokens: int, itemsize: int) -> int:
        """Return the bytes that it holds on the device.

        Args:
            config: the transformer's, in full.
            shape: of the padded latent, ``[B, 16, T, H/8, W/8]``.
            copies: videos that run at once: 2 B where guided.
            tokens: of a prompt.
            itemsize: bytes of one activation.
        """
        if self.strength == 0:
            return 0
        _, _, length, height, width = shape
        frames, patch = length // (config["patch_size_t"] or 1), config["patch_size"]
        stream = (
            (frames * height * width // patch**2 + tokens)
            * config["num_attention_heads"]
            * config["attention_head_dim"]
            * itemsize
            * copies
        )
        if self.method == TAYLORSEER:
            # The output and its slope.
            return 2 * copies * config["out_channels"] * length * height * width * torch.float32.itemsize
        # What the blocks added, or while they run what goes into the first. Or the first block's output and change and
        # what the others added, new beside old for a moment. Or of every layer the last result; of the last two where
        # they are extrapolated, of both halves, as those of the conditional one are views.
        held = {TEACACHE: 1, FIRST_BLOCK: 4, PAB: config["num_layers"], FASTER_CACHE: 2 * config["num_layers"]}
        return stream * held[self.method]


@dataclass
class _Window:
    """What is cached of one context window, and how far it has come.

    Attributes:
        index: the step it was at last.
        skipped: steps that skipped something.
        log_threshold: of ``first_block``.
        states: one list a forward of a step, for hooks that keep one state only: they are given that of the forward.
        filled: whether there is something to reuse.
    """

    index: int = -1
    skipped: set[int] = field(default_factory=set)
    log_threshold: float = field(default_factory=lambda: math.log(_FIRST_THRESHOLD))
    states: list[list[Any]] = field(default_factory=list)
    filled: bool = False


class CacheRun:
    """One run's cache: ``attached`` to the transformer, told of each step as it begins, and asked for a report at the
    end.

    A step that is done again, or in another module, or with another guidance than the one before, begins with nothing
    cached, and is evaluated in full.

    Attributes:
        ran, total: block evaluations (or with ``pab`` and ``faster_cache`` those of attention) that ran, and that there
            would have been without a cache, by step and context window: counted where they happen, of a step that was
            repeated the last time.
    """

    def __init__(self, cache: Cache, timesteps: Sequence[float]):
        """Set up an empty cache.

        Args:
            timesteps: of all steps of the run.
        """
        self._cache, self._timesteps, self._batched = cache, timesteps, False
        self._within = cache.within(len(timesteps))
        self.ran: dict[tuple[int, int], int] = {}
        self.total: dict[tuple[int, int], int] = {}
        self._windows: dict[int, _Window] = {}
        self._at, self._guided = (-1, 0), True
        self._module: LibraryModule = None
        self._ran_before = 0
        self._forget()

    def _forget(self) -> None:
        """Hold nothing of any module."""
        # Modules, and what they had before.
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        self._hooks: list[Any] = []
        self._context: AbstractContextManager | None = None
        self._branch = 0
        self._skips = False
        self._empty()

    def _empty(self) -> None:
        """Have nothing that was cached reused."""
        for window in self._windows.values():
            window.states, window.filled = [], False

    @property
    def text(self) -> str:
        """How much was skipped, in a sentence."""
        if self._cache.strength == 0:
            return f"{self._cache.text}."
        ran, total = sum(self.ran.values()), sum(self.total.values())
        share = (total - ran) / total if total else 0.0
        return (
            f"{self._cache.name} skipped {_PARTS.get(self._cache.method, '')}{total - ran:,} of {total:,} block "
            f"evaluations ({share:.0%})."
        )

    @contextmanager
    def attached(self, module: LibraryModule, batched: bool) -> Iterator[None]:
        """Have ``module`` run with the cache for the length of a ``with`` block. Afterwards nothing of it is left.

        Args:
            batched: whether both halves of guidance run as one batch, the unconditional first.
        """
        if self._cache.strength == 0:
            yield
            return
        watching = [
            module.register_forward_pre_hook(self._before_forward),
            module.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._module, self._batched = module, batched
        try:
            self._attach()
            yield
        finally:
            self._detach()
            self._module = None
            for hook in watching:
                hook.remove()

    def _detach(self) -> None:
        """Take diffusers' hooks off the module, and forget what was cached."""
        module, before = self._module, self._before
        self._forget()
        if module.is_cache_enabled:
            module.disable_cache()
        for child, had in before:
            for name in _ATTACHED:
                vars(child).pop(name, None)
            vars(child).update(had)
        internals.forget_hooks_below(module)

    def begin(self, index: int, guided: bool, window: int = 0) -> None:
        """Note that step ``index`` is about to be run in a window, or run again, guided or not."""
        own = self._windows.setdefault(window, _Window())
        again, changed = index <= own.index, guided != self._guided
        self._at, own.index = (index, window), index
        self._guided, self._branch = guided, 0
        self.ran[self._at] = self.total[self._at] = 0
        own.skipped.discard(index)
        if self._module is None:
            return
        if changed and self._cache.method == FASTER_CACHE:
            # It is told whether a batch holds two halves when it is made.
            self._detach()
        if not self._hooks:
            self._attach()
            if not self._hooks:
                return
        elif again or changed:
            # Not taken off and put on again: what was put on above them, as of processes that share tokens, would go.
            for hook in self._hooks:
                hook.reset_state(self._module)
            # Some hooks know of all windows, and forget those too.
            self._empty()
        within = index in self._within
        due = len(own.skipped) + 1 <= self._cache.strength * (index - self._within.start + 1) + 1e-9
        self._skips = within and due and own.filled
        if self._cache.method == FIRST_BLOCK:
            threshold = -1.0 if not within else math.inf if self._due_share() == 1 else math.exp(own.log_threshold)
            internals.steer(self._hooks, "threshold", threshold)
        elif self._cache.method == TAYLORSEER:
            internals.steer(self._hooks, "disable_cache_before_step", -1 if self._skips else sys.maxsize)

    def _attach(self) -> None:
        """Put diffusers' hooks on the module, unless it is about to take off others that must come after them: then at
        the next step."""
        module = self._module
        if internals.notes_offload_order(module):
            return
        self._before = [(child, internals.had(child, _ATTACHED)) for child in module.modules()]
        for block in module.transformer_blocks:
            # Below the hooks, so that what they skip is not counted.
            counted = block.attn1 if self._cache.method in _PARTS else block
            counted.forward = partial(self._count, counted.forward)
        module.enable_cache(self._config())
        if self._cache.method == TAYLORSEER:
            module.forward = partial(_in_tuple, module.forward)
        self._hooks = internals.stateful_hooks(module)

    def _config(self) -> Any:
        """Make diffusers' config of the method, so that ``begin`` can steer it: where a method asks for the timestep,
        the answer says whether to skip."""
        from diffusers import hooks

        skips: dict[str, Any] = dict(current_timestep_callback=lambda: 1 if self._skips else 3)
        if self._cache.method == FIRST_BLOCK:
            return hooks.FirstBlockCacheConfig(threshold=-1.0)
        if self._cache.method == TAYLORSEER:
            # The pattern that only the transformer's own name matches.
            return hooks.TaylorSeerCacheConfig(
                cache_interval=sys.maxsize,
                disable_cache_before_step=sys.maxsize,
                cache_identifiers=[""],
                taylor_factors_dtype=torch.float32,
            )
        if self._cache.method == PAB:
            return hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=sys.maxsize, spatial_attention_timestep_skip_range=(0, 2), **skips
            )
        return hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=sys.maxsize,
            spatial_attention_timestep_skip_range=(0, 2),
            unconditional_batch_skip_range=sys.maxsize,
            unconditional_batch_timestep_skip_range=(0, 2),
            attention_weight_callback=lambda _: _EXTRAPOLATION,
            low_frequency_weight_callback=lambda _: self._alpha(_LOW_FREQUENCIES),
            high_frequency_weight_callback=lambda _: self._alpha(_HIGH_FREQUENCIES),
            tensor_format="BFCHW",
            is_guidance_distilled=not (self._batched and self._guided),
            **skips,
        )

    def _alpha(self, timesteps: tuple[int, int]) -> float:
        """Return by how much the halves' differences grow at this step, which may lie between two timesteps."""
        return _ALPHA if timesteps[0] < self._timesteps[self._at[0]] < timesteps[1] else 1.0

    def _count(self, forward: Callable, *args, **kwargs) -> Any:
        """Stand in for the ``forward`` that is counted."""
        self.ran[self._at] += 1
        return forward(*args, **kwargs)

    def _before_forward(self, module: LibraryModule, _: Any) -> None:
        count = len(module.transformer_blocks)
        self.total[self._at] += count
        self._ran_before = self.ran[self._at]
        if not self._hooks:
            self.ran[self._at] += count
            return
        # Windows, and prompts that run one after the other, have a cache each.
        _, window = self._at
        self._context = module.cache_context(f"{window} {self._branch}")
        self._context.__enter__()
        own = [hook for hook in self._hooks if hasattr(hook, "state")]
        states = self._windows[window].states
        if self._branch == len(states):
            states.append([type(hook.state)() for hook in own])
        for hook, state in zip(own, states[self._branch], strict=True):
            hook.state = state
        self._branch += 1

    def _after_forward(self, module: LibraryModule, *_: Any) -> None:
        if self._context is None:
            return
        self._context.__exit__(None, None, None)
        self._context = None
        index, window = self._at
        own = self._windows[window]
        own.filled |= not self._skips
        skipped = self.ran[self._at] - self._ran_before < len(module.transformer_blocks)
        if self._cache.method == FIRST_BLOCK:
            if index in self._within:
                # Towards the threshold below which that share of the steps lies.
                own.log_threshold += _GAIN * (self._due_share() - skipped)
        elif skipped:
            own.skipped.add(index)

    def _due_share(self) -> float:
        """Return the share of ``first_block``'s steps that must skip all blocks but the first, which always runs."""
        blocks = len(self._module.transformer_blocks)
        return min(1.0, self._cache.strength * blocks / (blocks - 1))


def _in_tuple(forward: Callable, *args, **kwargs) -> Any:
    """Stand in for the transformer's ``forward``: what TaylorSeer extrapolates comes without the tuple around it."""
    output = forward(*args, **kwargs)
    return (output,) if torch.is_tensor(output) else output
