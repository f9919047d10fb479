"""Many measured steps in a limited number of buckets, with extremes, in bounded memory."""

from __future__ import annotations

import numpy as np

__all__ = ["Buckets"]


class Buckets:
    """Mean, smallest and largest value of consecutive measured steps, in at most `limit` buckets of equal length.

    A bucket has one step at first. When `limit` buckets are full, neighbours are joined in pairs and the length
    doubles; means and extremes stay exact. Values that are not finite are ignored. A step without any value is left
    out, so a quantity that is measured less often has its own steps.
    """

    _count: np.ndarray
    _sum: np.ndarray
    _low: np.ndarray
    _high: np.ndarray

    def __init__(self, shape: tuple[int, ...], limit: int):
        if limit < 2 or limit % 2:
            raise ValueError(f"limit: expected an even number of buckets, at least 2, got {limit}")
        self.shape, self.limit = shape, limit
        self.length = 1  # measured steps in a full bucket
        self._used = self._filled = 0  # buckets begun, and steps in the last of them
        self._first, self._last = np.zeros(limit, np.int64), np.zeros(limit, np.int64)
        self._allocated = 0
        self._grow(min(limit, 16))

    def _grow(self, size: int) -> None:
        """Allocate memory for more buckets: most runs are short."""
        for name, start, dtype, _ in _PARTS:
            fresh = np.full((size, *self.shape), start, dtype)
            if self._allocated:
                fresh[: self._allocated] = getattr(self, name)
            setattr(self, name, fresh)
        self._allocated = size

    def push(self, step: int, values: np.ndarray, count: np.ndarray | None = None, low=None, high=None) -> None:
        """Add one measured step.

        `values` [shape]. If each is the mean of several numbers, `count` is how many of those were finite, and `low`
        and `high` are their extremes.
        """
        values = np.asarray(values, np.float64)
        finite = np.isfinite(values)
        if not finite.any():
            return
        number = finite.astype(np.int64) if count is None else np.where(finite, count, 0)
        low = np.where(finite, values if low is None else low, np.inf)
        high = np.where(finite, values if high is None else high, -np.inf)
        if self._filled == self.length or not self._used:
            if self._used == self.limit:
                self._join()
            self._used, self._filled = self._used + 1, 0
            if self._used > self._allocated:
                self._grow(min(self.limit, 2 * self._allocated))
            self._first[self._used - 1] = step
        i = self._used - 1
        self._filled += 1
        self._last[i] = step
        self._count[i] += number
        self._sum[i] += np.where(finite, values, 0) * number
        self._low[i] = np.minimum(self._low[i], low)
        self._high[i] = np.maximum(self._high[i], high)

    def _join(self) -> None:
        half = self.limit // 2
        for name, start, _, join in _PARTS:
            array = getattr(self, name)
            array[:half], array[half:] = join(array[0::2], array[1::2]), start
        self._first[:half], self._last[:half] = self._first[0::2].copy(), self._last[1::2].copy()
        self.length *= 2
        self._used, self._filled = half, self.length

    @property
    def steps(self) -> np.ndarray:
        """[B, 2] the first and the last step of every bucket."""
        return np.stack([self._first[: self._used], self._last[: self._used]], axis=1)

    def over_places(self) -> np.ndarray:
        """[B, 3] mean, least and largest value of everything in a bucket, NaN where there is none."""
        rows = (self._used, -1)
        count = self._count[: self._used].reshape(rows).sum(1)
        mean = self._sum[: self._used].reshape(rows).sum(1) / np.maximum(count, 1)
        low, high = (self._low[: self._used].reshape(rows).min(1), self._high[: self._used].reshape(rows).max(1))
        return np.where(count[:, None] > 0, np.stack([mean, low, high], axis=1), np.nan)

    @property
    def mean(self) -> np.ndarray:
        """[B, shape], NaN where there is no value."""
        count = self._count[: self._used]
        return np.where(count > 0, self._sum[: self._used] / np.maximum(count, 1), np.nan)

    @property
    def low(self) -> np.ndarray:
        """[B, shape] the least value, NaN where there is none."""
        return np.where(self._count[: self._used] > 0, self._low[: self._used], np.nan)

    @property
    def high(self) -> np.ndarray:
        """[B, shape] the largest value, NaN where there is none."""
        return np.where(self._count[: self._used] > 0, self._high[: self._used], np.nan)


_PARTS = (
    ("_count", 0, np.int64, np.add),
    ("_sum", 0.0, np.float64, np.add),
    ("_low", np.inf, np.float64, np.minimum),
    ("_high", -np.inf, np.float64, np.maximum),
)
