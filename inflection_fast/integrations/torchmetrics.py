"""Attention entropy and CKA as torchmetrics metrics: their `update`, `compute`, `reset`, `merge_state` and `sync`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from inflection_fast.ops import CkaState, attention_stats_qk

__all__ = ["AttentionEntropy", "LinearCKA"]


class AttentionEntropy(Metric):
    """Mean attention entropy in nats over all query rows with a key, of all updates and ranks.

    Args:
        num_heads: H, heads of the queries.
        per_head: one value for each head; False: their mean.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, num_heads: int, per_head: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads: expected an int of at least 1, got {num_heads!r}")
        self.num_heads, self.per_head = num_heads, per_head
        for name in ("total", "rows"):
            self.add_state(name, torch.zeros(num_heads, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, query: Tensor, key: Tensor, valid: Tensor | None = None, **options: Any) -> None:
        """Add the rows of one attention call.

        Args:
            query: ``[B, H, Q, D]``, float32, bfloat16 or float16.
            key: ``[B, Hkv, K, D]``.
            valid: bool ``[B, Q]``, True for rows that count (tokens, not padding); None: all. With `rows` ``[R]`` it is
                ``[B, R]``.
            **options: of `attention_stats_qk`: `attn_mask`, `is_causal`, `scale`, `rows`, ...
        """
        with torch.no_grad():
            stats = attention_stats_qk(query, key, **options)
        if stats.entropy.shape[1] != self.num_heads:
            raise ValueError(f"query: expected {self.num_heads} heads, got {stats.entropy.shape[1]}")
        counts = stats.keys > 0
        if valid is not None:
            if valid.dtype != torch.bool or valid.shape != counts[:, 0].shape:
                got = f"{valid.dtype} {list(valid.shape)}"
                raise ValueError(f"valid: expected bool {list(counts[:, 0].shape)}, got {got}")
            counts = counts & valid[:, None]
        self.total += stats.entropy.double().masked_fill(~counts, 0.0).sum((0, 2))
        self.rows += counts.sum((0, 2))

    def compute(self) -> Tensor:
        """float32 ``[H]``, or their mean ``[]``; NaN where no row counted."""
        means = (self.total / self.rows).float()
        return means if self.per_head else means.mean()


class LinearCKA(Metric):
    """Linear CKA of pairs of features, exact for any split of the rows into updates and ranks.

    Its state is that of a `CkaState`, 4 (dim + dim_y + 3)^2 bytes a layer. `sync` gathers the states of all ranks, as
    torchmetrics does; `CkaState.sync` needs less memory on many ranks.

    Args:
        layers: pairs of features, L.
        dim: width of x.
        dim_y: width of y; None: that of x.
        debiased: see `linear_cka`.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    sums: Tensor

    def __init__(self, layers: int, dim: int, dim_y: int | None = None, debiased: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        state = CkaState(layers, dim, dim_y)
        self.layers, self.dim, self.dim_y, self.debiased = state.layers, state.dim, state.dim_y, debiased
        self.add_state("sums", torch.zeros(state.gram.numel() + state.shift.numel()).double(), self._merged)

    def _state(self, sums: Tensor) -> CkaState:
        """A state whose Gram matrices are a view of `sums`; its shift is a float32 copy of the end of `sums`."""
        width = self.layers * (self.dim + self.dim_y)
        gram, shift = sums[:-width].view(self.layers, -1), sums[-width:].view(self.layers, -1)
        state = CkaState(self.layers, self.dim, self.dim_y, gram=gram)
        state.shift.copy_(shift)
        return state

    def _merged(self, stacked: Tensor) -> Tensor:
        """The merged sums of several ranks, or of two metrics, ``[n, ...]``."""
        merged = stacked[0].clone()
        state = self._state(merged)
        for other in stacked[1:]:
            state.merge_state(self._state(other))
        merged[-state.shift.numel() :] = state.shift.flatten()
        return merged

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> None:
        """Add rows x ``[L, N, dim]`` and y ``[L, N, dim_y]``; arguments as for `CkaState.update`."""
        state = self._state(self.sums)
        state.update(x, y, mask)
        self.sums[-state.shift.numel() :] = state.shift.flatten()

    def compute(self) -> Tensor:
        """float32 ``[L]``; NaN as for `CkaState.compute`."""
        return self._state(self.sums).compute(debiased=self.debiased)
