"""What the rows and the columns of attention can report."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["AttentionColumns", "AttentionStats"]


class AttentionStats(NamedTuple):
    """Statistics of softmax rows, each float32 ``[..., Q]``.

    A row without any key has entropy 0, lse -inf, max_logit -inf, keys 0, collision 0 and sink 0. NaN or +inf at a
    position that is attended makes every field of that row NaN, except `keys`.
    """

    entropy: Tensor
    """Entropy of the probabilities, in nats."""
    lse: Tensor
    """Log-sum-exp of the scores."""
    max_logit: Tensor
    """Largest score that is attended."""
    keys: Tensor
    """Number of keys that are attended."""
    collision: Tensor
    """Sum of squared probabilities."""
    sink: Tensor
    """Probability of key 0, or of the sink column where there is one."""


class AttentionColumns(NamedTuple):
    """What keys receive over the rows of attention, each float32 ``[B, H, K]``.

    A key that no row attends has 0 and 0. A row that holds NaN makes the keys that it attends NaN.
    """

    mass: Tensor
    """Sum of the probabilities that rows give to the key."""
    squares: Tensor
    """Sum of their squares."""
