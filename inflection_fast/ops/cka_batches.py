"""Gram matrices over rows without their diagonals, batch by batch, and the inner products that minibatch CKA needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Relative, of a float32 mean: 100 times its unit, which covers sums in blocks of any number of rows.
MEAN_ROUNDING = 2**-16
# Products that are summed in float32: equal ones all round the same way, and 1 << 15 of them erred by 4e-5.
RUN = 1 << 9


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices of `size`, the last one of what is left."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


class Products:
    """Gram matrices between rows, each written where the one before it was: fresh pages cost a third of a product."""

    def __init__(self):
        self._memory: Tensor | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b.mT`` of ``[L, m, D]`` and ``[L, n, D]``, until the next call."""
        shape = (a.shape[0], a.shape[1], b.shape[1])
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # before the larger one is there
            self._memory = a.new_empty(size)
        return torch.bmm(a, b.mT, out=self._memory[:size].view(shape))


def take_diagonal(gram: Tensor) -> Tensor:
    """Of ``[L, n, n]``, as float64; zero in its place."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    taken = diagonal.double()
    diagonal.zero_()
    return taken


def inner(grams: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Inner products ``[L, L2]`` of the matrices of one model, or of two, and of each with itself; float64."""
    sides = [gram.flatten(1) for gram in grams]
    runs = sides[0].shape[1] // RUN * RUN
    pieces = [[side[:, :runs].unflatten(1, (-1, RUN)).transpose(0, 1) for side in sides]] if runs else []
    pieces += [[side[None, :, runs:] for side in sides]]  # what is left, less than a run
    cross = sum((piece[0] @ piece[-1].mT).sum(0, dtype=torch.float64) for piece in pieces)
    if len(sides) == 1:
        return cross, [cross.diagonal()]
    own = [sum(piece[i].square().sum(2).sum(0, dtype=torch.float64) for piece in pieces) for i in (0, 1)]
    return cross, own


def near_mean(rows: Tensor, out: Tensor) -> Tensor:
    """Rows ``[L, n, D]`` less something near their mean, which is all that HSIC_1 needs: it centres them itself.

    A float32 mean of equal numbers need not be that number; there the first row is taken, so that a constant leaves 0.
    """
    mean, first = rows.mean(1, keepdim=True), rows[:, :1]
    return torch.sub(rows, torch.where((mean - first).abs() <= MEAN_ROUNDING * first.abs(), first, mean), out=out)


def without_diagonal(batch: list[Tensor], products: list) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Of the Gram matrices of rows ``[L, n, D]``, n even: inner products, as `inner`, and sums of rows ``[L, n]``.

    In halves of the rows: of the four products one is the mirror image of another and left out. `products`: of every
    model two, for those that are at once.
    """
    half = batch[0].shape[1] // 2
    own, beside, sums = [], [], []
    for rows, (of_halves, across) in zip(batch, products, strict=True):
        halves = rows.view(2 * len(rows), half, -1)
        own.append(of_halves(halves, halves))
        beside.append(across(rows[:, :half], rows[:, half:]))
        diagonal = take_diagonal(own[-1]).view(len(rows), -1)
        sums.append((rows @ rows.sum(1, keepdim=True).mT)[..., 0] - diagonal)
    cross, squares = inner([gram.view(len(rows), -1) for gram, rows in zip(own, batch, strict=True)])
    twice, more = inner(beside)
    return cross + 2 * twice, [a + 2 * b for a, b in zip(squares, more, strict=True)], sums


@torch.library.register_fake("inflection_fast::cka_batches")
def _(x, y, tile, factors=None):
    layers, rows = x.shape[0] + (0 if y is None else y.shape[0]), x.shape[1]
    batches = -(-rows // tile)
    sizes = (batches, x.shape[0], (x if y is None else y).shape[0]), (batches, layers), (layers, rows)
    return tuple(x.new_empty(size, dtype=torch.float64) for size in sizes)


def cka_batches(x: Tensor, y: Tensor | None, tile: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Where there is no kernel for it: of the Gram matrices of each batch of `tile` rows, less their near mean,
    times the power of two of their layer (`factors`, None: 1), and without the diagonals, the inner products
    ``[batches, L, L2]`` of x with y (None: with itself), of each with itself
    ``[batches, L (+ L2)]``, and the sums of their rows ``[L (+ L2), N]``; float64.
    """
    sides = [x] if y is None else [x, y]
    layers = [len(side) for side in sides]
    factors = [1.0] * len(sides) if factors is None else factors[:, None, None].split(layers)
    products = [(Products(), Products()) for _ in sides]
    found, room = [], []
    for part in parts(x.shape[1], tile):
        n = part.stop - part.start
        even = n + n % 2  # a row of zeros adds nothing
        if not room or room[0].shape[1] != even:
            room = [side.new_zeros((len(side), even, side.shape[2]), dtype=torch.float32) for side in sides]
        for side, out, factor in zip(sides, room, factors, strict=True):
            near_mean(side[:, part].float(), out[:, :n]).mul_(factor)
        cross, own, sums = without_diagonal(room, products)
        found.append((cross, torch.cat(own), torch.cat(sums)[:, :n]))
    cross, own, sums = zip(*found, strict=True)
    return torch.stack(cross), torch.stack(own), torch.cat(sums, 1)


torch.library.impl("inflection_fast::cka_batches", "CompositeExplicitAutograd", cka_batches)
