"""Compile the transformer's blocks (``torch.compile``): they are alike, so one of them is compiled and all run so. The
result is as before, within the dtype's rounding.

Only a block's own ``forward`` is compiled: what hooks do around it (offloading, caches) stays outside. Compiled code
belongs to the class of the blocks and not to a model: it stays for the next run, the next checkpoint and the next LoRA,
while the module is left as it was.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..choices import COMPILE_DEFAULT, COMPILE_MODES, check_choice
from ..out_of_memory import is_out_of_memory
from . import internals
from .internals import LibraryModule
from .range_safe import is_range_safe, make_alike

logger = logging.getLogger(__name__)

_BACKEND = "inductor"
#: Versions of the block's code that torch may keep: one for every size, dtype and kind of layer. At its own limit of 8
#: it would stop compiling.
_VERSIONS = 64


@dataclass(frozen=True)
class Compiled:
    """How the blocks are compiled.

    Attributes:
        mode: one of ``choices.COMPILE_MODES``, as ``torch.compile`` has it. Those with CUDA graphs are left out: they
            keep a second copy of the activations, and the memory plan does not know of it.
        dynamic: compile once for all sizes, to slightly slower code; otherwise anew for each size and length.
    """

    mode: str = COMPILE_DEFAULT
    dynamic: bool = False

    def __post_init__(self):
        """Refuse an unknown mode.

        Raises:
            ValueError: with those there are.
        """
        check_choice("The mode of compiling", self.mode, COMPILE_MODES)

    @property
    def text(self) -> str:
        """How the blocks are compiled, in words."""
        sizes = "once for all sizes" if self.dynamic else "anew for each size and length"
        return f"torch.compile ({self.mode}), {sizes}; the first step waits for it, often a minute or two"


def missing_compiler(device: torch.device) -> str | None:
    """Say why nothing can be compiled for a device, as a clause; None where the tools are there."""
    if device.type == "cpu":
        if internals.lacks_cpp_compiler():
            return (
                "no C++ compiler is installed, which torch needs for code on the CPU (g++ or clang++; on Windows the "
                "Visual Studio Build Tools)"
            )
    elif device.type in ("cuda", "xpu"):
        if internals.lacks_triton():
            return (
                "triton is not installed or does not work with this card, and torch needs it (it comes with torch on "
                "Linux; on Windows install triton-windows in ComfyUI's Python)"
            )
    elif device.type != "mps":
        return f"torch cannot compile for {device}"
    return None


def compile_text(compiled: Compiled, device: torch.device) -> str:
    """Say how the blocks will be compiled for a device, or why they will not."""
    missing = missing_compiler(device)
    return compiled.text if missing is None else f"The model will run without compiling: {missing}."


class CompileRun:
    """One run with compiled blocks: ``attached`` to the transformer, and told of each step as it begins.

    Where it cannot compile, the run goes on without, and says so.
    """

    def __init__(self, compiled: Compiled, device: torch.device, tell: Callable[[str, int], None]):
        """Look whether anything can be compiled for ``device``.

        Args:
            tell: called with sentences for the user, and logging's level of each.
        """
        self._compiled, self._device, self._tell = compiled, device, tell
        self._given_up = missing_compiler(device)
        self._depth, self._began, self._seconds, self._announced = 0, 0.0, 0.0, False
        if self._given_up:
            tell(f"The model runs without compiling: {self._given_up}.", logging.WARNING)

    @contextmanager
    def attached(self, module: LibraryModule) -> Iterator[None]:
        """Have the blocks of ``module`` run compiled for the length of a ``with`` block. Afterwards nothing of it is
        left on the module."""
        if self._given_up:
            yield
            return
        if offloads_layers(module):
            self._tell(
                "The model runs without compiling: its layers are brought to the card one by one, within what would "
                "be compiled.",
                logging.WARNING,
            )
            yield
            return
        restore: list[Callable[[], None]] = []
        try:
            for block in module.transformer_blocks:
                restore.append(internals.replace_forward(block, partial(self._run, block)))
            if is_range_safe(module):
                make_alike(module.transformer_blocks, self._device, restore)
            restore += internals.on_compiling(self._on_start, self._on_end)
            with internals.compiled_versions(_VERSIONS):
                yield
        finally:
            for undo in restore:
                undo()

    def begin(self, index: int) -> None:
        """Note that step ``index`` is about to be run, or run again."""
        if self._announced:
            self._announced = False
            self._tell(
                f"Compiled in {self._seconds:.0f} s. The next run of this size starts at once, as long as the program "
                "runs.",
                logging.INFO,
            )
            self._seconds = 0.0

    def _run(self, block: nn.Module, *args, **kwargs) -> Any:
        """Stand in for the ``forward`` of a block."""
        forward = type(block).forward
        # A block that is watched (the sentinel's probes, looking for what is not finite) has to run as it is written.
        if self._given_up or internals.is_watched(block):
            return forward(block, *args, **kwargs)
        if "hidden_states" in kwargs:
            # The first block is given views of one tensor, which would be compiled apart: a copy of what lies behind
            # the text, and of both where there are several videos. A batch of one passes for contiguous with any
            # stride, and is a view still.
            for name in ("hidden_states", "encoder_hidden_states"):
                given = kwargs[name].contiguous()
                given = given.clone() if given.storage_offset() else given
                kwargs[name] = given.flatten(0, 1).unflatten(0, (given.shape[0], -1)).detach()
        try:
            return _compile(forward, self._compiled, _BACKEND)(block, *args, **kwargs)
        except internals.compiler_error() as error:
            cause = getattr(error, "inner_exception", None)
            if cause is not None and is_out_of_memory(cause):
                raise cause from error
            logger.warning("torch.compile failed", exc_info=error)
            self._given_up = str(cause or error).strip().splitlines()[0]
            self._announced = False
            self._tell(f"Compiling failed, so the model runs on without: {self._given_up}", logging.WARNING)
            return forward(block, *args, **kwargs)

    def _on_start(self, *_) -> None:
        if self._depth == 0:
            self._began = time.perf_counter()
            if not self._announced:
                self._announced = True
                self._tell(
                    "Compiling the transformer's block for this size. This step takes longer, often by a minute or "
                    "two.",
                    logging.INFO,
                )
        self._depth += 1

    def _on_end(self, *_) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._seconds += time.perf_counter() - self._began


@cache
def _compile(forward: Callable, compiled: Compiled, backend: str) -> Callable:
    """Compile a block's ``forward``, once for all blocks, models and runs."""
    # The whole block or nothing: code in pieces is hardly faster.
    return torch.compile(forward, fullgraph=True, dynamic=compiled.dynamic, backend=backend, mode=compiled.mode)


def offloads_layers(module: LibraryModule) -> bool:
    """Return whether diffusers' hooks bring the layers within a block to the device one by one."""
    return any(
        internals.is_hooked(child)
        for block in module.transformer_blocks
        for child in block.children()
        for child in child.modules()
    )
