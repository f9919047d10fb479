"""Statistics of attention, measured inside a graph if a flag on the device is set."""

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
    """If `flag` is not 0, write sums of `attention_stats_qk` over sampled query rows to a slot.

    Equivalent to: ``if flag: slots[slot, 0] += 1; slots[slot, 1:, :H] = sums of attention_stats_qk(query, key,
    rows=...) over batch and rows``

    The output has a fixed shape and the host never waits, so the call works in a compiled graph and in a captured CUDA
    graph. Rows are a stratified sample: with R draws u and Q > R queries, row r is the position
    ``floor(r * Q / R) + floor(u_r * n_r)`` of stratum r, which has n_r positions. The sums, in the order of
    `ATTENTION_SUMS`: number of calls; number of rows, their entropy, collision and sink, each weighted by n_r; three
    terms of the variance of the mean entropy; the largest logit. Padding and rows without keys do not count. Sums are
    float64.

    Args:
        query, key, attn_mask, is_causal, scale, window, softcap, sinks: as in `attention_stats_qk`. No gradient flows.
        slots: float64 ``[S, 9, >= H]``, contiguous, on the device of `query`.
        slot: index into the first dimension of `slots`.
        flag: int32, one element, on the device of `query`.
        draws: float64 ``[R]`` in [0, 1). Every row is measured if None, or if R >= Q.
        tokens: bool ``[B or 1, Q]``, True at tokens, False at padding; None: no padding.

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
    sinks = None if sinks is None else checks.sinks(sinks, query)
    attn_mask, sinks = (None if x is None else x.detach() for x in (attn_mask, sinks))
    torch.ops.inflection_fast.tap_attention(
        query.detach(), key.detach(), attn_mask, *numbers, sinks, tokens, draws, flag, slots, slot
    )


@torch.library.register_fake("inflection_fast::tap_attention")
def _(query, key, attn_mask, is_causal, scale, left, right, softcap, sinks, tokens, draws, flag, slots, slot):
    return None
