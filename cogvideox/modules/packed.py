"""Keep weights packed in memory (fp8, int8, GGUF): they are widened for each product, or multiplied as they are by
activations that are packed too.

The tensors of a packed weight are reached only by calling its module: diffusers' group offloading brings them to the
device when it is called.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..words import short
from . import internals

#: The largest number of each dtype that weights and activations are quantized to; int8's -128 is left out, so that
#: negation is exact.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: The smallest scale, which a row or token of zeros has.
_LEAST_SCALE = 2.0**-100
#: Tokens that are quantized and multiplied at once: their sums, of 4 bytes each, are larger than what goes in and comes
#: out.
_TOKENS = 4096
#: Products of two int8 whose sum is below 2^24.
_EXACT = 1024
#: Rows that CUDA's product of int8 must have: more than 16.
_LEAST_ROWS = 32


class PackedWeight(nn.Module):
    """A weight ``[out, in]`` in fp8 or int8, or in blocks of one of GGUF's quantizations. Called, it gives the weight
    in a wider dtype.

    Args:
        data: fp8 or int8 ``[out, in]``, or GGUF's bytes ``[out, bytes]``.
        scale: what fp8 and int8 are to be multiplied by, one number or one per row; kept as fp32 ``[1 or out, 1]``.
        quantization: GGUF's number of the quantization.
        shape: of the weight, where ``data`` holds blocks ``[blocks, bytes]`` because its rows are no whole blocks.
    """

    def __init__(
        self,
        data: torch.Tensor,
        scale: torch.Tensor | None = None,
        quantization: int | None = None,
        shape: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.data = nn.Parameter(data, requires_grad=False)
        self.scale: torch.Tensor | None
        self.register_buffer(
            "scale", None if scale is None else scale.float().reshape(-1, 1).to(data.device), persistent=False
        )
        self.quantization, self.shape = quantization, shape

    def forward(self, dtype: torch.dtype, factor: float | None = None) -> torch.Tensor:
        """Give the weight in ``dtype``, rounded once; with ``factor``, times that in the place of its scale."""
        return self.scaled(dtype) if factor is None else self.widen(torch.float32).mul_(factor).to(dtype)

    def widen(self, dtype: torch.dtype) -> torch.Tensor:
        """Give the weight without its scale, in ``dtype``; fp8 and int8 lose nothing in any wider dtype."""
        if self.quantization is None:
            return self.data.to(dtype)
        wide = dequantize(self.data, self.quantization).to(dtype)
        return wide if self.shape is None else wide.reshape(self.shape)

    def scaled(self, dtype: torch.dtype) -> torch.Tensor:
        """Give the weight in ``dtype``, rounded once."""
        return self.widen(dtype) if self.scale is None else self.widen(torch.float32).mul_(self.scale).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.data.dtype}" if self.quantization is None else f"GGUF quantization {self.quantization}"


class DynamicWeight(nn.Module):
    """A weight ``[out, in]`` in int8 or fp8 (e4m3fn) that is multiplied as it is. Called with activations, it gives the
    product.

    Each token is divided by its largest magnitude over the largest number of the dtype, and rounded; the products are
    added up in int32 or fp32, and multiplied by the scales of token and row in fp32. These are torch's own kernels, the
    ones torchao calls.

    Nothing overflows that is finite in fp32: a sum over n channels stays below 127^2 n < 2^31 for n < 133,000 (the
    models have 12,288), or below 448^2 n < 2^128. Inf and NaN go into a token's scale, and so come out in all of its
    outputs, for the sentinel to see.

    Args:
        data: int8 or fp8 ``[out, in]``; both a multiple of 16, as the kernels want them.
        scale: fp32, one per row: ``[out]`` in any shape; kept as ``[out, 1]``.
        device: where it will run, if ``data`` waits elsewhere.
    """

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, device: torch.device | None = None):
        super().__init__()
        self.data = nn.Parameter(data, requires_grad=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale.reshape(-1, 1), persistent=False)
        # Asked here: a compiler cannot ask a card.
        self._scales_inside = data.dtype != torch.int8 and _scales_inside(device or data.device)

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, token_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply ``[..., in]`` to ``[..., out]`` in the dtype of ``x``; in fp32 where ``x`` was scaled by a
        ``token_scale`` ``[..., 1]`` before."""
        rows = x.reshape(-1, x.shape[-1])
        scales = None if token_scale is None else token_scale.reshape(-1, 1)
        wanted = x.dtype if scales is None else torch.float32
        wide_bias = None if bias is None else bias.float()
        if torch.compiler.is_compiling() and wanted == torch.bfloat16 and self._scales_inside:
            # One kernel multiplies and scales, so that no sums are kept; the compiler makes one pass of the rest.
            tokens, scale = quantize_rows(rows, self.data.dtype)
            product = internals.multiply_fp8(tokens, self.data.t(), (scale, self.scale.t()), wanted)
            return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
        # In equal pieces: a last one of a few tokens would waste a kernel.
        step = -(-len(rows) // max(1, -(-len(rows) // _TOKENS)))
        places = [slice(start, start + step) for start in range(0, len(rows), step)]
        if torch.compiler.is_compiling():
            pieces = [self._piece(rows[place], wide_bias, scales, place).to(wanted) for place in places]
            return torch.cat(pieces).view(*x.shape[:-1], -1)
        result = torch.empty(len(rows), len(self.data), dtype=wanted, device=x.device)
        for place in places:
            result[place] = self._piece(rows[place], wide_bias, scales, place)
        return result.view(*x.shape[:-1], -1)

    def _piece(
        self, rows: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None, place: slice
    ) -> torch.Tensor:
        """Multiply the rows of ``place``: fp32 ``[rows, out]``."""
        tokens, scale = quantize_rows(rows, self.data.dtype)
        sums = self._sums(tokens).mul(self.scale.flatten())
        if scales is not None:
            scale = scale * scales[place]
        return sums.mul_(scale) if bias is None else torch.addcmul(bias, sums, scale)

    def _sums(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the matrix product, int32 or fp32."""
        if self.data.dtype == torch.int8 and tokens.device.type == "cpu":
            # torch's own is a plain loop there, twenty times slower than this. Sums of so few products are exact in
            # fp32, too: below 2^24.
            pieces = zip(*(x.float().split(_EXACT, dim=1) for x in (tokens, self.data)), strict=True)
            return sum(some @ weights.t() for some, weights in pieces)
        if self.data.dtype == torch.int8:
            more = _LEAST_ROWS - len(tokens)
            return internals.multiply_int8(tokens if more <= 0 else F.pad(tokens, (0, 0, 0, more)), self.data.t())[
                : len(tokens)
            ]
        return internals.multiply_fp8(tokens, self.data.t())

    def extra_repr(self) -> str:
        return f"{self.data.dtype}"


def _scales_inside(device: torch.device) -> bool:
    """Return whether a device has a product of fp8 that takes a scale for each token and row: CPUs, and of cards
    Hopper's and Blackwell's large ones in every torch that this runs with."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


class PackedLinear(nn.Module):
    """A Linear that keeps its weight packed, computing in the dtype of what it is given: ``[..., in]`` -> ``[...,
    out]``.

    It gives what a Linear with the widened weight gives, bit for bit, unless the activations are packed too. Unlike
    diffusers' layerwise casting it leaves the bias in the dtype it is stored in, and knows scales. ``weight`` is None:
    T5 casts activations to its dtype.
    """

    weight = None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: PackedWeight | DynamicWeight | None = None
        self.bias = linear.bias

    def load_packed(self, packed: PackedWeight | DynamicWeight) -> None:
        """Take the weight, without which the layer cannot run."""
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.packed, DynamicWeight):
            return self.packed(x, self.bias)
        if self.packed is None:
            raise RuntimeError("A packed layer was run before its weight was loaded.")
        return F.linear(x, self.packed(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize_rows(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to ``dtype`` (a key of ``LARGEST``); return them and the fp32 scales ``[rows, 1]`` that undo it.

    int8: no number is off by more than half its scale. fp8: by no more than 2^-4 of itself or 2^-10 of the scale. Inf
    and NaN go into the scales.
    """
    scale = (torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).float() / LARGEST[dtype]).clamp_min_(
        _LEAST_SCALE
    )
    quantized = rows / scale
    return (quantized.round_() if dtype == torch.int8 else quantized).to(dtype), scale


def in_pieces(
    weight: torch.Tensor, device: torch.device, columns: torch.Tensor | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a weight in fp32 on ``device``, a few rows at a time, divided by ``columns``; the receiver may change each
    piece."""
    # On the host a piece should fit its caches.
    count = max(1, (1 << (18 if device.type == "cpu" else 24)) // weight.shape[1])
    buffer = torch.empty(min(count, len(weight)), weight.shape[1], device=device)
    for start in range(0, len(weight), count):
        place = slice(start, min(start + count, len(weight)))
        rows = buffer[: place.stop - start].copy_(weight[place])
        yield place, rows if columns is None else rows.div_(columns)


#: What every diffusers that this runs with can widen (0.36 on); importing it to ask takes seconds.
_WIDENED = {"Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"}


def check_quantization(quantization: int, name: str, file: Path) -> None:
    """Check that diffusers can widen the tensor ``name`` of a file, before it is loaded.

    Raises:
        ValueError: if it cannot.
    """
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType(quantization)
    if kind.name in _WIDENED:
        return
    from diffusers.quantizers.gguf.utils import dequantize_functions

    if kind not in dequantize_functions:
        known = ", ".join(sorted(known.name for known in dequantize_functions))
        raise ValueError(
            f"{short(name)} in {short(file, 400)} is quantized as {kind.name}, which diffusers cannot read, so its "
            f"weights cannot be used. Choose a file in one of {known}."
        )


def dequantize(data: torch.Tensor, quantization: int) -> torch.Tensor:
    """Widen GGUF's bytes ``[rows, bytes]`` to numbers ``[rows, columns]``, by diffusers' kernels;
    ``check_quantization`` says whether it has one."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType

    return dequantize_gguf_tensor(GGUFParameter(data, quant_type=GGMLQuantizationType(quantization)))
