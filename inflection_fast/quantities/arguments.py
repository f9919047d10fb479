"""Arguments that quantities take, checked."""

from __future__ import annotations

__all__ = ["check_count"]


def check_count(name: str, value: object, *, optional: bool = False) -> None:
    """`TypeError` for what is no integer, `ValueError` below 1. `optional`: None stands for the monitor's setting."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer{' or None' if optional else ''}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
