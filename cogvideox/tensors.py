"""Check tensors that come in or are to be made: whether they can be read, and whether this computer can hold them."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .words import size_text

#: What numbers may come in; other dtypes hold indices, truth values, or weights that another model unpacks.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Times the memory that a system can have beyond it, where its swap grows as it is needed (Windows, macOS).
_GROWING = 3
#: Where nothing is known of a machine: more than any has.
_ANY_MACHINE = 1 << 44
#: Where Linux has the limits of a container.
_CGROUPS = Path("/sys/fs/cgroup")


def check_tensor(value: object, what: str, remedy: str) -> torch.Tensor:
    """Refuse what is not floating-point numbers in memory, whatever made it.

    Args:
        what: what it is, for the message: ``The latent``.
        remedy: what to do, a sentence.

    Returns:
        The tensor, detached from autograd.

    Raises:
        ValueError: for anything that cannot be calculated with, or that this computer cannot hold.
    """
    flaw = _flaw(value)
    if flaw is not None or not isinstance(value, torch.Tensor):
        raise ValueError(f"{what} {flaw}, and it has to be a tensor of floating-point numbers in memory. {remedy}")
    nbytes = value.numel() * value.itemsize
    if nbytes > value.untyped_storage().nbytes():
        # One number may stand for many (expand); what is made of them does not.
        check_room(nbytes, f"{what} ({tensor_text(value)})", remedy)
    return (
        value if type(value) is torch.Tensor and not value.requires_grad else value.detach().as_subclass(torch.Tensor)
    )


def _flaw(value: object) -> str | None:
    """Say what keeps a value from being read as numbers; None if nothing does."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__} and no tensor"
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(value).__name__}, which only stands for a tensor"
    if value.is_nested:
        return "is a nested tensor, of pieces of unequal size"
    if value.device.type == "meta":
        return f"is on the meta device: a shape ({list(value.shape)}) without numbers"
    if value.layout is not torch.strided:
        return f"is stored sparsely ({str(value.layout).removeprefix('torch.')})"
    if value.dtype not in _FLOATS:
        return f"holds {str(value.dtype).removeprefix('torch.')}"
    if value.numel() and not value.untyped_storage().nbytes():
        return "has been freed by who made it"
    return None


def tensor_text(value: torch.Tensor) -> str:
    """Write a tensor's dtype and shape: ``float32 [1, 16, 3]``."""
    shape = "of pieces" if value.is_nested else list(value.shape)
    return f"{str(value.dtype).removeprefix('torch.')} {shape}"


def check_room(nbytes: int, what: str, remedy: str) -> None:
    """Refuse what no memory of this computer can hold, before it is tried.

    Raises:
        ValueError: with the bytes ``what`` would take, what there is, and the ``remedy``.
    """
    there = host_bytes()
    if nbytes > there:
        raise ValueError(
            f"{what} would take {size_text(nbytes, 1)} of memory, and this computer has {size_text(there, 1)}, swap "
            f"included. {remedy}"
        )


def host_bytes() -> int:
    """Return how many bytes this process can have at most, swap included: all of the computer's, or less where the
    system allows less."""
    limits = []
    if sys.platform == "win32":
        limits.append(_GROWING * _windows_memory() or _ANY_MACHINE)
    elif Path("/proc/meminfo").is_file():
        with suppress(OSError, ValueError, KeyError):
            table = dict(
                line.split(":", 1)
                for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
                if ":" in line
            )
            memory, swap = (int(table[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
            limits.append(memory + swap)
            # Of a container, in both versions of cgroups; without a number where there is none.
            for file in ("memory.max", "memory/memory.limit_in_bytes"):
                with suppress(OSError, ValueError):
                    limits.append(int((_CGROUPS / file).read_text(encoding="ascii")) + swap)
    else:
        with suppress(OSError, ValueError, AttributeError):
            limits.append(_GROWING * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            limits.append(max(0, limit - taken))
    return min(limits, default=_ANY_MACHINE)


def free_host_bytes() -> int:
    """Return how many bytes this process can take now without anything being moved to disk: what files are mapped or
    cached in counts, as the system gives it up."""
    free = []
    # It comes with accelerate.
    with suppress(ImportError, OSError, RuntimeError):
        import psutil  # type: ignore[import-untyped]

        free.append(psutil.virtual_memory().available)
    # Of a container, in both versions of cgroups.
    for folder, limit, taken, total in (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError, KeyError):
            group = _CGROUPS / folder
            most, now = (int((group / file).read_text(encoding="ascii")) for file in (limit, taken))
            known = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            # What was read twice is among what the system calls active, and is given up all the same.
            cached = sum(int(known[f"{total}{kind}_file"]) for kind in ("inactive", "active"))
            free.append(max(0, most - now + cached))
    return min(free, default=_ANY_MACHINE)


def _windows_memory() -> int:
    """Return the computer's memory in bytes, 0 where Windows does not say."""
    import ctypes

    class Status(ctypes.Structure):
        # https://learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("others", ctypes.c_ulonglong * 6),
        ]

    status = Status(length=ctypes.sizeof(Status))
    # ctypes has it on Windows only, as its type hints say.
    windll: Any = vars(ctypes)["windll"]
    return status.total if windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else 0
