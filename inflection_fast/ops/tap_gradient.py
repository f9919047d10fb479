"""Squared norms of gradients, measured inside a graph if a flag on the device is set."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

__all__ = ["GRADIENT_SUMS", "gradient_tap", "tap_gradient"]

GRADIENT_SUMS = ("arrivals", "squares")  # kTapGradientSums


def tap_gradient(gradient: Tensor, slots: Tensor, slot: int, *, flag: Tensor) -> None:
    """If `flag` is not 0, add 1 and the squared l2 norm of a tensor to a slot.

    Equivalent to: ``if flag: slots[slot] += torch.stack([1, gradient.double().square().sum()])``

    Sums in float64, in the order of `sum_of_squares`. Works in a compiled graph and in a captured CUDA graph.

    Args:
        gradient: any shape and strides, float32, bfloat16 or float16.
        slots: float64 ``[S, 2]``, contiguous, on the device of `gradient`; columns as in `GRADIENT_SUMS`.
        slot: index of the row of `slots`.
        flag: int32, one element, on the same device.

    Raises:
        TypeError: `gradient` is no tensor of these dtypes.
        ValueError: `flag` or `slots` are on another device.
    """
    checks.float_tensor(gradient, "gradient")
    for name, value in (("flag", flag), ("slots", slots)):
        checks.device_tensor(value, name, gradient, "gradient")
    torch.ops.inflection_fast.tap_gradient(gradient.detach(), flag, slots, slot)


@torch.library.register_fake("inflection_fast::tap_gradient")
def _(gradient, flag, slots, slot):
    return None


class _GradientTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, slots: Tensor, slot: int, flag: Tensor) -> Tensor:
        # Not `save_for_backward`: the backward pass of another micro-batch writes to them in between.
        ctx.slots, ctx.flag, ctx.slot = slots, flag, slot
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        torch.ops.inflection_fast.tap_gradient(gradient, ctx.flag, ctx.slots, ctx.slot)  # the operator checks them
        return gradient, None, None, None


def gradient_tap(tensor: Tensor, slots: Tensor, slot: int, *, flag: Tensor) -> Tensor:
    """Identity whose backward pass calls `tap_gradient` on the gradient."""
    return _GradientTap.apply(tensor, slots, slot, flag)
