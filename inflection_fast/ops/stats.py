"""What one softmax row of attention can report."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["AttentionStats"]


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
