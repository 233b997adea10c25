"""What will fit on a device."""

import torch

#: Share of the free memory that is counted on: allocators and convolutions' workspaces take some too.
_SHARE = 0.85


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be taken on a device now; None where memory is not counted (the host, whose system swaps, and other back ends)."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is free too.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + idle) * _SHARE)
