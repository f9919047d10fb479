"""Norms of the gradients of blocks' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..ops import sum_of_squares
from ..timeline.older import GRADIENT_RULES
from .quantity import Accumulator, Column, OutputGradient, Quantity, Sums

__all__ = ["ActivationGrad", "ProbeActivationGrad"]


_SUMS = {
    "squares": Accumulator(held="output", gradient_power=2),  # squared norms
    "count": Accumulator(held="output"),  # 1 where a gradient has arrived
}


_norm = partial(Column, "l2 norm", ("layer",), scale="log", count="count")


class _OutputGradients(Quantity):
    """l2 norm per layer of the gradient at the block's output, over all micro-batches and ranks."""

    accumulators = _SUMS

    def on_output_gradient(self, sums: Sums, seen: OutputGradient) -> None:
        """Write the squared norm: a backward pass that comes twice through a block does not count twice."""
        sums["squares"][seen.layer].copy_(_squares([seen.gradient])[0])
        sums["count"][seen.layer].fill_(1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The root."""
        return {self.name: np.sqrt(sums["squares"])}


def _squares(gradients: Sequence[Tensor]) -> Tensor:
    """[n] float64: the squared norm of each."""
    if gradients[0].dtype == torch.float64:
        return torch.stack([torch.linalg.vector_norm(gradient).square() for gradient in gradients])
    return sum_of_squares(gradients, range(len(gradients)))  # in float64: float32 of 1e-25 or 1e25 have no squares


class ActivationGrad(_OutputGradients):
    """The norm of the gradient of the loss with respect to each block's output, on the training batch.

    Below the lowest block that trains, n of a micro-batch's B sequences are looked at (`MonitorConfig.frozen_share`).
    Their squared norms q estimate the sum over all, without a bias: Q = B mean(q), with the variance
    B^2 (1 - n / B) s^2 / n of simple random sampling, s^2 being the variance of q among those n (Cochran, Sampling
    Techniques, 1977, chapter 2). Over micro-batches and ranks both add up. `activation_grad_se` is the standard error
    of the norm to first order, sqrt(variance) / (2 sqrt(Q)): 0 where all sequences were looked at, NaN where n is 1.

    Memory: 24 bytes per layer, and as much for every micro-batch of a step.
    """

    name = "activation_grad"
    take_samples = True
    accumulators = {**_SUMS, "variance": Accumulator(held="output", gradient_power=4)}
    columns = {
        "activation_grad_se": Column(
            unit="1",
            axes=("layer",),
            label="standard error of the activation gradient norm",
            explanation="Standard error of activation_grad where it is of some sequences alone, in frozen blocks.",
            drawn="none",
            count="count",
        ),
        "activation_grad": _norm(
            "activation gradient",
            "How strongly the loss pulls on the output of a layer. Compare layers of one step.",
            alerts=GRADIENT_RULES,
        ),
    }

    def on_output_gradient(self, sums: Sums, seen: OutputGradient) -> None:
        """Write the estimated sum of squared norms over the sequences, and its variance."""
        if seen.sequences is None:
            super().on_output_gradient(sums, seen)
            return
        squares, all_of_them = _squares(seen.gradient.unbind(0)), seen.sequences
        some = len(squares)
        sums["squares"][seen.layer].copy_(squares.mean() * all_of_them)
        sums["count"][seen.layer].fill_(1)
        if some == 1:
            sums["variance"][seen.layer].fill_(torch.nan)
        else:
            sums["variance"][seen.layer].copy_(squares.var() * (all_of_them * (all_of_them - some) / some))

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The root, and its standard error."""
        norm = np.sqrt(sums["squares"])
        error = np.where(sums["variance"] == 0, 0.0, np.sqrt(sums["variance"]) / (2 * norm))
        return {self.name: norm, "activation_grad_se": error}


class ProbeActivationGrad(_OutputGradients):
    """The same on the probe set, where the model returns a loss for the probe's labels.

    Memory: 16 bytes per layer, and as much for every micro-batch of a step.
    """

    name = "probe_activation_grad"
    data = "probe"
    columns = {
        "probe_activation_grad": _norm(
            "activation gradient on the probe", "As the activation gradient, on a fixed set of texts."
        )
    }
