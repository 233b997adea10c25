"""What memory is taken, and what is where."""

import sys
from collections.abc import Callable

import torch

from cogvideox.memory import LiveBytes
from cogvideox.modules.strips import Strips


def peak_kilobytes() -> int:
    """Resident kilobytes at most so far. On Linux ``ru_maxrss`` begins at that of the process that started this one, so
    the system is asked.
    On Windows what the page file has to back: resident there are the pages of a mapped file too, which no call gives
    back."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_pagefile // 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def count_strips(vae, latent_or_frames: torch.Tensor, budget: int | None, chunks: list[int], step=Strips.decode) -> int:
    """Bytes at most on the device, beside weights and input, while the chunks of a video run: of real tensors, or on
    the meta device of shapes."""
    mode = LiveBytes()

    class Counted(Strips):
        def _away(self, shape, dtype):
            # The host's memory is another.
            mode.paused = True
            try:
                return torch.empty(shape, dtype=dtype, device=self._device)
            finally:
                mode.paused = False

    strips = Counted(vae, latent_or_frames.dtype, latent_or_frames.device, budget)
    with torch.no_grad(), mode:
        for piece in latent_or_frames.split(chunks, dim=2):
            step(strips, piece)
    return mode.peak


def left_behind(module: torch.nn.Module, run: Callable[[], object], monkeypatch) -> list[str]:
    """The tensors of a module with diffusers' offloading hooks that no hook brings to the device while it runs: on a
    GPU they would be missing."""
    from diffusers.hooks.group_offloading import ModuleGroup

    brought, real = set(), ModuleGroup.onload_

    def onload(group):
        tensors = [*(group.parameters or ()), *(group.buffers or ())]
        brought.update(
            map(
                id,
                [*tensors, *(tensor for owner in group.modules for tensor in (*owner.parameters(), *owner.buffers()))],
            )
        )
        return real(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    run()
    return [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if id(tensor) not in brought]


def rise_of_peak(run: Callable[[], object]) -> int:
    """Bytes by which resident memory rises at most while something runs. Skips the test where the system keeps no peak
    that can be set back."""
    import pytest

    if sys.platform != "linux":
        pytest.skip("only Linux sets the peak of a process's memory back")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
        peak.write("5")
    before = peak_kilobytes()
    run()
    return (peak_kilobytes() - before) * 1024
