"""Timelines made of given numbers."""

import numpy as np

from inflection_fast.timeline import TimelineWriter

L, HEADS = 12, 2


def timeline(entropy, log_gradient, *, entropy_se=0.0, every=10, meta=None):
    """From [S, L] of each, the entropy the same in all heads."""
    out = TimelineWriter(None, layers=[f"h.{i}" for i in range(entropy.shape[1])], heads=HEADS, meta=meta or {})
    for step, (h, g) in enumerate(zip(entropy, log_gradient, strict=True)):
        both = np.repeat(h[:, None], HEADS, axis=1)
        errors = np.full_like(both, entropy_se)
        out.append(step * every, entropy=both, entropy_se=errors, activation_grad=np.exp(g))
    return out.timeline
