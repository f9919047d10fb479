"""First-order gain of a low-rank adapter, for each weight matrix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import check_count, matrix_names
from .quantity import Accumulator, Column, MeasuredModel, ParameterGradient, Quantity, Sums

__all__ = ["FirstOrder", "random_share", "top_squares"]

_AXES = ("layer", "module")


class FirstOrder(Quantity):
    """The gradient G = dL/dW of every weight matrix of the blocks, with singular values s_1 >= s_2 >= ...

    A step of length e of an adapter of rank r lowers the loss by at most e sqrt(s_1^2 + ... + s_r^2) at first order
    (arXiv 2602.04019).

    * `first_order_gain`: s_1^2 + ... + s_r^2;
    * `first_order_share`: that over ||G||_F^2, the part of the gradient that rank r can follow. `random_share` is what
      a matrix of independent numbers of the same size has.

    With several micro-batches in a step the gain is the sum of those of each: measure a step of one batch. Matrices are
    those with both sides above r that train; shards of one (tensor parallelism) are left out. Every 500 steps
    where `MonitorConfig.every` is one number.

    Cost: for an m x n matrix, m <= n, 2 m^2 n + 4 m^3 / 3 operations in float32, which a GPU waits for. Memory: m^2
    numbers while it runs, 24 bytes per matrix in the packet.

    Args:
        rank: r, of the adapters.
        every: cadence in steps; None: as `MonitorConfig.every`.
    """

    name = "first_order"
    columns = {
        "first_order_gain": Column(
            unit="squared l2 norm",
            axes=_AXES,
            label="first-order gain of an adapter",
            explanation="Sum of the r largest squared singular values of the gradient of a module's weight.",
            drawn="heatmap",
            scale="log",
            count="measured",
        ),
        "first_order_share": Column(
            unit="1",
            axes=_AXES,
            label="share of the gradient within rank r",
            explanation="First-order gain over the squared norm of the gradient of the module's weight.",
            drawn="heatmap",
            count="measured",
        ),
    }

    def __init__(self, rank: int = 4, every: int | None = 500):
        check_count("rank", rank)
        check_count("every", every, optional=True)
        self.rank, self.every = rank, every

    def prepare(self, model: MeasuredModel) -> None:
        """Give every matrix of a block a place by its name there; `ValueError` where there is none."""
        names = matrix_names(model.blocks, self._wants)
        if not names:
            raise ValueError(f"first_order: the blocks have no matrix with both sides above the rank {self.rank}")
        self._places = {name: i for i, name in enumerate(names)}
        self.axes = {"module": names}
        self.accumulators = {
            "gain": Accumulator(_AXES, held="part", gradient_power=2),
            "squares": Accumulator(_AXES, held="part", gradient_power=2),
            "measured": Accumulator(_AXES, held="part"),
        }

    def _wants(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and min(parameter.shape) > self.rank and parameter.is_floating_point()

    def on_parameter_gradient(self, sums: Sums, seen: ParameterGradient) -> None:
        """Write the values of one matrix."""
        if not self._wants(seen.parameter) or seen.gradient.shape != seen.parameter.shape:
            return
        at = seen.layer, self._places[seen.name]
        sums["gain"][at].copy_(top_squares(seen.gradient, self.rank) * seen.share, non_blocking=True)
        sums["squares"][at].copy_(seen.gradient.double().square().sum() * seen.share, non_blocking=True)
        sums["measured"][at].fill_(1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Gains, and their share of the gradients."""
        return {"first_order_gain": sums["gain"], "first_order_share": sums["gain"] / sums["squares"]}


def top_squares(matrix: Tensor, rank: int) -> Tensor:
    """float64 []: the sum of the `rank` largest squared singular values of a matrix ``[m, n]``.

    From the eigenvalues of its smaller Gram matrix in float32 (float64 for a float64 matrix), so to about 1e-6 of the
    largest of them.
    """
    matrix = matrix.detach()
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    largest = matrix.abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)  # squares of gradients of 1e-30 are no float32 numbers
    matrix = matrix / scale
    values = torch.linalg.eigvalsh(matrix @ matrix.mT)[-rank:].clamp(min=0.0)
    return values.sum().double() * scale.double().square()


def random_share(rows: int, columns: int, rank: int) -> float:
    """About the share of the squared norm that the `rank` largest singular values of pure noise have.

    Of independent numbers with one variance, the largest squared singular values lie at the edge of the
    Marchenko-Pastur law, ``(sqrt(rows) + sqrt(columns))^2``, and all of them sum to ``rows columns``. A little too
    large, as the law's edge is that of the first alone; never above 1.
    """
    return float(min(1.0, rank * (np.sqrt(rows) + np.sqrt(columns)) ** 2 / (rows * columns)))
