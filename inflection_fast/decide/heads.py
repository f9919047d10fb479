"""Lazy layers and collapsed heads, from entropy, rank, column mass and sink.

A layer is lazy when its attention has degenerated to single columns of rank one (Sanyal et al. 2024, arXiv 2404.08634):
the largest k* over its heads is below `lazy_rank`, where k* is the smallest number of squared singular values with 90 %
of their sum, and a single column has at least `lazy_mass` of that sum. Rank alone is not enough: uniform attention has
rank one too, but no dominating column.

A head is collapsed when its attention entropy is below `collapsed` nats: nearly every query attends to one key.
"""

from __future__ import annotations

import numpy as np

from ..timeline import Timeline
from ..timeline.means import finite_mean
from .extremes import Finding
from .profile import only

__all__ = ["collapsed", "column", "lazy"]

_QUANTITY = {"rank_k90": "rank", "column_mass": "rank", "entropy": "attention", "sink": "attention"}


def lazy(
    timeline: Timeline, window: np.ndarray, within: np.ndarray, rank: float, mass: float
) -> tuple[Finding, np.ndarray]:
    """Those `within` whose attention is of rank one and in one column; scores [L]: 1 / the largest k* of a layer."""
    names = "rank_k90", "column_mass"
    ranks, masses = (finite_mean(only(column(timeline, name), within)[window]) for name in names)  # [L, H]
    known, share = np.isfinite(ranks), finite_mean(masses, 1)
    largest = np.where(known.any(1), np.max(ranks, 1, initial=-np.inf, where=known), np.nan)
    with np.errstate(invalid="ignore"):
        chosen = np.flatnonzero((largest < rank) & (share >= mass))
    picks = {
        int(i): f"Block {i} is lazy: no head needs more than {largest[i]:.2f} singular values for 90 % of the squared "
        f"norm of its attention, and a single column has {share[i]:.0%} of it."
        for i in chosen
    }
    if picks:
        words = f"Lazy blocks (largest k* below {rank:g}, {mass:.0%} in one column): {', '.join(map(str, picks))}."
    elif np.isfinite(largest).any():
        lowest = int(np.nanargmin(largest))
        words = (
            f"No block is lazy: the lowest largest k* is {largest[lowest]:.2f}, in block {lowest}, where below "
            f"{rank:g} with {mass:.0%} in one column is lazy."
        )
    else:
        words = "There are no values of rank_k90, so there is no lazy block to look for."
    return Finding("lazy", words, picks), 1 / largest


def collapsed(
    timeline: Timeline, window: np.ndarray, within: np.ndarray, limit: float
) -> tuple[Finding, np.ndarray, dict[int, tuple[int, ...]]]:
    """Those `within` with collapsed heads; scores [L]: the share of a layer's heads that are; and those heads."""
    entropy = finite_mean(only(column(timeline, "entropy"), within)[window])  # [L, H]
    known = {name: getattr(timeline, name, None) for name in ("rank_k90", "sink")}
    beside = {
        name: finite_mean(np.asarray(values, np.float64)[window])
        for name, values in known.items()
        if values is not None
    }
    with np.errstate(invalid="ignore"):
        low = entropy < limit
    measured = np.isfinite(entropy).sum(axis=1)
    scores = np.where(measured > 0, low.sum(axis=1) / np.maximum(measured, 1), np.nan)
    picks, heads = {}, {}
    for layer in np.flatnonzero(low.any(axis=1)):
        heads[int(layer)] = tuple(int(head) for head in np.flatnonzero(low[layer]))
        each = [_head(int(layer), head, entropy, beside) for head in heads[int(layer)]]
        picks[int(layer)] = f"Block {layer} has collapsed heads: {'; '.join(each)}."
    if picks:
        words = f"Heads with less than {limit:g} nats of attention entropy are in blocks {', '.join(map(str, picks))}."
    elif np.isfinite(entropy).any():
        layer, head = np.unravel_index(np.nanargmin(entropy), entropy.shape)
        words = f"No head is collapsed: the lowest, head {head} of block {layer}, has {entropy[layer, head]:.3f} nats."
    else:
        words = "There are no values of attention entropy, so there is no collapsed head to look for."
    return Finding("collapsed", words, picks), scores, heads


def column(timeline: Timeline, name: str) -> np.ndarray:
    """A column [S, L, H] of a timeline. `ValueError` saying what to measure where it is missing."""
    values = getattr(timeline, name, None)
    if values is None:
        raise ValueError(
            f"timeline: it has no column {name}; measure the quantity {_QUANTITY[name]!r} "
            f"(MonitorConfig(quantities=(..., {_QUANTITY[name]!r})))"
        )
    return np.asarray(values, np.float64)


def _head(layer: int, head: int, entropy: np.ndarray, beside: dict[str, np.ndarray]) -> str:
    words = f"head {head} with {entropy[layer, head]:.3f} nats"
    details = {"rank_k90": "rank {:.1f}", "sink": "{:.0%} on the first key"}
    known = [details[n].format(v[layer, head]) for n, v in beside.items() if np.isfinite(v[layer, head])]
    return f"{words} ({', '.join(known)})" if known else words
