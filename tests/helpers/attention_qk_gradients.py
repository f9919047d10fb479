"""How gradients of the operators from Q and K are compared with the float64 truth."""

import torch

from helpers.attention_qk import widened
from inflection_fast import attention_stats_qk
from inflection_fast.ops import reference

FIELDS = ("entropy", "lse", "collision", "sink")


def gradients(function, inputs, options, weights):
    """Of a weighted sum of every differentiable field, with respect to query, key and sinks."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    if len(inputs) == 3:
        options = {**options, "sinks": inputs[2]}
    stats = function(*inputs[:2], **options)
    rows = [getattr(stats, name).masked_fill(getattr(stats, name) == -torch.inf, 0.0) for name in FIELDS]
    return torch.autograd.grad(sum((x * w.to(x.dtype)).sum() for x, w in zip(rows, weights, strict=True)), inputs)


def check(inputs, **options):
    rows = options["rows"].numel() if "rows" in options else inputs[0].shape[2]
    weights = torch.randn(4, *inputs[0].shape[:2], rows)
    truth = gradients(reference.attention_stats_qk, [x.double() for x in inputs], widened(options), weights)
    eager = gradients(reference.attention_stats_qk, inputs, options, weights)
    ours = gradients(attention_stats_qk, inputs, options, weights)
    for x, actual, theirs, exact in zip(inputs, ours, eager, truth, strict=True):
        assert actual.dtype == x.dtype and actual.shape == x.shape
        allowed = 2 * (theirs.double() - exact).abs().max() + 1e-5 * (1 + exact.abs().max())
        assert (actual.double() - exact).abs().max() <= allowed
    return ours
