"""How large the gradients are that arrive at the blocks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..ops import sum_of_squares
from .quantity import Accumulator, AlertRule, Column, OutputGradient, Quantity, Sums

__all__ = ["ActivationGrad", "ProbeActivationGrad"]


class _OutputGradients(Quantity):
    """l2 norm per layer of the gradient at the block's output, over all micro-batches and ranks.

    Memory: 16 bytes per layer, and as much for every micro-batch of a step.
    """

    accumulators = {
        "squares": Accumulator(held="output", gradient_power=2),  # squared norms
        "count": Accumulator(held="output"),  # 1 where a gradient has arrived
    }

    def on_output_gradient(self, sums: Sums, seen: OutputGradient) -> None:
        """Write the squared norm: a backward pass that comes twice through a block does not count twice."""
        gradient = seen.gradient
        if gradient.dtype == torch.float64:
            squares = torch.linalg.vector_norm(gradient).square()
        else:  # in float64: the squares of a float32 of 1e-25 or 1e25 are none
            squares = sum_of_squares([gradient], [0])[0]
        sums["squares"][seen.layer].copy_(squares)
        sums["count"][seen.layer].fill_(1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The root."""
        return {self.name: np.sqrt(sums["squares"])}


class ActivationGrad(_OutputGradients):
    """The norm of the gradient of the loss with respect to each block's output, on the training batch."""

    name = "activation_grad"
    columns = {
        "activation_grad": Column(
            unit="1",
            axes=("layer",),
            label="activation gradient norm",
            explanation="l2 norm of the gradient of the loss with respect to the block's output, over the whole batch.",
            scale="log",
            count="count",
            alerts=(
                AlertRule("exploding", "exploding", kind="exploding_gradient"),
                AlertRule("dead", "dead", kind="dead_gradient"),
                AlertRule("not_finite"),
            ),
        )
    }


class ProbeActivationGrad(_OutputGradients):
    """The same on the probe set, where the model returns a loss for the probe's labels."""

    name = "probe_activation_grad"
    data = "probe"
    columns = {
        "probe_activation_grad": Column(
            unit="1",
            axes=("layer",),
            label="activation gradient norm on the probe",
            explanation="l2 norm of the gradient of the probe's loss with respect to the block's output.",
            scale="log",
            count="count",
        )
    }
