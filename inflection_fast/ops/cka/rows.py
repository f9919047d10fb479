"""Which rows of a batch CKA compares: tokens or one row per sequence, and no more of them than a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

__all__ = ["POOLINGS", "RowSample", "feature_rows", "mean_rows"]


def every_token(output: Tensor, tokens: Tensor) -> Tensor:
    return output[tokens]


def mean_rows(output: Tensor, tokens: Tensor) -> Tensor:
    """The mean over the tokens of every sequence of ``[B, T, D]``, float32 ``[B, D]``; 0 for one without tokens."""
    weights = tokens.float() / tokens.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("btd,bt->bd", output.float().masked_fill(~tokens[..., None], 0.0), weights)


def first_token(output: Tensor, tokens: Tensor) -> Tensor:
    return output[torch.arange(len(output), device=output.device), tokens.int().argmax(1)]


def last_token(output: Tensor, tokens: Tensor) -> Tensor:
    last = tokens.shape[1] - 1 - tokens.flip(1).int().argmax(1)
    return output[torch.arange(len(output), device=output.device), last]


POOLED = {"tokens": every_token, "mean": mean_rows, "first": first_token, "last": last_token}
POOLINGS = tuple(POOLED)


def feature_rows(output: Tensor, tokens: Tensor | None = None, pooling: str = "tokens") -> tuple[Tensor, Tensor]:
    """Feature rows of a layer's output, and which sequence each is of.

    Args:
        output: ``[B, T, D]``.
        tokens: bool ``[B, T]``, True at tokens, False at padding, which is never read; None: every position counts.
        pooling: "tokens": every token is a row; "mean", "first" or "last": one row per sequence. Rows of one sequence
            depend on each other, pooled ones do not; the two answer different questions and give different values.

    Returns:
        Rows ``[n, D]`` (float32 for "mean", else in the dtype of `output`), and int64 ``[n]``, the number of a row's
        sequence in the batch, ascending. With "mean", "first" or "last" a sequence without tokens has no row.
    """
    if checks.tensor(output, "output").ndim != 3:
        raise ValueError(f"output: expected [B, T, D], got shape {list(output.shape)}")
    if pooling not in POOLED:
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
    batch, length = output.shape[:2]
    if tokens is None:
        tokens = torch.ones(batch, length, dtype=torch.bool, device=output.device)
    if checks.tensor(tokens, "tokens").dtype != torch.bool:
        raise TypeError(f"tokens: expected dtype bool (True at tokens), got {tokens.dtype}")
    if tuple(tokens.shape) != (batch, length):
        raise ValueError(f"tokens: expected shape {[batch, length]}, got {list(tokens.shape)}")
    sequences = torch.arange(batch, device=output.device)
    if pooling == "tokens":
        return every_token(output, tokens), sequences[:, None].expand(batch, length)[tokens]
    there = tokens.any(1)
    return POOLED[pooling](output, tokens)[there], sequences[there]


class RowSample:
    """At most `budget` rows of `batches` batches, the same ones whenever the same batches come again.

    What earlier batches left of the budget is shared evenly among those still to come. Drawn from `seed` on the CPU, so
    the choice does not depend on the device.
    """

    def __init__(self, budget: int, batches: int, seed: int = 0):
        self.budget = checks.integer(budget, "budget", 1)
        self.batches = checks.integer(batches, "batches", 1)
        self.seed = checks.integer(seed, "seed", 0)
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def keep(self, batch: int, count: int, taken: int) -> Tensor | None:
        """Which of the `count` rows of batch number `batch` to keep, ascending, `taken` being kept; None: all."""
        share = -(-(self.budget - taken) // (self.batches - batch))
        if count <= share:
            return None
        key = (batch, count, share)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed + batch)
            self._drawn[key] = torch.randperm(count, generator=generator)[:share].sort().values
        return self._drawn[key]
