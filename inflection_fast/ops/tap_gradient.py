"""Squared norms of gradients inside a graph, behind a flag that the device reads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

__all__ = ["GRADIENT_SUMS", "listened_to", "tap_gradient"]

GRADIENT_SUMS = ("arrivals", "squares")  # kTapGradientSums


def tap_gradient(gradient: Tensor, slots: Tensor, slot: int, *, flag: Tensor) -> None:
    """Where `flag` is not 0, add 1 and the squared l2 norm of a tensor to a slot; else do nothing.

    Equivalent to: ``if flag: slots[slot] += torch.stack([1, gradient.double().square().sum()])``

    In float64 and in the order of `sum_of_squares`. May stand in a compiled or a captured graph.

    Args:
        gradient: any shape and strides, float32, bfloat16 or float16.
        slots: float64 ``[S, 2]``, contiguous, on the device of `gradient`, in the order of `GRADIENT_SUMS`.
        slot: which of them.
        flag: int32, one element, on that device.

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


class _Listened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, slots: Tensor, slot: int, flag: Tensor) -> Tensor:
        # Not by `save_for_backward`: they are written to in between, by the backward pass of another micro-batch.
        ctx.slots, ctx.flag, ctx.slot = slots, flag, slot
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        torch.ops.inflection_fast.tap_gradient(gradient, ctx.flag, ctx.slots, ctx.slot)  # which checks what came
        return gradient, None, None, None


def listened_to(tensor: Tensor, slots: Tensor, slot: int, *, flag: Tensor) -> Tensor:
    """`tensor`, whose gradient goes through `tap_gradient` on its way back."""
    return _Listened.apply(tensor, slots, slot, flag)
