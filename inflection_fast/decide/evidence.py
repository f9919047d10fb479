"""Significance of a difference between layers, with measured steps that are correlated in time.

Differences are taken step by step, so effects on all layers (a lower loss, a hard batch) cancel. The mean over S steps
has the standard error

    SE^2 = s^2 (S - 1) / (S (n - 1)),    n = S (1 - rho) / (1 + rho)

with s the standard deviation over steps, rho the lag-1 autocorrelation and n the effective number of independent steps;
for rho = 0 it is s^2 / S. The factor (S - 1) / (n - 1) corrects the bias of s with correlated steps. rho is corrected
for its bias in short series, r + (1 + 3 r) / S. It is the larger of two estimates: the mean over all layers, which does
not show a layer that drifts alone, and that of the layer minus its sampling error. With fewer than five steps it is 0.
n is at least two.

The mean of a difference is tested by Student's t with n - 1 degrees of freedom, at a level divided by the number of
places where an extreme could be (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["STEPS_FOR_CORRELATION", "Evidence", "correlation_of", "evidence_of", "over_others"]

STEPS_FOR_CORRELATION = 5


@dataclass(frozen=True)
class Evidence:
    """One difference: its mean over the steps, its standard error, and the threshold of the test."""

    difference: float
    standard_error: float  # inf: a single step
    threshold: float  # in standard errors; 0: not tested, inf: a single step
    independent_steps: float

    @property
    def standard_errors(self) -> float:
        """The difference in standard errors."""
        if self.difference == 0 or math.isinf(self.standard_error):
            return 0.0
        if self.standard_error == 0:  # the same difference in every step
            return math.copysign(math.inf, self.difference)
        return self.difference / self.standard_error

    @property
    def holds(self) -> bool:
        """Whether the difference is positive and significant."""
        return self.difference > 0 and (self.threshold == 0 or self.standard_errors > self.threshold)


def evidence_of(
    series: np.ndarray, floor: float, *, level: float | None, comparisons: int, correlation: float = 0.0
) -> Evidence:
    """Test of the mean of `series` [S], a difference step by step.

    `floor` is the smallest possible standard error (from row sampling and the precision of the measurement);
    `correlation` the autocorrelation of all layers, from `correlation_of`; `level` the chance of a false result over
    all `comparisons` (None: no test, every positive difference holds).
    """
    steps, mean = len(series), float(series.mean())
    own = correlation_of(series[:, None]) - 1 / math.sqrt(steps)
    rho = max(0.0, correlation, own)
    independent = max(steps * (1 - rho) / (1 + rho), 2.0) if steps > 1 else 1.0
    degrees = math.floor(independent - 1 + 1e-9)
    error = max(math.sqrt(series.var() / (independent - 1)), floor) if degrees else math.inf
    threshold = 0.0 if level is None else t_quantile(level / comparisons, degrees) if degrees else math.inf
    return Evidence(mean, error, threshold, independent)


def over_others(values: np.ndarray) -> np.ndarray:
    """The distance of each column of [S, L] from the median of the other columns, step by step: [S, L].

    The median is robust: one outlier among the others does not make an ordinary layer look low.
    """
    ranks = values.argsort(axis=1, kind="stable").argsort(axis=1)
    ordered = np.sort(values, axis=1)
    others = values.shape[1] - 1

    def without_own(place: int) -> np.ndarray:  # [S, L]: the value of rank `place` among the others of each column
        return np.take_along_axis(ordered, place + (place >= ranks), axis=1)

    return values - (without_own((others - 1) // 2) + without_own(others // 2)) / 2


def correlation_of(series: np.ndarray) -> float:
    """The mean lag-1 autocorrelation of the columns of [S, M], corrected for its bias."""
    steps = len(series)
    deviation = series - series.mean(axis=0)
    squares = (deviation**2).sum(axis=0)
    varies = squares > 0
    if steps < STEPS_FOR_CORRELATION or not varies.any():
        return 0.0
    r = ((deviation[1:] * deviation[:-1]).sum(axis=0)[varies] / squares[varies]).mean()
    return float(r + (1 + 3 * r) / steps)


def t_quantile(tail: float, degrees: int) -> float:
    """The t that Student's distribution exceeds with probability `tail` (below one half)."""
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, tail))  # of the lower tail, which is exact where 1 - tail is not
