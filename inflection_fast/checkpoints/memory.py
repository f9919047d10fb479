"""Memory of the process: resident, peak, and returning free memory to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes", "resident_bytes", "trim_memory"]

_STATUS = Path("/proc/self/status")


def trim_memory() -> None:
    """Return free memory to the system, with the GNU C library.

    It keeps freed pieces smaller than some MiB, such as weights and activations of small models: half of a model's size
    was still resident after the model was deleted.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """The resident memory of this process; on other systems than Linux its peak."""
    return _of_status("VmRSS") if _STATUS.exists() else peak_bytes()


def peak_bytes() -> int:
    """The peak of the resident memory of this process."""
    if _STATUS.exists():  # on Linux ru_maxrss starts at the value of the parent process
        return _of_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
