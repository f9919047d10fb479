"""Statistics of attention rows, fused from queries and keys. The matrix of scores is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, library
from .attention_stats import AttentionStats
from .qk_arguments import PackedSequences, qk_arguments

__all__ = ["attention_entropy_qk", "attention_stats_qk"]


def attention_entropy_qk(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | PackedSequences | None = None,
) -> Tensor:
    """Entropy of each row of attention probabilities, in nats, from queries and keys.

    Equivalent to: ``p = (scale * query @ key.mT + mask).softmax(-1); -(p * p.log()).sum(-1)``

    Arguments, errors and derivatives are those of `attention_stats_qk`. Faster, because only the entropy is computed.

    Returns:
        float32 ``[B, H, Q]``, or ``[B, H, R]`` with `rows`.
    """
    stats = _call(query, key, attn_mask, is_causal, scale, window, softcap, sinks, rows, cu_seqlens, entropy_only=True)
    return stats[0]


def attention_stats_qk(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | PackedSequences | None = None,
) -> AttentionStats:
    """Statistics of each row of attention probabilities, from queries and keys.

    Equivalent to: ``attention_stats(scale * query @ key.mT, attn_mask=...)``, without storing the scores. Memory beside
    the result is a fixed amount per thread. `entropy`, `lse`, `collision` and `sink` are differentiable once, with
    respect to `query`, `key` and `sinks`; the backward pass recomputes the scores.

    Args:
        query: ``[B, H, Q, D]``, float32, bfloat16 or float16, any strides, D at most 512.
        key: ``[B, Hkv, K, D]``, like `query`; H a multiple of Hkv (grouped queries).
        attn_mask: broadcastable to ``[B, H, Q, K]``; bool (True attends) or float, which is added to the scores. A
            value at or below half of the lowest finite number of its dtype counts as -inf. It must not require grad.
        is_causal: row i attends keys j <= i (aligned top-left).
        scale: factor of the scores; None is ``1 / sqrt(D)``.
        window: (left, right): row i attends keys i - left <= j <= i + right; -1 or None is no bound.
        softcap: c > 0 makes the scores ``c * tanh(s / c)`` before the mask; None leaves them.
        sinks: ``[H]``, learned sink logits: scores of one additional column per head, which has no value vector.
            Entropy, lse and collision include it.
        rows: int64 ``[R]``, query positions in ``[0, Q)`` in any order: only these rows are computed. A position out of
            range is an error on the CPU; on CUDA, and under torch.compile, it gives NaN, as a check would synchronise.
        cu_seqlens: cumulative lengths of packed sequences, as in flash-attention: int32 or int64 ``[S + 1]``,
            non-decreasing numbers in ``[0, Q]``, or `PackedSequences`. Sequence s has the positions ``cu_seqlens[s]``
            to ``cu_seqlens[s + 1] - 1`` of queries and of keys (Q = K). A row attends only keys of its own sequence; a
            row in no sequence attends nothing. `sink` is the probability of the first key of the row's sequence. Values
            are checked on the CPU only, as those of `rows`.

    Returns:
        `AttentionStats`, each float32 ``[B, H, Q]``, or ``[B, H, R]`` with `rows`. A row without keys has entropy 0 and
        lse -inf. NaN or +inf among the attended scores of a row makes that row NaN, and no other.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or head counts that do not fit, a number out of range, a mask that requires grad.
    """
    return AttentionStats(
        *_call(query, key, attn_mask, is_causal, scale, window, softcap, sinks, rows, cu_seqlens, entropy_only=False)
    )


def _call(query, key, attn_mask, is_causal, scale, window, softcap, sinks, rows, cu_seqlens, entropy_only):
    query, key, attn_mask, *numbers, rows, key_bounds = qk_arguments(
        query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens
    )
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask: requires grad, but no gradient is computed for masks; pass attn_mask.detach()")
    sinks = None if sinks is None else checks.sinks(sinks, query)
    checks.no_tangent("attention_stats_qk", query, key, attn_mask, sinks)
    *stats, _lse_low = torch.ops.inflection_fast.attention_stats_qk(
        query, key, attn_mask, *numbers, sinks, rows, key_bounds, entropy_only
    )
    return stats


@torch.library.register_fake("inflection_fast::attention_stats_qk")
def _(query, key, attn_mask, is_causal, scale, left, right, softcap, sinks, rows, key_bounds, entropy_only):
    shape = (*query.shape[:2], query.shape[2] if rows is None else rows.shape[0])
    rest = (0,) if entropy_only else shape  # all but entropy, lse and lse_low, the rounding error of lse
    return tuple(query.new_empty(size, dtype=torch.float32) for size in (shape, shape, rest, rest, rest, rest, shape))


@torch.library.register_fake("inflection_fast::attention_stats_qk_backward")
def _(
    grad_entropy, grad_lse, grad_collision, grad_sink, entropy, lse, collision, sink, lse_low,
    query, key, attn_mask, is_causal, scale, left, right, softcap, has_sinks, rows, key_bounds,
):  # fmt: skip
    shape = (*entropy.shape, query.shape[3])
    return query.new_empty(shape, dtype=torch.float32), key.new_empty(key.shape, dtype=torch.float32)


def setup_context(ctx, inputs, output):
    query, key, attn_mask, *ctx.numbers, sinks, rows, key_bounds, ctx.entropy_only = inputs
    entropy, lse, max_logit, keys, collision, sink, lse_low = output
    ctx.mark_non_differentiable(max_logit, keys, lse_low)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, attn_mask, sinks, rows, key_bounds, entropy, lse, collision, sink, lse_low)


def backward(ctx, grad_entropy, grad_lse, _grad_max_logit, _grad_keys, grad_collision, grad_sink, _grad_lse_low):
    query, key, attn_mask, sinks, rows, key_bounds, *stats = ctx.saved_tensors
    grads = [grad_entropy, grad_lse, grad_collision, grad_sink]
    if ctx.entropy_only:
        grads[2:] = None, None
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    grad_query = grad_key = grad_sinks = None
    wanted = any(grad is not None for grad in grads)
    if wanted and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        grad_query, grad_key = torch.ops.inflection_fast.attention_stats_qk_backward(
            *grads, *stats, query, key, attn_mask, *ctx.numbers, sinks is not None, rows, key_bounds
        )
        if rows is not None:  # positions may repeat
            grad_query = grad_query.new_zeros(query.shape).index_add_(2, rows, grad_query)
        grad_query, grad_key = grad_query.to(query.dtype), grad_key.to(key.dtype)
    if wanted and ctx.needs_input_grad[8]:
        grad_sinks = sink_gradient(sinks, *grads, *stats)
    return grad_query, grad_key, *[None] * 6, grad_sinks, None, None, None


def sink_gradient(sinks, grad_entropy, grad_lse, grad_collision, grad_sink, entropy, lse, collision, sink, lse_low):
    """Gradient of the sink logits, whose column is the one that `sink` reports."""
    empty = lse == -torch.inf
    log_p = (sinks[:, None] - lse - lse_low).masked_fill(empty, 0.0).clamp(min=-88.0, max=0.0)
    p = log_p.exp().masked_fill(empty, 0.0)
    grad = torch.zeros_like(lse)
    if grad_lse is not None:
        grad = grad + grad_lse
    if grad_entropy is not None:
        grad = grad - grad_entropy * (log_p + entropy)
    if grad_collision is not None:
        grad = grad + 2.0 * grad_collision * (p - collision)
    if grad_sink is not None:
        grad = grad + grad_sink * (1.0 - sink)
    return (p * grad).sum((0, 2))


torch.library.register_autograd("inflection_fast::attention_stats_qk", backward, setup_context=setup_context)
library.refuse_second_derivative("inflection_fast::attention_stats_qk_backward")
