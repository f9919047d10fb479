"""One forward pass of a measured step and the backward pass that follows it."""

from __future__ import annotations

from .rows import ValidRows

__all__ = ["MicroBatch"]


class MicroBatch:
    """What one training forward has shown so far, and what its backward pass still has to find."""

    def __init__(self, index: int, valid: ValidRows):
        self.index = index
        self.valid: ValidRows | None = valid
        self.live = True  # False once its step is over: hooks of a graph that lives longer must not write
        self.entered: set[int] = set()  # layers whose block ran
        self.attended: set[int] = set()  # those whose attention was seen
        # layer -> of every call (statistics [B, H, R], valid rows [B, R], strata), to be added up
        self.waiting: dict[int, list[tuple]] = {}
        self.waiting_bytes = 0
        self.added = False  # some of it is in the sums, and cannot be taken out any more
        self.strata: dict[int, object] = {}  # query length -> positions, shared by all layers
        self.positions: dict[int, int] = {}  # layer -> queries of a head, of all rows of the batch
        self.awaits_gradient: set[int] = set()  # layers whose output has a hook
        self.went_back = False  # a backward pass went through it
        self.reads_parameters = False  # an engine callback is on its way

    def end_forward(self) -> None:
        """Let go of what only the forward needs: among it are the masks of the batch, which may be large."""
        self.valid = None
        self.strata.clear()
        self.waiting.clear()
