"""A device without float64, as Apple's and some of Intel's are: the CPU stands for it, under the name of the meta
device, which torch has everywhere."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CARD, HOST = torch.device("meta"), torch.device("cpu")


class Card(torch.Tensor):
    """A tensor of that device.

    Attributes:
        numbers: what it holds.
    """

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Card":
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=CARD
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = pytree.tree_leaves((args, kwargs))
        device = kwargs.get("device") or (CARD if any(isinstance(value, cls) for value in given) else HOST)
        cards = {id(value.numbers): value for value in given if isinstance(value, cls)}
        if "device" in kwargs:
            kwargs["device"] = HOST
        args, kwargs = pytree.tree_map_only(cls, lambda card: card.numbers, (args, kwargs))

        def on_card(result: torch.Tensor) -> torch.Tensor:
            if id(result) in cards:
                return cards[id(result)]
            if torch.device(device) != CARD or any(result is value for value in given):
                return result
            if result.dtype == torch.float64:
                raise TypeError(f"This device has no float64, which {function} would make there.")
            return cls(result)

        return pytree.tree_map_only(torch.Tensor, on_card, function(*args, **kwargs))


class CardWithoutFloat64(TorchDispatchMode):
    """Have what is made on ``CARD`` be a ``Card`` in a ``with`` block."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return Card.__torch_dispatch__(function, types, args, kwargs)
