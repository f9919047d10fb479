"""Sums of squares of many tensors by group: the gradient norm of every block in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, library  # noqa: F401  (library defines the operators)

__all__ = ["sum_of_squares"]

MAX_GROUP = 2**31 - 1


def sum_of_squares(tensors: Sequence[Tensor], groups: Sequence[int], *, inv_scale: Tensor | None = None) -> Tensor:
    """Sum of squares of many tensors, one value per group.

    Equivalent to: ``out[g] = sum(((t.double() * inv_scale) ** 2).sum() for t, group in zip(tensors, groups) if
    group == g)``

    In float64 throughout, so that its root is right wherever that is a float: the squares of float32 are none outside
    1e-19 to 1e19. Deterministic for any number of threads. Not differentiable: inputs are
    read as values.

    Args:
        tensors: any shapes and strides, float32, bfloat16 or float16 (mixed), on one device; at least one.
        groups: the group of each tensor, integers >= 0.
        inv_scale: float32, one element, on the device of the tensors and read there, without waiting for it: the sums
            are multiplied by its square. ``1 / loss_scale``, for gradients of a
            scaled loss. None: 1.

    Returns:
        float64 ``[max(groups) + 1]``; a group without tensors is 0; NaN or inf where an element is.

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
        if not isinstance(group, int) or isinstance(group, bool):
            raise TypeError(f"groups[{i}]: expected an int, got {type(group).__name__}")
        if not 0 <= group <= MAX_GROUP:
            raise ValueError(f"groups[{i}]: expected a group in [0, {MAX_GROUP}], got {group}")
    if inv_scale is not None:
        if checks.device_tensor(inv_scale, "inv_scale", tensors[0], "tensors[0]").dtype != torch.float32:
            raise TypeError(f"inv_scale: expected dtype torch.float32, got {inv_scale.dtype}")
        if inv_scale.numel() != 1:
            raise ValueError(f"inv_scale: expected one element, got shape {list(inv_scale.shape)}")
    checks.no_tangent("sum_of_squares", *tensors, inv_scale, differentiable=False)
    with torch.no_grad():
        return torch.ops.inflection_fast.sum_of_squares(tensors, groups, max(groups) + 1, inv_scale)


@torch.library.register_fake("inflection_fast::sum_of_squares")
def _(tensors, groups, num_groups, inv_scale=None):
    return tensors[0].new_empty(num_groups, dtype=torch.float64)
