"""Check whether tensors are finite: what is not ends in a black video."""

import torch


def is_finite(result: torch.Tensor | tuple) -> bool:
    """Return whether a tensor, or the first entry of a tuple, holds neither NaN nor Inf. Waits for the device once."""
    return bool((result[0] if isinstance(result, tuple) else result).isfinite().all())


def check_finite(tensor: torch.Tensor, what: str, remedy: str) -> None:
    """Refuse an input that is not finite, before time is spent on it.

    Raises:
        ValueError: naming ``what`` it is and the ``remedy``.
    """
    if tensor.dtype == torch.float64:
        # It is read in fp32 at most.
        tensor = tensor.float()
    if not is_finite(tensor):
        bad = (~tensor.isfinite()).sum().item()
        raise ValueError(
            f"{what} holds {bad:,} values that are NaN or Inf (of {tensor.numel():,}), which would end in a black "
            f"video. {remedy}"
        )
