"""The sums that CKA rests on: Gram matrices over features, packed, and over rows, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

MIN_ROWS = {True: 4, False: 2}  # by `debiased`: HSIC_1 divides by n - 3, and one row has no spread
HEAD = 3  # rows of the Gram matrix in front of the features: 1, |u|^2, |v|^2
SHIFT_ROWS = 256  # as kCkaDepth: so many first rows give the shift
# Products that are summed in float32: equal ones all round the same way, and 1 << 15 of them erred by 4e-5.
RUN = 1 << 9


def of_terms(terms: Tensor) -> Tensor:
    """CKA from ``[..., 3]``: the cross term and both self terms; undefined unless both self terms are above 0."""
    cross, own_x, own_y = terms.unbind(-1)
    return torch.where((own_x > 0) & (own_y > 0), cross / (own_x.sqrt() * own_y.sqrt()), torch.nan)


# ---- rows ----


def layers_of(x: Tensor) -> product:
    """Indices of the layers of ``[..., N, D]``: a view of each, whatever the strides."""
    return product(*map(range, x.shape[:-2]))


def centred(x: Tensor) -> Tensor:
    """Rows ``[N, D]`` less their mean, float32; the first subtraction takes the offset, the second what it left."""
    u = x.float() - x[:SHIFT_ROWS].mean(0, dtype=torch.float64).float()
    return u.sub_(u.mean(0))


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[N, D]``, centred and divided by a power of two so that their products are float32; and that, float64."""
    u = centred(x)
    power = power_of_two(size_of(u))
    return u.mul_(power.reciprocal()), power.double()


def size_of(x: Tensor) -> Tensor:
    """Largest magnitude, float32 []; `vector_norm` takes ten times as long on a CPU, and `abs` a copy."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def power_of_two(size: Tensor) -> Tensor:
    """That near each size, float32, whose reciprocal is one too; 1 of usual sizes, so that they are left alone."""
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp(-126, 126))
    usual = (size == 0) | ~size.isfinite() | ((size >= 2**-10) & (size <= 2**16))
    return torch.where(usual, 1.0, power)


def new_grads(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, whatever the strides of what they are gradients of."""
    return x.new_empty(x.shape), y.new_empty(y.shape)


# ---- over features: the upper triangles of sums over rows ----


def packed(k: int) -> int:
    """Elements of the upper triangle, as cka_packed of csrc/kernels.h."""
    return k * (k + 1) // 2


def unpack(triangle: Tensor, k: int) -> Tensor:
    """The symmetric matrix ``[k, k]`` of its upper triangle row by row."""
    full = triangle.new_zeros(k, k)
    rows, cols = torch.triu_indices(k, k, device=triangle.device)
    full[rows, cols] = triangle
    full[cols, rows] = triangle
    return full


def moved(triangle: Tensor, move: Tensor, dim: int) -> Tensor:
    """The triangle of rows z = (1, p, q, u, v), u of width `dim`, when u and v grow by `move`.

    They become ``(1, p + 2 e.u + |e|^2, q + 2 f.v + |f|^2, u + e, v + f)``, linear in z: their Gram matrix follows from
    the old one exactly, the sums of fourth order included.
    """
    k = HEAD + len(move)
    u, v = slice(HEAD, HEAD + dim), slice(HEAD + dim, k)
    e, f = move[:dim], move[dim:]

    def grown(rows: Tensor) -> Tensor:
        out = rows.clone()
        out[1] += 2 * (e @ rows[u]) + (e @ e) * rows[0]
        out[2] += 2 * (f @ rows[v]) + (f @ f) * rows[0]
        out[HEAD:] += torch.outer(move, rows[0])
        return out

    full = grown(grown(unpack(triangle, k)).mT)
    rows, cols = torch.triu_indices(k, k, device=full.device)
    return full[rows, cols]


def pooled(own_x: Tensor, own_y: Tensor, apart: Tensor, n: Tensor | int) -> Tensor:
    """Scatter of n rows of either side together, from that of each and the difference of their means."""
    return own_x + own_y + torch.outer(apart, apart * (n / 2))


def check_memory(value: Tensor, name: str, dtype: torch.dtype, shape: list[int]) -> None:
    """Refuse what a state cannot write to as it is."""
    if value.dtype != dtype or list(value.shape) != shape:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {kind} {shape}, got {value.dtype} {list(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require a gradient")


@dataclass(frozen=True)
class Grams:
    """The Gram matrix of the rows ``(1, |u|^2, |v|^2, u, v)`` of every layer, and what CKA takes from it.

    Attributes:
        packed: float64 ``[layers, K (K + 1) / 2]``: upper triangles row by row.
        widths: of u and of v.
        shift: float64 ``[layers, sum(widths)]``: what was taken off the features.
    """

    packed: Tensor
    widths: tuple[int, int]
    shift: Tensor

    def scatters(self, layer: int, mean_term: bool = True) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The centred scatters xy, xx and yy, and that of both sides pooled, with the distance of their means or not.

        Sides of two widths have no pooled one: that of x is in its place.
        """
        dim = self.widths[0]
        full = unpack(self.packed[layer], HEAD + sum(self.widths))
        n, sums = full[0, 0], full[0, HEAD:]
        scatter = full[HEAD:, HEAD:] - torch.outer(sums, sums / n)
        own_x, own_y = scatter[:dim, :dim], scatter[dim:, dim:]
        if dim != self.widths[1]:
            return (scatter[:dim, dim:], own_x, own_y), own_x
        means = self.shift[layer] + sums / n
        apart = (means[:dim] - means[dim:]) * mean_term
        return (scatter[:dim, dim:], own_x, own_y), pooled(own_x, own_y, apart, n)

    def pooled_scatters(self, mean_term: bool = True) -> Tensor:
        """The scatter of both sides pooled, ``[layers, D, D]``."""
        return torch.stack([self.scatters(layer, mean_term)[1] for layer in range(len(self.packed))])

    def terms(self, debiased: bool, bases: Tensor | None = None) -> Tensor:
        """float64 ``[layers, 3]``: the cross term and both self terms, in the full space or in ``[layers, D, k]``."""
        if bases is None:
            return torch.ops.inflection_fast.cka_gram_terms(self.packed, *self.widths, debiased)
        rows = []
        for layer, basis in enumerate(bases):
            blocks = self.scatters(layer)[0]
            rows.append(torch.stack([(basis.mT @ block @ basis).square().sum() for block in blocks]))
        return torch.stack(rows)

    def without(self, part: Tensor) -> Grams:
        """Of the rows that are not among those of `part`, packed likewise."""
        return Grams(self.packed - part, self.widths, self.shift)


@torch.library.register_fake("inflection_fast::cka_push")
def _(gram, shift, x, y, mask, adopt):
    return None


@torch.library.register_fake("inflection_fast::cka_adopt")
def _(seen, shift, x, y, mask):
    return None


@torch.library.register_fake("inflection_fast::cka_gram_terms")
def _(gram, dim_x, dim_y, debiased):
    return gram.new_empty((gram.shape[0], 3))


# ---- over rows: tile by tile, without their diagonals ----


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
