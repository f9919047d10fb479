"""Statistics of attention inside a graph, behind a flag that the device reads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .qk_arguments import qk_arguments

__all__ = ["ATTENTION_SUMS", "tap_attention"]

ATTENTION_SUMS = ("calls", "rows", "entropy", "collision", "sink", "yy", "yv", "vv", "max_logit")  # kTapSums


def tap_attention(
    query: Tensor,
    key: Tensor,
    slots: Tensor,
    slot: int,
    *,
    flag: Tensor,
    draws: Tensor | None = None,
    tokens: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Where `flag` is not 0, write what `attention_stats_qk` finds on sampled rows to a slot; else do nothing.

    Equivalent to: ``if flag: slots[slot, 0] += 1; slots[slot, 1:, :H] = sums of attention_stats_qk(query, key,
    rows=...) over batch and rows``

    No shape of what is written depends on the batch, and the host waits for nothing: so it may stand in a compiled
    graph or a captured CUDA graph, measured or not. With R draws u and Q > R queries, row r is the position
    ``floor(r * Q / R) + floor(u_r * n_r)`` of a stratum of n_r positions, for which it stands. In the order of
    `ATTENTION_SUMS`: calls so far; rows that count, and their entropy, collision and sink, all times n_r; the parts of
    the variance of the mean entropy; the largest logit. Rows of padding and rows without any key do not count.
    Sums are float64 throughout: over the batch they differ from a float32 sum by its rounding.

    Args:
        query, key, attn_mask, is_causal, scale, window, softcap, sinks: as in `attention_stats_qk`; read as values.
        slots: float64 ``[S, 9, >= H]``, contiguous, on the device of `query`.
        slot: which of them.
        flag: int32, one element, on the device of `query`.
        draws: float64 ``[R]`` in [0, 1); None, or no fewer than Q: every row is measured.
        tokens: bool ``[B or 1, Q]``, True where a row counts; None: everywhere.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or head counts that do not fit, a number out of range.
    """
    query, key, attn_mask, *numbers, _rows, _bounds = qk_arguments(
        query, key, attn_mask, is_causal, scale, window, softcap, None, None
    )
    for name, value in (("flag", flag), ("slots", slots), ("draws", draws), ("tokens", tokens)):
        if value is not None:
            checks.device_tensor(value, name, query, "query")
    sinks = None if sinks is None else checks.sinks(sinks, query).float().contiguous()
    attn_mask, sinks = (None if x is None else x.detach() for x in (attn_mask, sinks))
    torch.ops.inflection_fast.tap_attention(
        query.detach(), key.detach(), attn_mask, *numbers, sinks, tokens, draws, flag, slots, slot
    )


@torch.library.register_fake("inflection_fast::tap_attention")
def _(query, key, attn_mask, is_causal, scale, left, right, softcap, sinks, tokens, draws, flag, slots, slot):
    return None
