"""The most memory a process has had."""

import resource
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox.strips import Strips


def peak_kilobytes() -> int:
    """Resident kilobytes at most so far. On Linux ``ru_maxrss`` begins at that of the process that started this one, so the system is asked."""
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make under it while they live, on any device, the meta device too.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.paused:
            given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
            for tensor in tree_leaves(result):
                if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                    storage = tensor.untyped_storage()
                    given.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._release, storage.nbytes())
            self.peak = max(self.peak, self.live)
        return result

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes


def count_strips(vae, latent_or_frames: torch.Tensor, budget: int | None, chunks: list[int], step=Strips.decode) -> int:
    """Bytes at most on the device, beside weights and input, while the chunks of a video run: of real tensors, or on the meta device of shapes."""
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
