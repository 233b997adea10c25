"""Choose the kernel that computes the attention: diffusers' attention dispatch, and what of it this machine has."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import NoReturn

import torch

from ..choices import (
    AUTO,
    BACKENDS,
    CUDNN,
    FASTEST,
    FLASH,
    FLASH3,
    FLASH3_HUB,
    FLASH_HUB,
    SAGE,
    SAGE_HUB,
    SDPA,
    XFORMERS,
)
from ..dependencies import importable, installed, is_at_least, is_older
from ..out_of_memory import is_out_of_memory
from ..words import reason, short
from . import internals
from .fastest import Fastest, Kernel, Shape, find_fastest
from .internals import LibraryModule
from .joint import SCORE_BYTES, attend_in_pieces

#: Those that also take fp32.
_FP32 = (AUTO, SDPA, XFORMERS, FASTEST)
#: Kernels that differ from SDPA by rounding only, those of the hub apart: SDPA first.
_EXACT = (SDPA, CUDNN, FLASH, FLASH3, XFORMERS)
#: Kernels that are code of the hub.
_HUB = (FLASH_HUB, FLASH3_HUB, SAGE_HUB)
#: Choice -> the package it needs, the lowest version of it that diffusers' dispatch can call, and the CUDA compute
#: capabilities it runs on.
_NEEDS: dict[str, tuple[str | None, str | None, Callable[[tuple[int, int]], bool]]] = {
    CUDNN: (None, None, lambda capability: capability >= (8, 0)),
    FLASH: ("flash_attn", "2.6.3", lambda capability: capability >= (8, 0)),
    FLASH3: ("flash_attn_interface", None, lambda capability: capability[0] == 9),
    XFORMERS: ("xformers", "0.0.29", lambda capability: capability >= (7, 0)),
    SAGE: ("sageattention", "2.1.1", lambda capability: capability >= (8, 0)),
    FLASH_HUB: ("kernels", "0.12", lambda capability: capability >= (8, 0)),
    FLASH3_HUB: ("kernels", "0.12", lambda capability: capability[0] == 9),
    SAGE_HUB: ("kernels", "0.12", lambda capability: capability >= (8, 0)),
}
#: Bytes that scores may take where a device has no kernel that goes without them. A step of the model card's size has
#: 98 billion of them for each prompt.
_MOST_SCORES = 1 << 29
#: Tokens that a kernel is tried with.
_FEW = 256
#: What was timed in this process, by kernels, shape, dtype and device.
_timed: dict[tuple, Fastest] = {}
#: Kernels of the hub that were chosen, and fetched, in this process.
_fetched: set[str] = set()


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
    if choice not in BACKENDS:
        raise ValueError(
            f"The attention is {short(repr(choice))}, which is not known here, so it cannot be used. Choose one of "
            f"those there are: {', '.join(available(device))}."
        )
    missing = _missing(choice, device) or _unloadable(choice)
    if missing:
        there = ", ".join(name for name in available(device) if not _unloadable(name))
        raise ValueError(
            f"The attention {choice} will not run here: {missing}. Choose one of those that will: {there}."
        )
    if dtype == torch.float32 and choice not in _FP32:
        raise ValueError(
            f"The attention {choice} computes in 16 bits only, and the model runs in fp32. Choose sdpa, or in the "
            "loader a dtype of 16 bits (--dtype)."
        )


@contextmanager
def attention_attached(
    choice: str,
    module: LibraryModule,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tell: Callable[[str, int], None],
) -> Iterator[None]:
    """Have a transformer's attention computed as chosen for the length of a ``with`` block.

    Args:
        shape, dtype, device: of queries, keys and values, at which ``fastest`` times the kernels.
        tell: called with sentences for the user, and logging's level of each.

    Raises:
        RuntimeError: if a kernel of the hub cannot be fetched, or the kernel does not run on this card.
    """
    if dtype == torch.float32 and choice not in _FP32:
        # Refused for a model in fp32: this one was healed, in the middle of a run.
        tell(f"The attention {choice} computes in 16 bits only, so in fp32 sdpa takes its place.", logging.INFO)
        choice = SDPA
    if choice in _HUB:
        _fetch(choice, tell)
    # Some kernels run on the card that is current, and leave theirs so.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        if choice == FASTEST:
            choice = _fastest(shape, dtype, device, tell)
        elif choice not in (AUTO, SDPA):
            _try_once(choice, shape, dtype, device)
    most = _MOST_SCORES if _scores_bytes(choice, shape, dtype, device) > _MOST_SCORES else None
    processors = {id(block.attn1.processor): block.attn1.processor for block in module.transformer_blocks}.values()
    before = [(processor.backend, processor.most_scores) for processor in processors]
    for processor in processors:
        processor.backend, processor.most_scores = _backend(choice), most
    try:
        yield
    finally:
        for processor, (backend, scores) in zip(processors, before, strict=True):
            processor.backend, processor.most_scores = backend, scores


def attends_in_pieces(module: LibraryModule) -> bool:
    """Return whether a transformer that attention is attached to computes it in pieces."""
    return any(block.attn1.processor.most_scores is not None for block in module.transformer_blocks)


def bytes_beside(choice: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that a choice takes at most beside queries, keys, values and the result."""
    if choice == CUDNN or (choice == FASTEST and _missing(CUDNN, device) is None):
        # diffusers gives it copies of all three.
        return 3 * shape.batch * shape.tokens * shape.heads * shape.channels * dtype.itemsize
    return min(_MOST_SCORES, _scores_bytes(choice, shape, dtype, device))


