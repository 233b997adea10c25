"""Linears whose weights stay in fp8 in memory and are widened, exactly, for each product."""

import torch
import torch.nn.functional as F
from torch import nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Linear(nn.Module):
    """A Linear with an fp8 weight, computing in the dtype of what it is given: ``[..., in]`` -> ``[..., out]``.

    What it gives is what a Linear with the widened weight gives, bit for bit. Unlike diffusers' layerwise casting it leaves the bias in the
    dtype it is stored in, and knows scales. ``weight`` is None: T5 casts activations to its dtype.
    """

    weight = None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored_weight: nn.Parameter | None = None
        self.bias = linear.bias
        self.register_buffer("scale", None, persistent=False)

    def load_weight(self, weight: torch.Tensor, device: torch.device, scale: torch.Tensor | None = None) -> None:
        """Take an fp8 weight ``[out, in]``, and the scale that it is to be multiplied by: one number, or one per row."""
        self.stored_weight = nn.Parameter(weight.to(device), requires_grad=False)
        self.scale = None if scale is None else as_rows(scale).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            weight = self.stored_weight.to(x.dtype)
        else:
            # In fp32, so that the product is rounded once.
            weight = self.stored_weight.float().mul_(self.scale).to(x.dtype)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def as_rows(scale: torch.Tensor) -> torch.Tensor:
    """A scale as fp32 ``[1, 1]`` or ``[out, 1]``."""
    return scale.float().reshape(-1, 1)
