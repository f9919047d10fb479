"""How many threads work on operators of a size: no more than can be of use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["threads_for"]

OPERATIONS = 2.5e8  # floating-point operations that keep one thread busy for some milliseconds


@contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Of torch's threads one for every 2.5e8 floating-point operations of an operator, while the context is open.

    The threads of an operator wait for each other at its end. Where other programs run on the same cores, one of them
    is not running most of the time: a scan of a small model then took ten times the processor time with two threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, round(min(before, operations / OPERATIONS))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
