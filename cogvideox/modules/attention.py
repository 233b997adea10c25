"""Choose the kernel that computes the attention: diffusers' attention dispatch, and what of it this machine has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

from ..choices import AUTO, BACKENDS, CUDNN, FLASH, FLASH3, SAGE, SDPA, XFORMERS
from ..words import short
from .internals import LibraryModule

#: Those that also take fp32.
_FP32 = (AUTO, SDPA, XFORMERS)
#: Choice -> the package it needs, the lowest version of it that diffusers' dispatch can call, and the CUDA compute
#: capabilities it runs on.
_NEEDS: dict[str, tuple[str | None, str | None, Callable[[tuple[int, int]], bool]]] = {
    CUDNN: (None, None, lambda capability: capability >= (8, 0)),
    FLASH: ("flash_attn", "2.6.3", lambda capability: capability >= (8, 0)),
    FLASH3: ("flash_attn_interface", None, lambda capability: capability[0] == 9),
    XFORMERS: ("xformers", "0.0.29", lambda capability: capability >= (7, 0)),
    SAGE: ("sageattention", "2.1.1", lambda capability: capability >= (8, 0)),
}


def available(device: torch.device) -> tuple[str, ...]:
    """List the choices that will run on a device with what is installed, the default first."""
    return tuple(name for name in BACKENDS if _missing(name, device) is None)


def check_attention(choice: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse an attention that will not run.

    Args:
        dtype: of the attention's inputs.

    Raises:
        ValueError: with what is missing.
    """
    there = ", ".join(available(device))
    if choice not in BACKENDS:
        raise ValueError(
            f"The attention is {short(repr(choice))}, which is not known here, so it cannot be used. Choose one of "
            f"those there are: {there}."
        )
    missing = _missing(choice, device)
    if missing:
        raise ValueError(
            f"The attention {choice} will not run here: {missing}. Choose one of those that will: {there}."
        )
    if dtype == torch.float32 and choice not in _FP32:
        raise ValueError(
            f"The attention {choice} computes in 16 bits only, and the model runs in fp32. Choose sdpa, or in the "
            "loader a dtype of 16 bits."
        )


@contextmanager
def attention_attached(choice: str, module: LibraryModule) -> Iterator[None]:
    """Have a transformer's attention computed as chosen for the length of a ``with`` block."""
    processors = {id(block.attn1.processor): block.attn1.processor for block in module.transformer_blocks}.values()
    before = [processor.backend for processor in processors]
    for processor in processors:
        processor.backend = BACKENDS[choice]
    try:
        yield
    finally:
        for processor, backend in zip(processors, before, strict=True):
            processor.backend = backend


def _missing(choice: str, device: torch.device) -> str | None:
    """Say what keeps a choice from running; None if nothing does."""
    if choice not in _NEEDS:
        return None
    package, lowest, runs_on = _NEEDS[choice]
    if device.type != "cuda":
        return f"it needs an NVIDIA card, and the model runs on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability):
        return f"it does not support this card (compute capability {capability[0]}.{capability[1]})"
    if package is None:
        return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    if lowest is not None and TorchVersion(version(package)) < lowest:
        return f"the package {package} is {version(package)}, and diffusers calls {lowest} and newer only"
    return None
