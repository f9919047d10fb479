"""Minimum, cliff, maxima and ranking of a profile, with their significance in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from .evidence import Evidence, correlation_of, evidence_of, over_others
from .profile import Signal

__all__ = ["Finding", "cliff", "maxima", "minimum", "top"]


@dataclass(frozen=True)
class Finding:
    """The result of a search: its name, a sentence, and the picked layers with a sentence each."""

    name: str  # as in `Plan.found`
    words: str
    picks: dict[int, str] = field(default_factory=dict)


def minimum(entropy: Signal, level: float | None) -> Finding:
    """The layer of lowest mean entropy, if it is significantly below the median of the others."""
    name = "entropy minimum"
    if len(entropy.layers) < 2:
        return Finding(name, _absent("entropy minimum", "attention entropy", entropy))
    layer, evidence, runner_up = _lowest(entropy, level)
    place = f"{entropy.mean[layer]:.3f} nats, {evidence.difference:.3g} nats below the median of the other blocks"
    if not evidence.holds:
        return Finding(
            name,
            "The attention entropy has no significant minimum: its lowest block, "
            f"{layer}, has {place}{_against(evidence, f'the lowest of {len(entropy.layers)}')}.",
        )
    words = f"Block {layer} has the lowest attention entropy: {place}"
    words += f"{_against(evidence, f'the lowest of {len(entropy.layers)}')}.{runner_up}"
    return Finding(name, f"The entropy minimum is block {layer}.", {layer: words})


def cliff(gradient: Signal, level: float | None, kind: str) -> Finding:
    """Where the log gradient norm falls most on its way down to block 0 ("steepest"), or is lowest ("lowest")."""
    if len(gradient.layers) < 2:
        return Finding("gradient cliff", _absent("gradient cliff", "activation gradient", gradient))
    return _lowest_gradient(gradient, level) if kind == "lowest" else _steepest(gradient, level)


def _lowest_gradient(gradient: Signal, level: float | None) -> Finding:
    name = "gradient cliff"
    layer, evidence, runner_up = _lowest(gradient, level)
    place = f"{np.exp(gradient.mean[layer]):.3g}, {math.exp(evidence.difference):.3g} times below the median block"
    against = _against(evidence, f"the lowest of {len(gradient.layers)}")
    if not evidence.holds:
        return Finding(
            name, f"The activation gradient has no significant minimum: that of block {layer} is {place}{against}."
        )
    words = f"Block {layer} has the lowest activation gradient norm: {place}{against}.{runner_up}"
    return Finding(name, f"The gradient cliff (lowest point) is block {layer}.", {layer: words})


def _steepest(gradient: Signal, level: float | None) -> Finding:
    name = "gradient cliff"
    pairs = [(low, high) for low, high in pairwise(gradient.within) if {low, high} <= set(gradient.layers)]
    if not pairs:
        return Finding(
            name, "No two neighbouring blocks have an activation gradient, so there is no cliff to look for."
        )
    # The fall of the log norm from a block to the one before it, in the direction of backpropagation.
    falls = np.stack([gradient.values[:, high] - gradient.values[:, low] for low, high in pairs], axis=1)
    column = int(falls.mean(axis=0).argmax())
    layer, upper = map(int, pairs[column])
    # The fall must be positive, and steeper than the median fall: a norm that falls evenly has no cliff.
    excess = over_others(falls) if len(pairs) > 1 else falls
    floor = float(np.hypot(gradient.floor[layer], gradient.floor[upper]))
    fall, over = (
        evidence_of(series[:, column], floor, level=level, comparisons=len(pairs), correlation=correlation_of(series))
        for series in (falls, excess)
    )
    weaker = min(fall, over, key=lambda evidence: (evidence.holds, evidence.standard_errors))
    factor = f"{math.exp(fall.difference):.3g} times ({fall.difference:.3g} in the log, the median fall being "
    factor += f"{fall.difference - over.difference:.3g})" if len(pairs) > 1 else "0)"
    against = _against(weaker, f"the steepest of {len(pairs)}")
    if not weaker.holds:
        return Finding(
            name,
            "The activation gradient has no significant cliff: its steepest fall, from block "
            f"{upper} to block {layer}, is {factor}{against}.",
        )
    words = f"The gradient cliff lands on block {layer}: from block {upper} the activation gradient norm falls {factor}"
    return Finding(name, f"The gradient cliff (steepest fall) lands on block {layer}.", {layer: f"{words}{against}."})


def maxima(scores: np.ndarray, steps: Signal, level: float | None) -> list[Finding]:
    """Local maxima of SKI that are significantly above the lowest point on either side before a higher block.

    `scores` [L] are those of the mean profile, `steps` shows how they vary.
    """
    name = "local maximum of SKI"
    layers = steps.layers
    if len(layers) < 2:
        return [Finding(name, _absent("local maximum", "SKI", steps))]
    pairs = len(layers) * (len(layers) - 1)  # any block could have been the top and any other the base
    picks, flat = {}, []
    for place, bases in _peaks(scores[layers]):
        layer = int(layers[place])
        rises = [(steps.above(layer, int(layers[base]), level, pairs), int(layers[base])) for base in bases]
        evidence, base = min(rises, key=lambda rise: (rise[0].holds, rise[0].standard_errors))
        against = _against(evidence, f"one of {pairs} pairs of blocks")
        words = f"{scores[layer]:.2f}, above block {base} ({scores[base]:.2f}) by {evidence.difference:.2g}{against}"
        if evidence.holds:
            picks[layer] = f"Block {layer} is a local maximum of SKI: {words}."
        else:
            flat.append((evidence.standard_errors, f"block {layer}, has {words}"))
    if picks:
        return [Finding(name, f"Local maxima of SKI: {', '.join(map(str, picks))}.", picks)]
    clearest = f": the clearest, {max(flat)[1]}" if flat else ": it is constant"
    return [Finding(name, f"SKI has no significant local maximum{clearest}.")]


def top(scores: np.ndarray, steps: Signal, k: int, level: float | None) -> list[Finding]:
    """The `k` layers of highest SKI (`scores` [L]), if the highest stands out from the median of the others."""
    name = f"best {k} by SKI"
    layers = steps.layers
    if len(layers) < 2:
        return [Finding(name, _absent("ranking", "SKI", steps))]
    order = [int(layer) for layer in layers[np.argsort(-scores[layers], kind="stable")]]
    if len(order) < k:
        raise ValueError(f"k: {k} layers were asked for, only {len(order)} have a score")
    evidence = steps.above_others(order[0], level)
    standing = f"{evidence.difference:.2g} above the median of the others"
    standing += _against(evidence, f"the highest of {len(order)}")
    if not evidence.holds:
        return [Finding(name, f"SKI ranks nothing: its highest, block {order[0]}, lies {standing}.")]
    words = f"The best {k} by SKI; block {order[0]} lies {standing}."
    if k < len(order):
        last, out = order[k - 1], order[k]
        edge = steps.above(last, out, level, 1)
        if not edge.holds:
            words += (
                f" Block {last}, the last taken, and block {out}, the first left out, are not significantly different"
            )
            words += f" ({_errors(edge)} apart)."
    picks = {}
    for place, layer in enumerate(order[:k]):
        picks[layer] = f"Block {layer} is number {place + 1} of {len(order)} by SKI ({scores[layer]:.2f})."
    return [Finding(name, words, picks)]


def _lowest(signal: Signal, level: float | None) -> tuple[int, Evidence, str]:
    """The lowest layer, the evidence for it, and a sentence about the second if the two do not differ."""
    layers, profile = signal.layers, signal.mean
    layer, second = (int(i) for i in layers[np.argsort(profile[layers], kind="stable")[:2]])
    evidence = signal.above_others(layer, level, sign=-1)
    gap = signal.above(second, layer, level, len(layers))
    alike = "" if gap.holds else f" Block {second} is not significantly different ({_errors(gap)} higher)."
    return layer, evidence, alike


def _peaks(profile: np.ndarray) -> list[tuple[int, list[int]]]:
    """Local maxima of [N] (of a plateau the first), each with the lowest places beside it before a higher one."""
    peaks = []
    for place, height in enumerate(profile):
        if place and profile[place - 1] >= height:
            continue
        right = profile[place + 1 :]
        higher = np.flatnonzero(right > height)
        if len(higher) and right[: higher[0]].min(initial=height) == height:
            continue  # nothing lower in between: no peak
        left_higher = np.flatnonzero(profile[:place] > height)
        left_side = range(left_higher[-1] + 1 if len(left_higher) else 0, place)
        right_side = range(place + 1, place + 1 + higher[0] if len(higher) else len(profile))
        bases = [min(side, key=lambda i: profile[i]) for side in (left_side, right_side) if len(side)]
        bases = [base for base in bases if profile[base] < height]
        if bases:
            peaks.append((place, bases))
    return peaks


def _against(evidence: Evidence, rival: str) -> str:
    if math.isinf(evidence.threshold):
        return ", and one measured step gives no standard error (significance=None picks without a test)"
    if evidence.threshold == 0:
        return f", {_errors(evidence)} (not tested)" if evidence.difference > 0 else ""
    return f", {_errors(evidence)}, where {rival} needs {evidence.threshold:.1f}"


def _errors(evidence: Evidence) -> str:
    if math.isinf(evidence.standard_error):
        return "of unknown standard error"
    if evidence.standard_errors > 1000:
        return "more than 1000 standard errors"
    return f"{evidence.standard_errors:.1f} standard errors"


def _absent(what: str, quantity: str, signal: Signal) -> str:
    if len(signal.layers) == 1:
        return f"Only block {signal.layers[0]} has values of {quantity}, so there is no {what} to look for."
    return f"There are no values of {quantity}, so there is no {what} to look for."
