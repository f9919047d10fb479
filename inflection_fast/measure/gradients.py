"""Gradients of a whole model, from the sums of squares of its blocks and what lies outside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import Block
from .distributed import local_of

__all__ = ["gradients_of", "scale_of", "squares_of_all"]


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are; of a sparse one its values, each position once."""
    gradients = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
    return [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]


def squares_of_all(
    parameters: Sequence[nn.Parameter], blocks: Sequence[Block], known: Tensor | None, loss_scale: float | Tensor = 1.0
) -> Tensor:
    """Sum of squares of the gradients of `parameters`, or of this rank's parts of them, float64 [].

    `known` are the sums of the blocks, [<= L], of gradients that were `loss_scale` times as large. They are used if
    they are about just these parameters; None, or blocks that share parameters or have others: all are summed.
    """
    of_blocks = [p for block in blocks for p in block.module.parameters() if p.requires_grad and p.grad is not None]
    distinct = set(of_blocks)
    if known is None or len(distinct) < len(of_blocks) or not distinct <= set(parameters):
        known, distinct = None, set()
    rest = [local_of(gradient) for gradient in gradients_of(p for p in dict.fromkeys(parameters) if p not in distinct)]
    total = 0.0 if known is None else known.double().sum() / loss_scale**2
    if rest:
        total = total + ops.sum_of_squares(rest, [0] * len(rest))[0]
    device = parameters[0].device if parameters else None
    return total if isinstance(total, Tensor) else torch.zeros((), dtype=torch.float64, device=device)


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """What `scaler` multiplies losses by, float64 [], without waiting for the device as its `get_scale` does."""
    return scaler.scale(torch.ones((), device=device)).double()  # its square may be more than a float32 holds
