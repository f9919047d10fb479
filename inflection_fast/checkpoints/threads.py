"""The number of threads for operators of a size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["threads_for"]

OPERATIONS = 2.5e8  # floating-point operations that keep one thread busy for some milliseconds


@contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Use one of torch's threads for every 2.5e8 floating-point operations of an operator, while the context is open.

    The threads of an operator wait for each other at its end. If other programs run on the same cores, one thread is
    often not running: a scan of a small model took ten times the processor time with two threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, round(min(before, operations / OPERATIONS))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
