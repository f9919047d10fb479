"""What the selectors would choose from every measured training, over their options."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from inflection_fast.decide import SelectConfig, select
from inflection_fast.timeline import Timeline

__all__ = ["ALPHAS", "WINDOWS", "choices_of"]

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
WINDOWS = (0, 1, 2)


def choices_of(timeline: Timeline, k: int) -> dict[str, Any]:
    """Layers that `top` (the best `k`, untested) chooses for every alpha and `greedy` for every window; profiles."""
    top = SelectConfig(method="top", k=k, significance=None)
    greedy = select(timeline, SelectConfig(method="greedy"))
    return {
        "top": {f"{a:g}": list(select(timeline, dataclasses.replace(top, alpha=a)).layers) for a in ALPHAS},
        "greedy": {str(w): list(select(timeline, SelectConfig(method="greedy", window=w)).layers) for w in WINDOWS},
        "found": greedy.found,
        "entropy_nats": [_short(x) for x in greedy.profile["entropy"]],
        "activation_grad": [_short(x) for x in greedy.profile["activation_grad"]],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
