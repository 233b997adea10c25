"""Name dtypes, and say how a part runs in one."""

from dataclasses import dataclass

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8 (e4m3fn)",
    torch.float8_e5m2: "fp8 (e5m2)",
    torch.int8: "int8",
}


def dtype_name(dtype: torch.dtype | str) -> str:
    """Name a dtype: ``torch.bfloat16`` -> ``bf16``; what is a name already (``GGUF Q4_K``) stays."""
    known = _NAMES.get(dtype) if isinstance(dtype, torch.dtype) else None
    return known or str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Precision:
    """How a part runs: the dtype of its weights and matrix products, and whether what lies between them is kept in
    range.

    Attributes:
        range_safe: matrix products in ``dtype``, all else in fp32 (``range_safe.make_range_safe``); only with float16.
    """

    dtype: torch.dtype
    range_safe: bool = False

    @property
    def name(self) -> str:
        return f"range-safe {dtype_name(self.dtype)}" if self.range_safe else dtype_name(self.dtype)

    @property
    def activations(self) -> torch.dtype:
        """The dtype that goes in and comes out."""
        return torch.float32 if self.range_safe else self.dtype


RANGE_SAFE_FP16 = Precision(torch.float16, range_safe=True)
FP32 = Precision(torch.float32)
