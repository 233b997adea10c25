"""Share one video among processes with a card each: the halves of guidance, the tokens of the sequence, or both.

The halves are two groups that evaluate a prompt each, at every step, and give each other what came of it: the same
numbers as one process that evaluates them one after the other. The tokens are shared as DeepSpeed-Ulysses does
(https://huggingface.co/papers/2309.14509), by diffusers' context parallelism with a plan of ours, as its CogVideoX has
none: each process has a part of the text and of the video, and for the attention all tokens of a part of the heads.
226 tokens of text divide by 2 only, so parts may be unequal (``ulysses_anything``). Its ring attention is not used: it
needs kernels that give their log-sum-exp, and CogVideoX-1.5 has heads enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from . import internals
from .internals import LibraryModule

Value = TypeVar("Value")
#: One evaluation of the transformer: takes it, and the device that it is on where that is another, gives a prediction.
Call = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Split:
    """How processes share a video.

    Attributes:
        guidance: 2 where the halves of guidance are evaluated apart, else 1.
        sequence: processes that share the tokens of one evaluation.
    """

    guidance: int = 1
    sequence: int = 1

    @property
    def text(self) -> str:
        shared = [
            *(["the halves of guidance"] if self.guidance > 1 else []),
            *([f"the tokens among {self.sequence}"] if self.sequence > 1 else []),
        ]
        return " and ".join(shared) or "nothing"


class Team:
    """The processes of one run, each of which makes one: their process group has to be there, with gloo for tensors on
    the host.

    Attributes:
        split: what they share.
        sent: bytes of the predictions that this process received of the other half.
    """

    def __init__(self, split: Split, device: torch.device):
        """Form the groups; all processes do at the same time.

        Raises:
            ValueError: if there are more or fewer processes than ``split`` has places.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.split, self.sent, self._device = split, 0, device
        count = dist.get_world_size()
        if split.guidance * split.sequence != count:
            raise ValueError(
                f"A video shared as {split.guidance} x {split.sequence} needs {split.guidance * split.sequence} "
                f"processes, and there are {count}. Start as many."
            )
        # diffusers looks for the dimensions of these names.
        shape, names = (split.guidance, 1, split.sequence), ("guidance", "ring", "ulysses")
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._half = self._mesh.get_local_rank("guidance")

    def evaluate(self, calls: Sequence[Call], transformer: nn.Module) -> list[torch.Tensor]:
        """Evaluate prompts; all processes get all predictions."""
        import torch.distributed as dist

        if self.split.guidance == 1:
            return [call(transformer) for call in calls]
        # A step that is not guided has one prompt, which both groups evaluate; all take it of the same.
        own = calls[min(self._half, len(calls) - 1)](transformer).contiguous()
        found = [torch.empty_like(own) for _ in range(self.split.guidance)]
        dist.all_gather(found, own, group=self._mesh.get_group("guidance"))
        self.sent += own.nbytes
        return found[-len(calls) :]

    def agree(self, finite: bool) -> bool:
        """Return whether it is so in all processes."""
        import torch.distributed as dist

        flag = torch.tensor(int(finite))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def first_of(self, value: Value | None) -> Value | None:
        """Return the value of the first process that has one."""
        import torch.distributed as dist

        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return next((one for one in found if one is not None), None)

    def least(self, choices: Sequence[Value]) -> Sequence[Value]:
        """Return the shortest end of a list that any process has, so that all begin with the same."""
        import torch.distributed as dist

        count = torch.tensor(len(choices))
        dist.all_reduce(count, dist.ReduceOp.MIN)
        return choices[len(choices) - int(count.item()) :]

    @contextmanager
    def attached(self, module: LibraryModule) -> Iterator[None]:
        """Have each process run its part of a transformer's tokens in a ``with`` block; put on above caches, so that
        they keep parts. Afterwards nothing of it is left."""
        if self.split.sequence == 1:
            yield
            return
        import torch.distributed as dist

        config, plan = internals.context_parallel(self.split.sequence, self._mesh, self._device, dist.get_rank())
        processors = {id(block.attn1.processor): block.attn1.processor for block in module.transformer_blocks}.values()
        with ExitStack() as stack:
            stack.callback(internals.apply_context_parallel(module, config, plan))
            for processor in processors:
                processor.parallel, processor.agreed = config, self._largest
                stack.callback(_forget, processor)
            yield

    def _largest(self, maxima: torch.Tensor) -> torch.Tensor:
        """Return maxima over the tokens of all parts."""
        import torch.distributed as dist

        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._mesh.get_group("ulysses"))
        return maxima


def _forget(processor: Any) -> None:
    processor.parallel = processor.agreed = None
