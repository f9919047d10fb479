"""Standard errors over batches, numbers for JSON, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report.words import significant
from inflection_fast.timeline.means import finite_mean

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Numbers", "error_of", "finite_or_none", "in_words", "numbers", "print_grid"]

Numbers = list[float | None]


def error_of(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the first axis; NaN for fewer than two values."""
    there = np.isfinite(values)
    count = there.sum(0)
    squares = np.where(there, (np.where(there, values, 0.0) - finite_mean(values)) ** 2, 0.0).sum(0)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count * (count - 1), 1)), np.nan)


def numbers(values: np.ndarray) -> Numbers:
    """The values as floats, None for what is not finite."""
    return [finite_or_none(float(value)) for value in values]


def finite_or_none(value: float) -> float | None:
    """The value, None if it is not finite."""
    return value if np.isfinite(value) else None


def in_words(value: float | None) -> str:
    """A value with three significant digits, a dash for None."""
    return "-" if value is None else significant(value)


def print_grid(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0, **style: Any
) -> None:
    """Print a table whose first `left` columns are left-aligned."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold", **style)
    for i, name in enumerate(head):
        grid.add_column(name, justify="left" if i < left else "right")
    for row in rows:
        grid.add_row(*row)
    console.print(grid, soft_wrap=False)
