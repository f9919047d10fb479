"""Running compiled code as it is written, for as long as anybody measures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["eagerly"]

_lock = threading.RLock()  # the garbage collector may end a forgotten monitor in a thread that is in here
_holders = 0
_stance = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code holds the hooks that there were when it was compiled. Code that runs as it is written has all.

    `torch.compiler.set_stance` restores what it found, which is wrong where two monitors end in another order than the
    reverse of their beginning: the first to come sets the stance, and the last to go restores it.
    """
    global _holders, _stance
    with _lock:
        if _holders == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _stance.__exit__(None, None, None)
