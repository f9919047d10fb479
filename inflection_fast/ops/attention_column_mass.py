"""Column sums of attention probabilities, fused from queries, keys and the log-sum-exp of the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .qk_arguments import PackedSequences, qk_arguments

__all__ = ["AttentionColumns", "attention_column_mass"]


class AttentionColumns(NamedTuple):
    """Column sums of attention, each float32 ``[B, H, K]``.

    Both are 0 for a key that no row attends. A row with NaN makes the keys that it attends NaN.
    """

    mass: Tensor
    """Sum of the probabilities of the key over the rows."""
    squares: Tensor
    """Sum of their squares."""


def attention_column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | PackedSequences | None = None,
) -> AttentionColumns:
    """How much attention each key receives, and how concentrated it is.

    Equivalent to: ``s = scale * query @ key.mT + mask; p = (s - lse[..., None]).exp().clamp(max=1); p.sum(-2),
    p.square().sum(-2)``

    No matrix of scores is stored. One thread adds up each number in a fixed order, so the result is deterministic for
    any number of threads. If `lse` comes from ``attention_stats_qk(..., sinks=...)``, the sinks take their share and
    the mass adds up to less than the number of rows. Probabilities are at most 1; their relative error is the rounding
    error of a float32 `lse`, 6e-8 times its size.

    Not differentiable.

    Args:
        query: ``[B, H, Q, D]``, float32, bfloat16 or float16, any strides, D at most 512.
        key: ``[B, Hkv, K, D]``, like `query`; H a multiple of Hkv (grouped queries).
        lse: float32 ``[B, H, Q]``, or ``[B, H, R]`` with `rows`, as `attention_stats_qk` returns it for the same
            options. A row with -inf does not count.
        attn_mask: as in `attention_stats_qk`, as all options below.
        is_causal: row i attends keys j <= i (aligned top-left).
        scale: factor of the scores; None is ``1 / sqrt(D)``.
        window: (left, right): row i attends keys i - left <= j <= i + right; -1 or None is no bound.
        softcap: c > 0 makes the scores ``c * tanh(s / c)`` before the mask; None leaves them.
        rows: int64 ``[R]``, query positions to sum over; repeated positions count repeatedly. On CUDA, and under
            torch.compile, a position outside ``[0, Q)`` does not count.
        cu_seqlens: cumulative lengths of packed sequences.

    Returns:
        `AttentionColumns`: `mass` and `squares`, each float32 ``[B, H, K]``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or head counts that do not fit, a number out of range.
    """
    query, key, attn_mask, *options = qk_arguments(
        query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens
    )
    checks.device_tensor(lse, "lse", query, "query", torch.float32)
    checks.shape(lse, "lse", (*query.shape[:2], query.shape[2] if rows is None else rows.shape[0]))
    checks.no_tangent("attention_column_mass", query, key, lse, attn_mask, differentiable=False)
    query, key, attn_mask = query.detach(), key.detach(), None if attn_mask is None else attn_mask.detach()
    lse = lse.detach().contiguous()
    return AttentionColumns(*torch.ops.inflection_fast.attention_column_mass(query, key, lse, attn_mask, *options))


@torch.library.register_fake("inflection_fast::attention_column_mass")
def _(query, key, lse, attn_mask, is_causal, scale, left, right, softcap, rows, key_bounds):
    return tuple(query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32) for _ in range(2))
