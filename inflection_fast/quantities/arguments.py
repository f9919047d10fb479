"""Checked arguments of quantities, and the weight matrices of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ..blocks import Block

__all__ = ["check_count", "matrix_names"]


def matrix_names(blocks: Iterable[Block], wants: Callable[[nn.Parameter], bool]) -> tuple[str, ...]:
    """Names of the wanted parameters inside the blocks, each once."""
    parameters = (one for block in blocks if block.module is not None for one in block.module.named_parameters())
    return tuple(dict.fromkeys(name for name, parameter in parameters if wants(parameter)))


def check_count(name: str, value: object, *, optional: bool = False) -> None:
    """`TypeError` for what is no integer, `ValueError` below 1. `optional`: None stands for the monitor's setting."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer{' or None' if optional else ''}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
