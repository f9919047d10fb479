"""When to measure, and which query rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .recent import Recent

__all__ = ["RowSampler", "Strata", "is_due"]


def is_due(step: int, every: int) -> bool:
    """Whether optimizer step `step` (0-based) is one of 0, every, 2 * every, ..."""
    return step % every == 0


@dataclass(frozen=True)
class Strata:
    """Sampled query positions: one out of each of R strata, consecutive and of nearly equal size, that cover [0, T)."""

    rows: Tensor | None  # [R] int64, increasing; None: every position is measured
    weights: Tensor  # [R] float64, positions that each sampled one stands for
    difference_weights: Tensor  # [R - 1] float64, see `strata_of`; empty where every position is measured


class RowSampler:
    """Draws query positions from a seed: the same seed, step and order of lengths give the same positions.

    Of `share` = (i, n), sampler i of n takes every n-th draw: together they draw what one would for all their batches.
    """

    def __init__(self, rows: int | None, seed: int, device: torch.device):
        self._rows, self._seed, self._device = rows, seed, device
        self.share = (0, 1)
        self._generator = torch.Generator()
        # What does not depend on the draw, (first positions, sizes, weights) by length.
        self._shapes: dict[int, tuple[Tensor, Tensor, Tensor]] = Recent(MOST_LENGTHS)

    def begin(self, step: int) -> None:
        """Start the draws of one step, whatever was drawn before: a resumed run samples the same rows."""
        self._generator.manual_seed(_STEP_STRIDE * step + self._seed)

    def draw(self, length: int) -> Strata:
        """Positions out of [0, length), fresh with every call; all of them if there are no more than `rows`."""
        if self._rows is None or length <= self._rows:
            ones = torch.ones(length, dtype=torch.float64, device=self._device)
            return Strata(None, ones, ones[:0])
        starts, sizes, weights = self._shape_of(length)
        ends = torch.cat([starts[1:], starts.new_tensor([length])])
        own, samplers = self.share
        draws = torch.rand(samplers, self._rows, generator=self._generator, dtype=torch.float64)
        offsets = draws[own] * (ends - starts)
        return Strata(self._there(starts + offsets.long()), sizes, weights)

    def _shape_of(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if length not in self._shapes:
            starts, sizes = _strata(length, self._rows)
            self._shapes[length] = (starts, self._there(sizes), self._there(_difference_weights(sizes)))
        return self._shapes[length]

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)  # else the host would wait for all that the device has to do


MOST_LENGTHS = 32  # of sequences, of which the strata are kept: batches may all be of different lengths


# Knuth's multiplier scatters the steps over the 32 bits that torch's generator on the CPU takes of a seed.
_STEP_STRIDE = 2654435761


def _strata(length: int, rows: int) -> tuple[Tensor, Tensor]:
    """First position and size of each of `rows` strata of [0, length)."""
    bounds = torch.arange(rows + 1) * length // rows
    return bounds[:-1], bounds.diff().double()


def _difference_weights(sizes: Tensor) -> Tensor:
    """Weights of the squared differences between neighbouring samples in the variance of the estimated total.

    With one sample per stratum the variance inside stratum r comes from its neighbours (collapsed strata): s_r^2 is
    the mean of (e_r - e_{r-1})^2 / 2 and (e_{r+1} - e_r)^2 / 2. The variance of the total is then
    sum_r n_r^2 (1 - 1 / n_r) s_r^2: the bracket corrects for the finite population, and a stratum of one position
    adds nothing.
    """
    neighbours = torch.full_like(sizes, 2.0)
    neighbours[0] = neighbours[-1] = 1.0
    share = sizes * (sizes - 1) / (2 * neighbours)
    return share[:-1] + share[1:]
