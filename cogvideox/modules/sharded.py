"""Share one video among processes with a card each: the halves of guidance, the tokens of the sequence, or both.

The halves are two groups that evaluate a prompt each, at every step, and give each other what came of it: the same
numbers as one process that evaluates them one after the other. The tokens are shared as DeepSpeed-Ulysses does
(https://huggingface.co/papers/2309.14509): each process has a part of the text and of the video, and for the attention
all tokens of a part of the heads. diffusers' context parallelism splits and joins the streams, with a plan of ours, as
its CogVideoX has none; 226 tokens of text divide by 2 only, so parts may be unequal (``ulysses_anything``). The
exchange within the attention is ours: that of diffusers leaves the tokens in the order of the processes, and an
attention whose keys are in another order rounds otherwise. A video then differed from one process's by 1.5e-6 after
four guided steps in fp32, and by 2e-3 in fp16; in the order of one process not at all, where products do not depend on
how many rows they have (measured on a CPU: AMD EPYC, torch 2.11). Ring attention is not used: it needs kernels that
give their log-sum-exp, and CogVideoX-1.5 has heads enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
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
        tokens: of the text and of the video, of all processes, in the evaluation that runs.
    """

    def __init__(self, split: Split, device: torch.device):
        """Form the groups; all processes do at the same time.

        Raises:
            ValueError: if there are more or fewer processes than ``split`` has places.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        self.split, self.sent, self._device = split, 0, device
        self.tokens = (0, 0)
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
            stack.callback(module.transformer_blocks[0].register_forward_pre_hook(self._count, with_kwargs=True).remove)
            for processor in processors:
                processor.shared, processor.agreed = self.attend, self._largest
                stack.callback(_forget, processor)
            yield

    def _count(self, block: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        """Note the tokens that the first block is given, which are not split yet."""
        self.tokens = named["encoder_hidden_states"].shape[1], named["hidden_states"].shape[1]

    def attend(
        self,
        kernel: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Attend to the tokens of all processes, for a part of the heads, in the order of one process: all of the text
        before all of the video. An attention adds up in the order of its keys, so that another would round otherwise.

        Args:
            kernel: attends, from ``[B, tokens, heads, C]`` of each of the three to the same.
            query, key, value: of this process's tokens, those of the text first, ``[B, tokens, heads, C]``.
        """
        import torch.distributed as dist

        group, count = self._mesh.get_group("ulysses"), self.split.sequence
        # As diffusers splits them: nobody has to be asked.
        texts, videos = ([total // count + (n < total % count) for n in range(count)] for total in self.tokens)
        totals = [one + other for one, other in zip(texts, videos, strict=True)]

        def gathered(x: torch.Tensor) -> torch.Tensor:
            sent = rearrange(x, "b s (p h) c -> (p s) b h c", p=count).contiguous()
            received = sent.new_empty(sum(totals), *sent.shape[1:])
            dist.all_to_all_single(received, sent, totals, [x.shape[1]] * count, group=group)
            parts = received.split([size for pair in zip(texts, videos, strict=True) for size in pair])
            return rearrange(torch.cat([*parts[::2], *parts[1::2]]), "s b h c -> b s h c")

        mixed = rearrange(kernel(gathered(query), gathered(key), gathered(value)), "b s h c -> s b h c")
        texts_of, videos_of = mixed[: sum(texts)].split(texts), mixed[sum(texts) :].split(videos)
        sent = torch.cat([part for pair in zip(texts_of, videos_of, strict=True) for part in pair])
        received = sent.new_empty(count * query.shape[1], *sent.shape[1:])
        dist.all_to_all_single(received, sent, [query.shape[1]] * count, totals, group=group)
        return rearrange(received, "(p s) b h c -> b s (p h) c", p=count)

    def _largest(self, maxima: torch.Tensor) -> torch.Tensor:
        """Return maxima over the tokens of all parts."""
        import torch.distributed as dist

        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._mesh.get_group("ulysses"))
        return maxima


def _forget(processor: Any) -> None:
    processor.shared = processor.agreed = None
