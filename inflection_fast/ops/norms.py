"""Sums of squares of many tensors by group: the gradient norm of every block in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, library  # noqa: F401  (library defines the operators)

__all__ = ["sum_of_squares"]

MAX_GROUP = 2**31 - 1


def sum_of_squares(tensors: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Sum of squares of many tensors, one value per group.

    Equivalent to: ``out[g] = sum((t.double() ** 2).sum() for t, group in zip(tensors, groups) if group == g)``

    Accumulates in float64 and rounds once; deterministic for any number of threads. Not differentiable: inputs are
    read as values.

    Args:
        tensors: any shapes and strides, float32, bfloat16 or float16 (mixed), on one device; at least one.
        groups: the group of each tensor, integers >= 0.

    Returns:
        float32 ``[max(groups) + 1]``; a group without tensors is 0; NaN or inf where an element is.

    Raises:
        TypeError: an element of `tensors` is no tensor of these dtypes, or a group is no integer.
        ValueError: lengths differ, no tensors, a negative group, or several devices.
    """
    tensors, groups = list(tensors), list(groups)
    if len(tensors) != len(groups):
        raise ValueError(f"groups: need one group for each of the {len(tensors)} tensors, got {len(groups)}")
    if not tensors:
        raise ValueError("tensors: need at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        checks.float_tensor(tensor, f"tensors[{i}]")
        checks.same_device(tensor, f"tensors[{i}]", tensors[0], "tensors[0]")
    for i, group in enumerate(groups):
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"groups[{i}]: expected an int, got {type(group).__name__}")
        if not 0 <= group <= MAX_GROUP:
            raise ValueError(f"groups[{i}]: expected a group in [0, {MAX_GROUP}], got {group}")
    with torch.no_grad():
        return torch.ops.inflection_fast.sum_of_squares(tensors, groups, max(groups) + 1)


@torch.library.register_fake("inflection_fast::sum_of_squares")
def _(tensors, groups, num_groups):
    return tensors[0].new_empty(num_groups, dtype=torch.float32)
