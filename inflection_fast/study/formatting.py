"""Numbers and tables as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence

from inflection_fast.study.analysis import Effect

__all__ = ["interval", "mean", "names", "p_value", "signed", "table"]


def signed(x: float, digits: int = 2) -> str:
    """A number with its sign."""
    return f"{x:+.{digits}f}".replace("-", "−")


def interval(effect: Effect | None, digits: int = 2) -> str:
    """A difference with its 95 % interval."""
    if effect is None:
        return "too few cells"
    return f"{signed(effect.difference, digits)} [{signed(effect.low, digits)}, {signed(effect.high, digits)}]"


def p_value(value: float | None) -> str:
    """A p as it is printed; nothing for None."""
    if value is None:
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def names(arms: Sequence[str]) -> str:
    """Names of arms in a sentence."""
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
