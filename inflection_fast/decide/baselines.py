"""Selections that do not look at the measurement: what every claim about the others is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .extremes import Finding

__all__ = ["BASELINES", "baseline"]

BASELINES = ("first", "last", "random", "all")


def baseline(method: str, k: int, layers: Sequence[int], seed: int) -> list[Finding]:
    """The first or last `k` of the blocks `layers`, `k` drawn at random from `seed`, or all of them."""
    count = len(layers)
    places = {
        "first": range(k),
        "last": range(count - k, count),
        "random": sorted(np.random.default_rng(seed).choice(count, k, replace=False).tolist()),
        "all": range(count),
    }[method]
    which = {
        "first": f"one of the first {k} of {count}",
        "last": f"one of the last {k} of {count}",
        "random": f"one of {k} of {count} drawn at random (seed {seed})",
        "all": f"one of all {count}",
    }[method]
    chosen = [int(layers[place]) for place in places]
    picks = {layer: f"Block {layer} is {which}: a baseline, chosen without the measurement." for layer in chosen}
    return [Finding("baseline", f"A baseline ({method}), chosen without the measurement.", picks)]
