"""Profiles of a timeline: one value per layer and step of each signal, and their means over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..timeline import Timeline
from .evidence import Evidence, correlation_of, evidence_of, over_others
from .ski import score_of

__all__ = ["Signal", "entropy_of", "gradient_of", "only", "score_signal", "window_of"]

# Precision of the measurement by float32 kernels.
_ENTROPY_PRECISION = 2e-6  # nats
_GRADIENT_PRECISION = 1e-6  # relative, so also that of the logarithm


@dataclass(frozen=True, eq=False)
class Signal:
    """One number per step and layer; only steps in which every layer that has values has one."""

    steps: np.ndarray  # [S] indices into the timeline
    values: np.ndarray  # [S, L], NaN in the columns of layers without values
    floor: np.ndarray  # [L] the smallest possible standard error of a layer's mean
    # [N] the layers of the stack, in order; others have no values. Neighbours are neighbours in this order.
    within: np.ndarray

    @cached_property
    def layers(self) -> np.ndarray:
        """Indices of the layers that have values; none if there is no step."""
        return np.flatnonzero(np.isfinite(self.values).all(axis=0)) if len(self.steps) else np.arange(0)

    @cached_property
    def mean(self) -> np.ndarray:
        """The profile [L]: means over the steps."""
        return self.values.mean(axis=0) if len(self.steps) else np.full(self.values.shape[1], np.nan)

    def above_others(self, layer: int, level: float | None, *, sign: int = 1) -> Evidence:
        """Whether `layer`, the most extreme one, stands above the median of the others (`sign` -1: below it)."""
        layers = self.layers
        differences = sign * over_others(self.values[:, layers])
        column = int(np.searchsorted(layers, layer))
        return self._evidence(differences, correlation_of(differences), column, level)

    def _evidence(self, differences: np.ndarray, correlation: float, column: int, level: float | None) -> Evidence:
        count, floor = len(self.layers), self.floor[self.layers[column]]
        return evidence_of(differences[:, column], floor, level=level, comparisons=count, correlation=correlation)

    def above(self, layer: int, other: int, level: float | None, comparisons: int) -> Evidence:
        """Whether `layer` lies above `other`, a pair picked from `comparisons` pairs."""
        difference = self.values[:, layer] - self.values[:, other]
        correlation = correlation_of(over_others(self.values[:, self.layers]))
        floor = float(np.hypot(self.floor[layer], self.floor[other]))
        return evidence_of(difference, floor, level=level, comparisons=comparisons, correlation=correlation)

    def standard_errors(self) -> np.ndarray:
        """Standard error [L] of each layer's distance from the median of the others; inf for a single step."""
        errors = np.full(self.values.shape[1], np.nan)
        layers = self.layers
        if len(layers) > 1:
            differences = over_others(self.values[:, layers])
            correlation = correlation_of(differences)
            for column, layer in enumerate(layers):
                errors[layer] = self._evidence(differences, correlation, column, None).standard_error
        return errors


def window_of(timeline: Timeline, steps: tuple[int, int] | float | None) -> np.ndarray:
    """The measured steps to use, bool [S]: those between two optimizer steps, or the last share of them."""
    count = len(timeline.steps)
    if steps is None:
        return np.ones(count, bool)
    if isinstance(steps, float):
        return np.arange(count) >= count - max(1, round(steps * count))
    chosen = (timeline.steps >= steps[0]) & (timeline.steps <= steps[1])
    if count and not chosen.any():
        first_to_last = f"{count} steps from {timeline.steps[0]} to {timeline.steps[-1]}"
        raise ValueError(f"steps: none was measured from {steps[0]} to {steps[1]}, only {first_to_last}")
    return chosen


def entropy_of(timeline: Timeline, window: np.ndarray, within: np.ndarray, heads: str) -> Signal:
    """Attention entropy in nats of the layers `within`, over the heads of a layer their "mean" or their "min".

    The row-sampling error of a head mean is the mean of those of the heads: they share the sampled rows, so their
    errors may be fully correlated. It is a lower limit only, because the variation between steps includes it.
    """
    per_head = only(timeline.entropy[window], within)
    count, layers, width = per_head.shape
    columns, rows = _complete(per_head.reshape(count, layers * width))
    columns = columns.reshape(layers, width)
    per_head = np.where(columns, per_head, np.nan)[rows]
    errors = np.nan_to_num(timeline.entropy_se[window][rows])
    values = np.full((len(per_head), layers), np.nan)
    floor = np.full(layers, _ENTROPY_PRECISION)
    for layer in np.flatnonzero(columns.any(axis=1)):
        entropy, error = per_head[:, layer, columns[layer]], errors[:, layer, columns[layer]]
        if heads == "mean":
            values[:, layer], error = entropy.mean(axis=1), error.mean(axis=1)
        else:
            lowest = entropy.argmin(axis=1)[:, None]
            values[:, layer] = np.take_along_axis(entropy, lowest, axis=1)[:, 0]
            error = np.take_along_axis(error, lowest, axis=1)[:, 0]
        if len(error):
            floor[layer] = max(_ENTROPY_PRECISION, np.sqrt((error**2).mean() / len(error)))
    return Signal(np.flatnonzero(window)[rows], values, floor, within)


def gradient_of(timeline: Timeline, window: np.ndarray, within: np.ndarray) -> Signal:
    """Logarithm of the activation gradient norm of the layers `within`. A zero norm has none and counts as no value."""
    norms = only(timeline.activation_grad[window], within)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(norms)
    columns, rows = _complete(logarithms)
    values = np.where(columns, logarithms, np.nan)[rows]
    return Signal(np.flatnonzero(window)[rows], values, np.full(values.shape[1], _GRADIENT_PRECISION), within)


def score_signal(
    entropy: Signal, gradient: Signal, alpha: float, normalisation: str, log_gradient: bool
) -> tuple[np.ndarray, Signal]:
    """SKI of the mean profiles [L], and step by step.

    The gradient's profile is its geometric mean over the steps, so a step of large loss does not outweigh the others.
    """
    profile = entropy.mean, np.exp(gradient.mean)
    score = score_of(*profile, alpha, normalisation, log_gradient)
    used = [signal for signal, weight in ((entropy, alpha), (gradient, 1 - alpha)) if weight > 0]
    steps = used[0].steps if len(used) == 1 else np.intersect1d(used[0].steps, used[1].steps)

    def at(signal: Signal) -> np.ndarray:
        if signal not in used:
            return np.full((len(steps), len(profile[0])), np.nan)
        return signal.values[np.searchsorted(signal.steps, steps)]

    shifts = [np.abs(score(profile[0] + sign * entropy.floor, profile[1]) - score(*profile)) for sign in (1, -1)]
    shifts += [
        np.abs(score(profile[0], profile[1] * (1 + sign * gradient.floor)) - score(*profile)) for sign in (1, -1)
    ]
    floor = np.hypot(np.maximum(*shifts[:2]), np.maximum(*shifts[2:]))
    return score(*profile), Signal(steps, score(at(entropy), np.exp(at(gradient))), floor, entropy.within)


def only(values: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Values [S, L, ...] with NaN for the layers that are not `within`."""
    outside = np.ones(values.shape[1], bool)
    outside[within] = False
    values = np.array(values, np.float64)
    values[:, outside] = np.nan
    return values


def _complete(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns [N] finite in at least half of the rows that have values, and the rows [S] where all of them are."""
    finite = np.isfinite(values)
    measured = finite.any(axis=1)
    columns = finite[measured].mean(axis=0) >= 0.5 if measured.any() else np.zeros(values.shape[1], bool)
    return columns, finite[:, columns].all(axis=1) & measured