def _scores_bytes(choice: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the scores of an attention, if the choice keeps them."""
    if choice not in (AUTO, SDPA, FASTEST) or not internals.lacks_fused_attention(dtype, device, shape.channels):
        return 0
    return shape.batch * shape.heads * shape.tokens**2 * SCORE_BYTES


def exact_kernels(device: torch.device, dtype: torch.dtype, channels: int = 64) -> dict[str, Kernel]:
    """Return the kernels that differ by rounding only and will run here, by name, SDPA first. Those of the hub are
    among them only once they were chosen, as the first use downloads code."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    there = [name for name in _EXACT if _missing(name, device) is None]
    there += [name for name in (FLASH_HUB, FLASH3_HUB) if name in _fetched]
    kernels: dict[str, Kernel] = {}
    keeps_scores = internals.lacks_fused_attention(dtype, device, channels)
    for name in there:
        if dtype != torch.float32 or name in _FP32:
            unloadable = _unloadable(name)
            kernels[name] = (
                partial(dispatch_attention_fn, backend=_backend(name))
                if unloadable is None
                else partial(_refuse, unloadable)
            )
            if name == SDPA and keeps_scores:
                kernels[name] = partial(attend_in_pieces, kernels[name], _MOST_SCORES)
    return kernels


def _refuse(why: str, *_: torch.Tensor) -> NoReturn:
    """Stand in for a kernel that cannot be called, so that ``fastest`` says why."""
    raise RuntimeError(why)


def _fastest(shape: Shape, dtype: torch.dtype, device: torch.device, tell: Callable[[str, int], None]) -> str:
    """Return the fastest exact kernel at a shape: timed once in a process, and told each time."""
    kernels = exact_kernels(device, dtype, shape.channels)
    key = tuple(kernels), shape, dtype, device
    if key not in _timed:
        _timed[key] = find_fastest(kernels, shape, dtype, device)
    tell(_timed[key].text, logging.INFO)
    return _timed[key].choice


def _backend(choice: str) -> object:
    """Return diffusers' name of a choice, as the member of its list that a compiler can read."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(BACKENDS[choice])


def _fetch(choice: str, tell: Callable[[str, int], None]) -> None:
    """Have diffusers load a kernel of the hub, which downloads it the first time.

    Raises:
        RuntimeError: if that fails.
    """
    from diffusers.models.attention_dispatch import attention_backend

    if choice in _fetched:
        return
    tell(
        f"The attention {choice} is code of the Hugging Face hub, downloaded when it is first used.",
        logging.INFO,
    )
    try:
        with attention_backend(_backend(choice)):
            pass
    # Of any type: the package loads code that it has just downloaded.
    except Exception as error:
        raise RuntimeError(
            f"The attention {choice} could not be loaded from the Hugging Face hub ({reason(error)}). Choose fastest "
            "or sdpa, or see to the connection and try again."
        ) from error
    _fetched.add(choice)


def _try_once(choice: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Call a kernel with a few tokens: a package may have been built for other cards than this one, which it says when
    it is called.

    Raises:
        RuntimeError: if the kernel raises.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    query = torch.zeros(shape.batch, min(shape.tokens, _FEW), shape.heads, shape.channels, dtype=dtype, device=device)
    try:
        dispatch_attention_fn(query, query.clone(), query.clone(), backend=_backend(choice))
    # Of any type: the kernel is another package's.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            f"The attention {choice} does not run on this card ({reason(error)}). Choose fastest or sdpa."
        ) from error


def _unloadable(choice: str) -> str | None:
    """Say why diffusers cannot use a package that is installed, which often was built for another PyTorch; None where
    it can."""
    package = _NEEDS[choice][0] if choice in _NEEDS and choice not in _HUB else None
    refused = None if package is None else internals.refuses_attention(_backend(choice))
    if package is None or refused is None:
        return None
    try:
        import_module(package)
        why: Exception = refused
    # Whatever the package raises.
    except Exception as error:
        why = error
    found = f"{package} {installed(package) or ''}".rstrip()
    return (
        f"the package {found} is installed but cannot be loaded ({reason(why)}), so it needs the build for PyTorch "
        f"{torch.__version__}"
    )


def _missing(choice: str, device: torch.device) -> str | None:
    """Say what keeps a choice from running; None if nothing does."""
    if choice not in _NEEDS:
        return None
    package, lowest, runs_on = _NEEDS[choice]
    if device.type != "cuda":
        return f"it needs an NVIDIA card, and the model runs on {device.type}"
    if torch.version.hip is not None and choice not in (FLASH, XFORMERS):
        return "it needs an NVIDIA card, and this is one of AMD's"
    capability = torch.cuda.get_device_capability(device)
    # What torch calls a compute capability on AMD's is another number.
    if torch.version.hip is None and not runs_on(capability):
        return f"it does not support this card (compute capability {capability[0]}.{capability[1]})"
    if package is None:
        return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"
    found = installed(package)
    if not importable(package) or (lowest is not None and found is None):
        return f"the package {package} is not installed"
    if lowest is not None and found is not None and is_older(found, lowest):
        old = f"the package {package} is {found}, and diffusers calls {lowest} and newer only"
        # Seen with 1.5 (https://github.com/kijai/ComfyUI-CogVideoXWrapper/issues/356).
        known = ". pip install sageattention gives 1.0.6, which makes black frames with CogVideoX-1.5"
        return f"{old}{known if choice == SAGE else ''}"
    if choice in _HUB and not is_at_least("diffusers", "0.37"):
        return f"diffusers is {installed('diffusers')}, and has this kernel from 0.37"
    return None
