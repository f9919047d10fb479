"""Sums of squares of many tensors by group: squared gradient norms of all blocks in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, library  # noqa: F401  (library defines the operators)

__all__ = ["sum_of_squares"]

MAX_GROUP = 2**31 - 1


def sum_of_squares(tensors: Sequence[Tensor], groups: Sequence[int], *, inv_scale: Tensor | None = None) -> Tensor:
    """Sum of squares of many tensors, by group.

    Equivalent to: ``out[g] = sum(((t.double() * inv_scale) ** 2).sum() for t, group in zip(tensors, groups) if
    group == g)``

    Squares and sums are float64: in float32 the square of a number outside 1e-19 to 1e19 overflows or underflows. The
    result does not depend on the number of threads. Not differentiable.

    Args:
        tensors: at least one, any shapes and strides, float32, bfloat16 or float16 (mixed), on one device.
        groups: group number of each tensor, integers >= 0.
        inv_scale: float32, one element, on the device of the tensors: the sums are multiplied by its square. Pass ``1 /
            loss_scale`` for gradients of a scaled loss. Read on the device, without synchronisation. None: 1.

    Returns:
        float64 ``[max(groups) + 1]``. A group without tensors is 0; NaN and inf in a tensor stay NaN and inf.

    Raises:
        TypeError: an element of `tensors` is no tensor of these dtypes, a group no integer, or `inv_scale` not float32.
        ValueError: lengths differ, no tensors, a negative group, several devices, or several elements of `inv_scale`.
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
        checks.integer(group, f"groups[{i}]", 0, MAX_GROUP)
    if inv_scale is not None:
        checks.device_tensor(inv_scale, "inv_scale", tensors[0], "tensors[0]", torch.float32)
        if inv_scale.numel() != 1:
            raise ValueError(f"inv_scale: expected one element, got shape {list(inv_scale.shape)}")
    checks.no_tangent("sum_of_squares", *tensors, inv_scale, differentiable=False)
    with torch.no_grad():
        return torch.ops.inflection_fast.sum_of_squares(tensors, groups, max(groups) + 1, inv_scale)


@torch.library.register_fake("inflection_fast::sum_of_squares")
def _(tensors, groups, num_groups, inv_scale=None):
    return tensors[0].new_empty(num_groups, dtype=torch.float64)
