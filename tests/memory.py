"""The most memory a process has had."""

import resource
import sys


def peak_kilobytes() -> int:
    """Resident kilobytes at most so far. On Linux ``ru_maxrss`` begins at that of the process that started this one, so the system is asked."""
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
