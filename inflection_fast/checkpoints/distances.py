"""How unusual a finding is, in one unit for all of them: the robust z-score.

What lies beyond its null: (median of the values - median of the draws) / (1.4826 x median absolute deviation of the
draws), the draws being what the null gave in each of its batches. What is found because it does not differ from its
null, as other layers do: the same, with all layers (matrices, modules) of the model in place of the draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["beyond", "nearer"]

NORMAL = 1.4826  # standard deviations of normal numbers in their median absolute deviation


def beyond(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[L]: how far the median of `values` [S, L] lies above that of `draws` [N, L], in spreads of the draws.

    Draws of which more than half are equal have their standard deviation for a spread; if all are equal, whatever lies
    elsewhere is infinitely far. NaN where either has no value.
    """
    apart = _median(values) - _median(draws)
    spread = NORMAL * _median(np.abs(draws - _median(draws)))
    spread = np.where(spread == 0, _deviation(draws), spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart == 0, 0.0, apart / spread)


def nearer(to_null: np.ndarray, found: Sequence[int]) -> float:
    """How far the nearest of `found` lies below all of a model, in spreads of these.

    Args:
        to_null: [L], how far each layer (matrix, module) lies from its null, in any unit.
        found: those that are to be judged.
    """
    own = to_null[np.asarray(found, int)]
    own = own[np.isfinite(own)]
    return float(beyond(-own.min(keepdims=True)[None], -to_null[:, None])[0]) if len(own) else 0.0


def _median(values: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    out = np.full(values.shape[1], np.nan)
    for i in range(values.shape[1]):
        if there[:, i].any():
            out[i] = np.median(values[there[:, i], i])
    return out


def _deviation(values: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    return np.array([np.std(values[there[:, i], i]) if there[:, i].any() else np.nan for i in range(values.shape[1])])
