"""Norms of the gradients of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..timeline.older import GRADIENT_RULES
from .quantity import Accumulator, Column, Parameters, Quantity, Sums

__all__ = ["ParameterGrad"]


class ParameterGrad(Quantity):
    """l2 norm of the gradient over each block's parameters, before clipping and without loss scale.

    A parameter that several layers share counts for the first of them. Memory: 16 bytes per layer.
    """

    name = "parameter_grad"
    accumulators = {
        "squares": Accumulator(held="part", gradient_power=2),
        "count": Accumulator(held="part"),  # ranks with trainable parameters in the block
    }
    columns = {
        "parameter_grad": Column(
            unit="l2 norm",
            axes=("layer",),
            label="parameter gradient",
            explanation="The gradient of a layer's own parameters before clipping. Frozen layers have none.",
            scale="log",
            count="count",
            alerts=GRADIENT_RULES,
        )
    }

    def on_backward_end(self, sums: Sums, parameters: Parameters) -> None:
        """Write the squared norms: gradients add up over micro-batches, so the last backward pass has them whole."""
        layers, _, gradients = parameters.gradients()
        if gradients:
            sums["squares"].copy_(parameters.squares(gradients, layers))
            sums["count"].copy_(parameters.marked(parameters.trained))

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The root."""
        return {"parameter_grad": np.sqrt(sums["squares"])}
