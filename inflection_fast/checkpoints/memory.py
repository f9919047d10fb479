"""Memory of the process: what it holds, what it held at most, and giving back what is free."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

__all__ = ["give_back", "peak_bytes", "resident_bytes"]

_STATUS = Path("/proc/self/status")


def give_back() -> None:
    """Return free memory to the system. Nothing happens where the C library is not that of GNU.

    It keeps what is freed in pieces of less than some MiB, such as weights and activations of small models: half of a
    model's size was still held after the model was gone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """The memory that this process has now; on other systems than Linux the most that it has had."""
    return _of_status("VmRSS") if _STATUS.exists() else peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has had."""
    if _STATUS.exists():  # ru_maxrss of Linux begins with what the parent of the process had
        return _of_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
