"""Weights that stay packed in memory (fp8, GGUF) and are widened for each product."""

import torch
import torch.nn.functional as F
from torch import nn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class PackedWeight(nn.Module):
    """A weight ``[out, in]`` in fp8, or in blocks of one of GGUF's quantizations.

    Args:
        data: fp8 ``[out, in]``, or GGUF's bytes ``[out, bytes]``.
        scale: what an fp8 weight is to be multiplied by, one number or one per row; kept as fp32 ``[1 or out, 1]``.
        quantization: GGUF's number of the quantization.
    """

    def __init__(self, data: torch.Tensor, scale: torch.Tensor | None = None, quantization: int | None = None):
        super().__init__()
        self.data = nn.Parameter(data, requires_grad=False)
        self.register_buffer("scale", None if scale is None else scale.float().reshape(-1, 1).to(data.device), persistent=False)
        self.quantization = quantization

    def widen(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight less its scale, in ``dtype``; fp8 loses nothing in any wider dtype."""
        return self.data.to(dtype) if self.quantization is None else dequantize(self.data, self.quantization).to(dtype)

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in ``dtype``, rounded once."""
        return self.widen(dtype) if self.scale is None else self.widen(torch.float32).mul_(self.scale).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.data.dtype}" if self.quantization is None else f"GGUF quantization {self.quantization}"


class PackedLinear(nn.Module):
    """A Linear that keeps its weight packed, computing in the dtype of what it is given: ``[..., in]`` -> ``[..., out]``.

    What it gives is what a Linear with the widened weight gives, bit for bit. Unlike diffusers' layerwise casting it leaves the bias in the
    dtype it is stored in, and knows scales. ``weight`` is None: T5 casts activations to its dtype.
    """

    weight = None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: PackedWeight | None = None
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.packed.scaled(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def dequantize(data: torch.Tensor, quantization: int) -> torch.Tensor:
    """GGUF's bytes ``[rows, bytes]`` -> numbers ``[rows, columns]``, by diffusers' kernels.

    Raises:
        ValueError: for a quantization that diffusers does not know.
    """
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType(quantization)
    if kind not in dequantize_functions:
        known = ", ".join(sorted(known.name for known in dequantize_functions))
        raise ValueError(
            f"The GGUF file is quantized as {kind.name}, which diffusers cannot read, so its weights cannot be used. Choose a file in one of {known}."
        )
    return dequantize_gguf_tensor(GGUFParameter(data, quant_type=kind))
