"""The rows of a batch that CKA compares: tokens or one row per sequence, and a sample of them within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

__all__ = ["POOLINGS", "RowSample", "feature_rows", "mean_rows"]


def mean_rows(output: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the tokens of each sequence of ``[B, T, D]``, float32 ``[B, D]``; 0 for a sequence without tokens."""
    weights = tokens.float() / tokens.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("btd,bt->bd", output.float().masked_fill(~tokens[..., None], 0.0), weights)


def first_token(output: Tensor, tokens: Tensor) -> Tensor:
    return output[torch.arange(len(output), device=output.device), tokens.int().argmax(1)]


def last_token(output: Tensor, tokens: Tensor) -> Tensor:
    last = tokens.shape[1] - 1 - tokens.flip(1).int().argmax(1)
    return output[torch.arange(len(output), device=output.device), last]


POOLED = {"mean": mean_rows, "first": first_token, "last": last_token}
POOLINGS = ("tokens", *POOLED)


def feature_rows(output: Tensor, tokens: Tensor | None = None, pooling: str = "tokens") -> tuple[Tensor, Tensor]:
    """Feature rows of a layer's output, and the sequence of each row.

    Args:
        output: ``[B, T, D]``.
        tokens: bool ``[B, T]``, True at tokens, False at padding, which is never read; None: no padding.
        pooling: "tokens": each token is a row; "mean", "first" or "last": one row per sequence. Tokens of one sequence
            are not independent, pooled rows are. The two answer different questions and give different values.

    Returns:
        Rows ``[n, D]`` (float32 for "mean", else in the dtype of `output`), and int64 ``[n]``, the index in the batch
        of each row's sequence, ascending. With "mean", "first" or "last" a sequence without tokens has no row.
    """
    if checks.tensor(output, "output").ndim != 3:
        raise ValueError(f"output: expected [B, T, D], got shape {list(output.shape)}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
    batch, length = output.shape[:2]
    if tokens is None:
        tokens = torch.ones(batch, length, dtype=torch.bool, device=output.device)
    if checks.tensor(tokens, "tokens").dtype != torch.bool:
        raise TypeError(f"tokens: expected dtype bool (True at tokens), got {tokens.dtype}")
    checks.shape(tokens, "tokens", (batch, length))
    sequences = torch.arange(batch, device=output.device)
    if pooling == "tokens":
        return output[tokens], sequences[:, None].expand(batch, length)[tokens]
    nonempty = tokens.any(1)
    return POOLED[pooling](output, tokens)[nonempty], sequences[nonempty]


class RowSample:
    """A sample of at most `budget` rows of `batches` batches; the same batches always give the same rows.

    Each batch gets an equal share of the rows that are left of the budget. Rows are drawn from `seed` on the CPU, so
    the choice does not depend on the device.
    """

    def __init__(self, budget: int, batches: int, seed: int = 0):
        self.budget = checks.integer(budget, "budget", 1)
        self.batches = checks.integer(batches, "batches", 1)
        self.seed = checks.integer(seed, "seed", 0)
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def keep(self, batch: int, count: int, taken: int) -> Tensor | None:
        """Indices of the rows to keep of batch number `batch`, of `count` rows, after `taken` rows; None: all."""
        share = -(-(self.budget - taken) // (self.batches - batch))
        if count <= share:
            return None
        key = (batch, count, share)
        if key not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed + batch)
            self._drawn[key] = torch.randperm(count, generator=generator)[:share].sort().values
        return self._drawn[key]
