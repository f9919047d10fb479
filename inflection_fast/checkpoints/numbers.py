"""Means and standard errors over batches, and numbers as JSON has them."""

from __future__ import annotations

import numpy as np

from inflection_fast.timeline.means import finite_mean

__all__ = ["Numbers", "error_of", "numbers", "or_none"]

Numbers = list[float | None]


def error_of(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for fewer than two values."""
    there = np.isfinite(values)
    count = there.sum(0)
    squares = np.where(there, (np.where(there, values, 0.0) - finite_mean(values)) ** 2, 0.0).sum(0)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count * (count - 1), 1)), np.nan)


def numbers(values: np.ndarray) -> Numbers:
    """With None for what is no number."""
    return [or_none(float(value)) for value in values]


def or_none(value: float) -> float | None:
    """None for what is no number."""
    return value if np.isfinite(value) else None
