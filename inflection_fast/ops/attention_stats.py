"""Entropy and the other statistics of attention rows, from logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, library

__all__ = ["AttentionStats", "attention_entropy", "attention_stats"]


class AttentionStats(NamedTuple):
    """Statistics of softmax rows, each float32 ``[..., Q]``.

    A row without keys has entropy 0, lse -inf, max_logit -inf, keys 0, collision 0 and sink 0. NaN or +inf at an
    attended position makes all fields of that row NaN, except `keys`.
    """

    entropy: Tensor
    """Entropy of the probabilities, in nats."""
    lse: Tensor
    """Log-sum-exp of the scores."""
    max_logit: Tensor
    """Largest attended score."""
    keys: Tensor
    """Number of attended keys."""
    collision: Tensor
    """Sum of squared probabilities."""
    sink: Tensor
    """Probability of the sink column if there is one, else of key 0 (packed: the first key of the row's sequence)."""


def attention_entropy(
    logits: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float = 1.0
) -> Tensor:
    """Entropy of each softmax row of attention, in nats.

    Equivalent to: ``p = softmax(logits * scale + attn_mask, -1); -xlogy(p, p).sum(-1)``

    Reads each logit once, in its dtype and layout, and stores no ``[Q, K]`` intermediate. Differentiable once, with
    respect to `logits` and to an additive `attn_mask`.

    Args:
        logits: ``[..., Q, K]`` scores before the softmax, float32, bfloat16 or float16, any strides.
        attn_mask: boolean (True attends) or added to the scores; broadcastable to `logits`.
        is_causal: query i attends keys j <= i (aligned top-left, as in PyTorch).
        scale: factor on `logits`, before the mask; any finite number.

    Returns:
        float32 ``[..., Q]``. A value of `logits` or `attn_mask` at or below half of the lowest finite number of its
        dtype counts as -inf. A row without keys has entropy 0. NaN or +inf at an attended position makes its row NaN.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device or `scale` does not fit.
    """
    return forward(logits, attn_mask, is_causal, scale, entropy_only=True).entropy


def attention_stats(
    logits: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float = 1.0
) -> AttentionStats:
    """All statistics of each softmax row of attention in one pass; see `AttentionStats`.

    Arguments and errors as for `attention_entropy`. `entropy`, `lse`, `collision` and `sink` are differentiable once.

    Equivalent to: ``s = logits * scale + attn_mask; p = softmax(s, -1)``, then the entropy of p, ``logsumexp(s, -1)``,
    ``s.amax(-1)``, ``(s > -inf).sum(-1)``, ``(p * p).sum(-1)`` and ``p[..., 0]``
    """
    return forward(logits, attn_mask, is_causal, scale, entropy_only=False)


def forward(logits, attn_mask, is_causal, scale, *, entropy_only) -> AttentionStats:
    checks.float_tensor(logits, "logits")
    if logits.ndim < 2:
        raise ValueError(f"logits: expected [..., queries, keys], got shape {list(logits.shape)}")
    checks.length(logits.shape[-1], "logits", "keys")
    checks.attn_mask(attn_mask, logits.shape, logits, "logits")
    checks.flag(is_causal, "is_causal")
    scale = checks.finite(scale, "scale")
    checks.no_tangent("attention_stats", logits, attn_mask)
    return AttentionStats(*torch.ops.inflection_fast.attention_stats(logits, attn_mask, is_causal, scale, entropy_only))


@torch.library.register_fake("inflection_fast::attention_stats")
def _(logits, attn_mask, is_causal, scale, entropy_only):
    new = [logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(2)]
    rest = (0,) if entropy_only else logits.shape[:-1]
    return (*new, *(logits.new_empty(rest, dtype=torch.float32) for _ in range(4)))


@torch.library.register_fake("inflection_fast::attention_stats_backward")
def _(
    grad_entropy, grad_lse, grad_collision, grad_sink, entropy, lse, collision, sink,
    logits, attn_mask, is_causal, scale, of_scores,
):  # fmt: skip
    return logits.new_empty(logits.shape, dtype=torch.float32 if of_scores else logits.dtype)


def setup_context(ctx, inputs, output):
    logits, attn_mask, ctx.is_causal, ctx.scale, ctx.entropy_only = inputs
    entropy, lse, max_logit, keys, collision, sink = output
    ctx.mark_non_differentiable(max_logit, keys)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, attn_mask, entropy, lse, collision, sink)


def backward(ctx, grad_entropy, grad_lse, _grad_max_logit, _grad_keys, grad_collision, grad_sink):
    logits, attn_mask, *rows = ctx.saved_tensors
    grads = [grad_entropy, grad_lse, grad_collision, grad_sink]
    if ctx.entropy_only:
        grads[2:] = None, None
    if all(grad is None for grad in grads):
        return None, None, None, None, None
    grads = [None if grad is None else grad.contiguous() for grad in grads]  # [..., Q]: small compared with the logits
    of_scores = ctx.needs_input_grad[1]
    grad = torch.ops.inflection_fast.attention_stats_backward(
        *grads, *rows, logits, attn_mask, ctx.is_causal, ctx.scale, of_scores
    )
    if not of_scores:
        return grad, None, None, None, None
    grad_mask = grad.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return (grad * ctx.scale).to(logits.dtype) if ctx.needs_input_grad[0] else None, grad_mask, None, None, None


torch.library.register_autograd("inflection_fast::attention_stats", backward, setup_context=setup_context)
library.refuse_second_derivative("inflection_fast::attention_stats_backward")
