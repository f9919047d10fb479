"""How unusual a finding is, as a robust z-score.

For values that exceed their null: (median of the values - median of the draws) / (1.4826 x median absolute deviation
of the draws), where the draws are the values of the null in each batch. For values that do not differ from their null,
as those of other layers do: the same, with all layers (matrices, modules) of the model as the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["nearest_robust_z", "robust_z"]

NORMAL = 1.4826  # standard deviations of normal numbers in their median absolute deviation


def robust_z(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[L]: how far the median of `values` [S, L] lies above that of `draws` [N, L], in spreads of the draws.

    If more than half of the draws are equal, their spread is the standard deviation; if all are equal, another median
    is at an infinite distance. NaN where either has no value.
    """
    apart = _median(values) - _median(draws)
    spread = NORMAL * _median(np.abs(draws - _median(draws)))
    spread = np.where(spread == 0, _deviation(draws), spread)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart == 0, 0.0, apart / spread)


def nearest_robust_z(to_null: np.ndarray, found: Sequence[int]) -> float:
    """How far the nearest of `found` to its null lies below all layers, in their spreads.

    Args:
        to_null: [L], distance of each layer (matrix, module) from its null, in any unit.
        found: indices of the layers of the finding.
    """
    own = to_null[np.asarray(found, int)]
    own = own[np.isfinite(own)]
    return float(robust_z(-own.min(keepdims=True)[None], -to_null[:, None])[0]) if len(own) else 0.0


def _median(values: np.ndarray) -> np.ndarray:
    return _by_column(np.median, values)


def _deviation(values: np.ndarray) -> np.ndarray:
    return _by_column(np.std, values)


def _by_column(function: Callable[[np.ndarray], np.floating], values: np.ndarray) -> np.ndarray:
    columns = [column[np.isfinite(column)] for column in values.T]
    return np.array([function(column) if len(column) else np.nan for column in columns])
