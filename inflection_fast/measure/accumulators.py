"""Accumulators on the device: `push` what one forward or backward gives, read once per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import sum_of_squares
from .packet import ATTENTION_SUMS
from .recent import Recent
from .schedule import Strata

if TYPE_CHECKING:
    from ..ops import AttentionStats

__all__ = ["MOST_LISTS", "GradientNorms", "HeadMeans", "LayerIndices"]

MOST_LISTS = 512  # of layers, of which tensors are kept: where layers are dropped at random, every step has others


class LayerIndices(Recent):
    """Tuples of layers as int64 tensors on a device, each brought there once: a copy from the host takes its time."""

    def __init__(self, device: torch.device):
        super().__init__(MOST_LISTS)
        self._device = device

    def __missing__(self, layers: tuple[int, ...]) -> Tensor:
        self[layers] = torch.tensor(layers).to(self._device, non_blocking=True)
        return self[layers]


class HeadMeans:
    """Sums over valid query rows per layer and head, for their means and the standard error of the mean entropy.

    The mean is the ratio of two estimated totals, entropy y and number v of valid rows, over all sequences, positions
    and micro-batches pushed. Its standard error is that of the linearised residuals e = y - mean * v, one per sampled
    position (all sequences share the positions, so a position is one draw), by successive differences dy and dv.

    Writes into the given memory, views of a `Packet` or of the heads of it that live here: `sums` [2, L, H] float64 in
    the order of `ATTENTION_SUMS`, `parts` [5, L, H] float32 in that of `ATTENTION_PARTS`, and `maxima` [L, H] float32.
    They begin at 0, 0 and -inf. Without `parts` and `maxima` there is the mean entropy and nothing else.
    """

    def __init__(self, sums: Tensor, parts: Tensor | None = None, maxima: Tensor | None = None):
        self._sums, self._parts, self._max = sums, parts, maxima

    def push(self, layers: Tensor, stats: Sequence[AttentionStats], valid: Tensor | None, strata: Strata) -> None:
        """Add the statistics of `G` layers over the same rows.

        Args:
            layers: [G] int64, their indices.
            stats: G statistics of [B, H, R].
            valid: [B, R] bool, rows that count; None: all. Rows without keys never count.
            strata: of the R rows.
        """
        # Few passes over few large tensors: each one is a kernel launch, or a team of threads to wake.
        ignored = _stacked(stats, ("keys",), self._sums.device)[0] == 0  # [G, B, H, R]
        if valid is not None:
            ignored |= ~valid[:, None, :].to(self._sums.device)
        names = ("entropy",) if self._parts is None else ("entropy", "collision", "sink")
        # Filled, not multiplied: what padding holds may be NaN.
        fields = _stacked(stats, names, self._sums.device).masked_fill_(ignored, 0.0).sum(2).double()  # [., G, H, R]
        v = (len(stats[0].entropy) - ignored.sum(1)).double()[None]  # [1, G, H, R]
        sums = torch.cat([v, fields]) @ strata.weights
        self._sums.index_add_(1, layers, sums[: len(ATTENTION_SUMS)])
        if self._parts is not None:
            self._push_parts(layers, sums[len(ATTENTION_SUMS) :], fields[:1], v, strata)
            highest = _stacked(stats, ("max_logit",), self._sums.device)[0].masked_fill_(ignored, -torch.inf)
            self._max[layers] = torch.maximum(self._max[layers], highest.amax((1, 3)))

    def _push_parts(self, layers: Tensor, means: Tensor, y: Tensor, v: Tensor, strata: Strata) -> None:
        if strata.rows is not None:
            dy, dv = y.diff(dim=-1), v.diff(dim=-1)
            squares = torch.cat([dy * dy, dy * dv, dv * dv]) @ strata.difference_weights
            means = torch.cat([means, squares])
        self._parts[: len(means)].index_add_(1, layers, means.float())


def _stacked(stats: Sequence[AttentionStats], names: Sequence[str], device: torch.device) -> Tensor:
    """[len(names), G, B, H, R] in new memory."""
    flat = torch.stack([getattr(one, name).to(device) for name in names for one in stats])
    return flat.unflatten(0, (len(names), len(stats)))


class GradientNorms:
    """l2 norm per layer of the gradients of all micro-batches together.

    A micro-batch has one slot per layer and a second push overwrites the first, so a backward pass that visits a block
    twice (recomputation, a retained graph) does not count twice.
    """

    def __init__(self, layers: int, device: torch.device):
        # [M, L], doubled when a step has more micro-batches
        self._norms = torch.zeros(1, layers, dtype=torch.float64, device=device)
        self._seen: set[int] = set()

    def push(self, micro_batch: int, layer: int, gradient: Tensor) -> None:
        """Write the norm of `gradient`, of any shape."""
        while micro_batch >= len(self._norms):
            self._norms = torch.cat([self._norms, torch.zeros_like(self._norms)])
        if gradient.dtype == torch.float64:
            norm = torch.linalg.vector_norm(gradient)
        else:  # in float64: the squares of a float32 of 1e-25 or 1e25 are none
            norm = sum_of_squares([gradient], [0])[0].sqrt()
        self._norms[micro_batch, layer] = norm
        self._seen.add(layer)

    def squares(self) -> Tensor:
        """[L] float64: squared norms, 0 where no gradient has arrived."""
        return self._norms.square().sum(0)

    @property
    def seen(self) -> frozenset[int]:
        """The layers that a gradient has reached."""
        return frozenset(self._seen)

    def reset(self) -> None:
        """Forget everything."""
        self._norms.zero_()
        self._seen.clear()
