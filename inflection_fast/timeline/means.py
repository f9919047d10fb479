"""Means over finite values."""

from __future__ import annotations

import numpy as np

__all__ = ["finite_mean"]


def finite_mean(values: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """Mean of the finite values over `axis`; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.where(count > 0, np.where(finite, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)
