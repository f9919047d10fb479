"""States of several ranks become one: a shift that all agree on, then one sum over everything that adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from .cka_state import CkaState

__all__ = ["agree", "all_reduce"]


def agree(state: CkaState, group: object) -> None:
    """Give `state` the mean of the ranks' shifts, weighted by their rows."""
    check_bases(state, group)
    rows = state.rows[:, None]
    sums = torch.cat([rows, torch.where(rows > 0, state.shift.double() * rows, 0.0)], 1)
    distributed.all_reduce(sums, group=group)
    state.rebase((sums[:, 1:] / sums[:, :1].clamp(min=1)).float().contiguous())
    state._adopt = False


def all_reduce(state: CkaState, group: object) -> CkaState:
    """A state of all ranks' rows."""
    total = state.copy()
    agree(total, group)
    distributed.all_reduce(total._sums, group=group)
    return total


def check_bases(state: CkaState, group: object) -> None:
    """`ValueError` on every rank where one has another frozen basis: sums in different bases do not add."""
    mark = fingerprint(state)
    bounds = torch.stack([mark, -mark])
    distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX, group=group)
    if bounds[0] != -bounds[1]:
        raise ValueError("basis: the ranks have different ones; broadcast one before the first push")


def fingerprint(state: CkaState) -> Tensor:
    """A number that different bases do not share, but for a coincidence; 0 without one."""
    if state.frozen is None:
        return state.gram.new_zeros(())
    vectors = state.frozen.vectors.double().flatten()
    return vectors @ torch.arange(1, len(vectors) + 1, device=vectors.device, dtype=torch.float64).sqrt()
