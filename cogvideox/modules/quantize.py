"""Quantize while loading: make int8 or fp8 of the weights of attention and feed-forward, layer by layer.

Which layers: queries, keys, values and outputs of the attention, and both halves of the feed-forward; in T5 the same.
They are 85 % of the 1.5-5B transformer. Modulation (``norm1.linear``, ``norm2.linear``), embeddings of time, ``ofs``,
patches and text, ``norm_out`` and ``proj_out`` stay as they load without it, bit for bit: their errors would go into
every token, or into the video itself.

Weight-only, the weights take a byte each and are widened for each product: what runs is the unmodified module with
weights that are rounded. Dynamic, the activations are quantized too, token by token, and the product is one of int8 or
fp8. T5 is always weight-only: it runs once per prompt, and a few of its activations are so large (transformers keeps
``wo`` in fp32 for them) that a token's others would be rounded to zero.

Why not torchao, which has all four methods: its weights are tensor subclasses. diffusers 0.36, with which this pack
still runs, cannot offload them by groups; they report their bytes as if they were not quantized (0.18: ``nbytes`` of
an int8 weight is that of the fp32 one), which would make every memory plan wrong, and what ComfyUI frees too; they are
made of a module that is loaded already, which takes the memory that quantizing is to save; and they know no range-safe
fp16. The packed layers that fp8 files run with (``packed``) have all of that. What is fast in torchao's
dynamic methods, torch's own ``_int_mm`` and ``_scaled_mm``, is called from there.
"""

import re
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn

from ..choices import FP8_DYNAMIC, FP8_WEIGHT_ONLY, INT8_DYNAMIC, INT8_WEIGHT_ONLY
from ..dtypes import Precision
from ..variants import PARTS
from .packed import DynamicWeight, PackedLinear, PackedWeight, in_pieces, quantize_rows
from .range_safe import RangeSafeLinear

LAYERS = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))\.weight"),
    "text_encoder": re.compile(
        r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo))\.weight"
    ),
}


@dataclass(frozen=True)
class Method:
    """One of ``choices.QUANTIZE``.

    Attributes:
        dtype: of the weights, and of the activations if it is ``dynamic``.
    """

    name: str
    dtype: torch.dtype
    dynamic: bool

    @property
    def weight_only(self) -> "Method":
        """The same weights, with activations that are not quantized."""
        return next(method for method in METHODS.values() if method.dtype == self.dtype and not method.dynamic)

    def pack(self, data: torch.Tensor, scale: torch.Tensor, device: torch.device) -> PackedWeight | DynamicWeight:
        """Put quantized rows and the scales that undo it into the module that a layer holds, to run on ``device``."""
        return DynamicWeight(data, scale, device) if self.dynamic else PackedWeight(data, scale)


#: By name, those of ``choices.QUANTIZE``.
METHODS = {
    method.name: method
    for method in (
        Method(INT8_WEIGHT_ONLY, torch.int8, dynamic=False),
        Method(FP8_WEIGHT_ONLY, torch.float8_e4m3fn, dynamic=False),
        Method(INT8_DYNAMIC, torch.int8, dynamic=True),
        Method(FP8_DYNAMIC, torch.float8_e4m3fn, dynamic=True),
    )
}


def quantizes(kind: str, name: str, precision: Precision) -> bool:
    """Return whether the tensor ``name`` of a part is quantized where that part is."""
    if precision == Precision(torch.float16) and ".DenseReluDense.wo." in name:
        # transformers keeps it in fp32 there.
        return False
    return LAYERS[kind].fullmatch(name) is not None


@dataclass(frozen=True)
class Loss:
    """What quantizing one weight or several cost: sums over the weights, of squared errors and of squares."""

    error: float
    total: float

    @property
    def relative(self) -> float:
        """Relative L2 error."""
        return sqrt(self.error / self.total) if self.total else 0.0


class Quantizer:
    """Quantizes the weights of one part as they are read, and keeps count of what that costs.

    Attributes:
        losses: of each weight quantized so far, by name.
    """

    def __init__(self, method: Method, kind: str, precision: Precision, device: torch.device):
        """Set up an empty count; ``device`` is where it computes, piece by piece."""
        self.method, self._kind, self._precision, self._device = method, kind, precision, device
        self.losses: dict[str, Loss] = {}

    def takes(self, name: str) -> bool:
        """Return whether the tensor ``name`` of the part is to be quantized."""
        return quantizes(self._kind, name, self._precision)

    def quantize(self, name: str, weight: torch.Tensor, device: torch.device) -> PackedWeight | DynamicWeight:
        """Quantize a weight ``[out, in]`` of any floating dtype, with one scale per row, to ``device``.

        Raises:
            ValueError: if it holds NaN or Inf.
        """
        data = torch.empty(weight.shape, dtype=self.method.dtype, device=device)
        scales = torch.empty(len(weight), 1, device=device)
        sums = torch.zeros(2, dtype=torch.float64)
        for place, rows in in_pieces(weight, self._device):
            quantized, scale = quantize_rows(rows, self.method.dtype)
            data[place], scales[place] = quantized, scale
            sums[1] += _squares(rows)
            sums[0] += _squares(rows.sub_(quantized.float().mul_(scale)))
        if not scales.isfinite().all():
            raise ValueError(
                f"{name} of the {PARTS[self._kind][0]} holds NaN or Inf, so it cannot be quantized, and would turn "
                "the video black as it is. The file is damaged: download it again (scan_weights in the loader, or "
                "generate.py --check PATH --scan, lists what is wrong in it)."
            )
        self.losses[name] = Loss(*sums.tolist())
        return self.method.pack(data, scales, self._device)


def quantize_empty(module: nn.Module, method: Method, precision: Precision) -> None:
    """Give a transformer on the meta device, range-safe already if it is to be, the layers that it will run with: for
    what they take in memory."""
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Linear | RangeSafeLinear) or not quantizes(
            "transformer", f"{name}.weight", precision
        ):
            continue
        shape, meta = (layer.out_features, layer.in_features), torch.device("meta")
        data, scale = torch.empty(shape, dtype=method.dtype, device=meta), torch.empty(shape[0], 1, device=meta)
        packed = method.pack(data, scale, meta)
        if isinstance(layer, RangeSafeLinear):
            layer.load_empty(packed)
        else:
            path, _, leaf = name.rpartition(".")
            small = PackedLinear(layer)
            small.load_packed(packed)
            setattr(module.get_submodule(path), leaf, small)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares: each row in fp32, their sum in float64, on the host, as not every device has it."""
    return torch.linalg.vector_norm(rows, dim=-1).cpu().double().square_().sum()
