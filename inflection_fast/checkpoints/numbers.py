"""Means and standard errors over batches, and numbers as JSON has them."""

from __future__ import annotations

import numpy as np

__all__ = ["Numbers", "error_of", "mean_of", "numbers", "or_none"]

Numbers = list[float | None]


def mean_of(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean over an axis of what is finite; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis)
    return np.where(count > 0, np.where(there, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def error_of(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for fewer than two values."""
    there = np.isfinite(values)
    count = there.sum(0)
    squares = np.where(there, (np.where(there, values, 0.0) - mean_of(values)) ** 2, 0.0).sum(0)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count * (count - 1), 1)), np.nan)


def numbers(values: np.ndarray) -> Numbers:
    """With None for what is no number."""
    return [or_none(float(value)) for value in values]


def or_none(value: float) -> float | None:
    """None for what is no number."""
    return value if np.isfinite(value) else None
