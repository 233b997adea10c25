"""Memory that runs out: each back end of torch says so in its own way, and keeps what it has freed in a cache."""

import re

import torch

#: What errors of torch say: the drivers of CUDA, ROCm, MPS and XPU; the libraries of CUDA; torch's allocator in the
#: host's memory, on Linux and on Windows; and MPS of a buffer larger than Metal allows.
_SAID = re.compile(
    r"out of memory|out_of_(device|host)_memory|_alloc(ation)?_failed|can('|no)t allocate memory|not enough memory"
    "|invalid buffer size",
    re.IGNORECASE,
)
#: What newer versions of torch raise for an error of a driver.
_DRIVER_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory ran out, on a device or in the host's memory.

    Only CUDA's allocator, and newer ones of other devices, raise ``torch.OutOfMemoryError``. What the engine itself
    says of it, in errors of its own, does not count.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if type(error) not in (RuntimeError, _DRIVER_ERROR):
        return False
    return _SAID.search(str(error)) is not None


def empty_cache(device: torch.device) -> None:
    """Give back the memory of a device that torch has freed and still keeps."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()
