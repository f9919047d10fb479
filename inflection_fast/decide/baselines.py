"""Selections that do not look at the measurement: what every claim about the others is compared with."""

from __future__ import annotations

import numpy as np

from .extremes import Finding

__all__ = ["BASELINES", "baseline"]

BASELINES = ("first", "last", "random", "all")


def baseline(method: str, k: int, layers: int, seed: int) -> list[Finding]:
    """The first or last `k` of `layers` blocks, `k` drawn at random from `seed`, or all of them."""
    chosen = {
        "first": range(k),
        "last": range(layers - k, layers),
        "random": sorted(np.random.default_rng(seed).choice(layers, k, replace=False).tolist()),
        "all": range(layers),
    }[method]
    which = {
        "first": f"one of the first {k} of {layers}",
        "last": f"one of the last {k} of {layers}",
        "random": f"one of {k} of {layers} drawn at random (seed {seed})",
        "all": f"one of all {layers}",
    }[method]
    picks = {layer: f"Block {layer} is {which}: a baseline, chosen without the measurement." for layer in chosen}
    return [Finding("baseline", f"A baseline ({method}), chosen without the measurement.", picks)]
