"""Numbers and lists as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inflection_fast.report.folder import Stage

__all__ = [
    "MISSING", "accuracy", "capitalised", "count", "layer_list", "layer_ranges", "listed", "percent", "score",
    "seconds", "setting", "significant", "trainable", "value",
]  # fmt: skip

MISSING = "not recorded"


def percent(share: float | None, digits: int = 1) -> str:
    """0.785 as `78.5 %`."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def accuracy(share: float | None, error: float | None) -> str:
    """0.785 and 0.011 as `78.5 ± 1.1 %`."""
    if share is None or error is None:
        return percent(share)
    return f"{100 * share:.1f} ± {100 * error:.1f} %"


def count(number: float | None) -> str:
    """22713216 as `22,713,216`."""
    return MISSING if number is None else f"{number:,.0f}"


def seconds(number: float | None) -> str:
    """A duration in the unit that suits it."""
    if number is None:
        return MISSING
    if 0 < number < 1:
        return f"{1000 * number:.0f} ms"
    if number < 120:
        return f"{number:.0f} s" if number >= 10 else f"{number:.1f} s"
    return f"{number / 60:.1f} min" if number < 7200 else f"{number / 3600:.1f} h"


def significant(number: float, digits: int = 3) -> str:
    """A measured value with so many significant digits; a dash where there is none."""
    if not math.isfinite(number):
        return "-"
    if number != 0 and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(number))) if number else 0)
    return f"{number:.{max(decimals, 0)}f}"


def score(number: float) -> str:
    """An index between 0 and 1."""
    return f"{number:.3f}" if math.isfinite(number) else "-"


def value(number: float | None, digits: int = 3) -> str:
    """As `significant`, and `not recorded` for None."""
    return MISSING if number is None else significant(number, digits)


def capitalised(text: str) -> str:
    """The text with a first letter in upper case."""
    return text[:1].upper() + text[1:]


def trainable(stage: Stage) -> str:
    """The trainable parameters of a stage and their share of all: `2,048 (0.10 %)`."""
    number, total = stage.trainable_parameters, stage.total_parameters
    return f"{count(number)}{f' ({percent(number / total, 2)})' if number and total else ''}"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(items)
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def layer_list(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 0, 1 and 4`, `no layer`."""
    if not layers:
        return "no layer"
    return f"layer{'s' if len(layers) > 1 else ''} {listed([str(layer) for layer in layers])}"


def layer_ranges(layers: Sequence[int]) -> str:
    """As `layer_list`, with `0 to 5` in place of four and more layers in a row: for models of any depth."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 3 else map(str, run))]
    return f"layer{'s' if len(layers) > 1 else ''} {listed(parts)}" if parts else "no layer"


def setting(value: object) -> str:
    """A setting or a result in a table: `yes`, `none`, `1.427`, or as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return significant(value, 4) if isinstance(value, float) else str(value)
