"""The sums of CKA: packed Gram matrices over features, and tiles of Gram matrices over rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

MIN_ROWS = {True: 4, False: 2}  # by `debiased`: HSIC_1 divides by n - 3, and one row has no variance
HEAD = 3  # rows of the Gram matrix before those of the features: 1, |u|^2, |v|^2
SHIFT_ROWS = 256  # number of first rows whose mean is the shift, as kCkaDepth in csrc/kernels.h
# Length of a float32 sum of products. Roundings of equal products do not average: 2^15 of them erred by 4e-5.
RUN = 1 << 9


def cka_ratio(cross: Tensor, self_x: Tensor, self_y: Tensor) -> Tensor:
    """CKA from the cross term and the self terms; NaN unless both self terms are above 0."""
    return torch.where((self_x > 0) & (self_y > 0), cross / (self_x.sqrt() * self_y.sqrt()), torch.nan)


def cka_from_terms(terms: Tensor) -> Tensor:
    """CKA from the cross term and both self terms, ``[..., 3]``."""
    return cka_ratio(*terms.unbind(-1))


# ---- rows ----


def layer_indices(x: Tensor) -> product:
    """Indices of the layers of ``[..., N, D]``."""
    return product(*map(range, x.shape[:-2]))


def centred(x: Tensor) -> Tensor:
    """Rows ``[N, D]`` less their mean, float32. Subtracted in two steps, so that a large offset costs no digits."""
    u = x.float() - x[:SHIFT_ROWS].mean(0, dtype=torch.float64).float()
    return u.sub_(u.mean(0))


def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows ``[N, D]`` divided by a power of two, so that float32 holds their products; and that power."""
    u = centred(x)
    power = power_of_two(max_abs(u))
    return u.mul_(power.reciprocal()), power.double()


def max_abs(x: Tensor) -> Tensor:
    """Largest magnitude, float32 []. On a CPU `vector_norm` takes ten times as long, and `abs` makes a copy."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def power_of_two(size: Tensor) -> Tensor:
    """A power of two near each size, float32, with a float32 reciprocal; 1 for sizes from 2^-10 to 2^16."""
    power = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp(-126, 126))
    usual = (size == 0) | ~size.isfinite() | ((size >= 2**-10) & (size <= 2**16))
    return torch.where(usual, 1.0, power)


def scale_factors(features: Tensor) -> Tensor:
    """Powers of two, float32 ``[L]``, that bring fourth powers of a layer's rows into the range of float32.

    CKA does not depend on the scale.
    """
    return power_of_two(torch.stack([max_abs(layer) for layer in features])).reciprocal()


def empty_grads(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous tensors of the shapes of x and y."""
    return x.new_empty(x.shape), y.new_empty(y.shape)


# ---- over features: upper triangles of sums over rows ----


def packed_size(k: int) -> int:
    """Number of elements of the upper triangle, as cka_packed of csrc/kernels.h."""
    return k * (k + 1) // 2


def unpack(triangle: Tensor, k: int) -> Tensor:
    """The symmetric matrix ``[k, k]`` from its upper triangle, stored row by row."""
    full = triangle.new_zeros(k, k)
    rows, cols = torch.triu_indices(k, k, device=triangle.device)
    full[rows, cols] = triangle
    full[cols, rows] = triangle
    return full


def shifted_triangle(triangle: Tensor, move: Tensor, dim: int) -> Tensor:
    """The Gram matrix of rows z = (1, p, q, u, v), u of width `dim`, after ``move = (e, f)`` is added to (u, v).

    The new rows ``(1, p + 2 e.u + |e|^2, q + 2 f.v + |f|^2, u + e, v + f)`` are linear in z, so their Gram matrix
    follows exactly from the old one.
    """
    k = HEAD + len(move)
    u, v = slice(HEAD, HEAD + dim), slice(HEAD + dim, k)
    e, f = move[:dim], move[dim:]

    def transformed(rows: Tensor) -> Tensor:
        out = rows.clone()
        out[1] += 2 * (e @ rows[u]) + (e @ e) * rows[0]
        out[2] += 2 * (f @ rows[v]) + (f @ f) * rows[0]
        out[HEAD:] += torch.outer(move, rows[0])
        return out

    full = transformed(transformed(unpack(triangle, k)).mT)
    rows, cols = torch.triu_indices(k, k, device=full.device)
    return full[rows, cols]


def pooled_scatter(scatter_x: Tensor, scatter_y: Tensor, difference: Tensor, n: Tensor | int) -> Tensor:
    """Scatter of the n rows of both sides together, from the scatter of each and the difference of their means."""
    return scatter_x + scatter_y + torch.outer(difference, difference * (n / 2))


def check_buffer(value: Tensor, name: str, dtype: torch.dtype, shape: list[int]) -> None:
    """Refuse a tensor that cannot serve as the memory of a state."""
    if value.dtype != dtype or list(value.shape) != shape:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {kind} {shape}, got {value.dtype} {list(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that does not require a gradient")


@dataclass(frozen=True)
class Grams:
    """The Gram matrix of the rows ``(1, |u|^2, |v|^2, u, v)`` of each layer.

    Attributes:
        packed: float64 ``[layers, K (K + 1) / 2]``, upper triangles, stored row by row.
        widths: widths of u and of v.
        shift: float64 ``[layers, sum(widths)]``, subtracted from the features.
    """

    packed: Tensor
    widths: tuple[int, int]
    shift: Tensor

    def scatters(self, layer: int, mean_term: bool = True) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The centred scatters xy, xx and yy; and the pooled scatter, with `mean_term` including the means' difference.

        Sides of different widths have no pooled scatter; then that of x is returned.
        """
        dim = self.widths[0]
        full = unpack(self.packed[layer], HEAD + sum(self.widths))
        n, sums = full[0, 0], full[0, HEAD:]
        scatter = full[HEAD:, HEAD:] - torch.outer(sums, sums / n)
        blocks = scatter[:dim, dim:], scatter[:dim, :dim], scatter[dim:, dim:]
        if dim != self.widths[1]:
            return blocks, blocks[1]
        means = self.shift[layer] + sums / n
        return blocks, pooled_scatter(*blocks[1:], (means[:dim] - means[dim:]) * mean_term, n)

    def pooled_scatters(self, mean_term: bool = True) -> Tensor:
        """The pooled scatter of both sides, ``[layers, D, D]``."""
        return torch.stack([self.scatters(layer, mean_term)[1] for layer in range(len(self.packed))])

    def terms(self, debiased: bool, bases: Tensor | None = None) -> Tensor:
        """Cross term and self terms, float64 ``[layers, 3]``, in the full space or in the bases ``[layers, D, k]``."""
        if bases is None:
            return torch.ops.inflection_fast.cka_gram_terms(self.packed, *self.widths, debiased)
        rows = []
        for layer, basis in enumerate(bases):
            blocks = self.scatters(layer)[0]
            rows.append(torch.stack([(basis.mT @ block @ basis).square().sum() for block in blocks]))
        return torch.stack(rows)

    def without(self, part: Tensor) -> Grams:
        """The Gram matrices without the rows of `part`, which is packed too."""
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


# ---- over rows: tiles of Gram matrices without their diagonals ----


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` elements that cover ``range(count)``; the last one may be shorter."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


class GramBuffer:
    """Computes Gram matrices in one reused buffer: page faults of new memory would cost a third of a product."""

    def __init__(self):
        self._memory: Tensor | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b.mT`` of ``[L, m, D]`` and ``[L, n, D]``. Valid until the next call."""
        shape = (a.shape[0], a.shape[1], b.shape[1])
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # freed before the larger one is allocated
            self._memory = a.new_empty(size)
        return torch.bmm(a, b.mT, out=self._memory[:size].view(shape))


def pop_diagonal(gram: Tensor) -> Tensor:
    """The diagonal of ``[L, n, n]`` as float64; sets it to 0 in place."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    taken = diagonal.double()
    diagonal.zero_()
    return taken


def inner_products(grams: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Inner products ``[L, L2]`` of the matrices of one model, or of two, and the squared norm of each; float64."""
    sides = [gram.flatten(1) for gram in grams]
    runs = sides[0].shape[1] // RUN * RUN
    pieces = [[side[:, :runs].unflatten(1, (-1, RUN)).transpose(0, 1) for side in sides]] if runs else []
    pieces += [[side[None, :, runs:] for side in sides]]  # the rest, shorter than a run
    cross = sum((piece[0] @ piece[-1].mT).sum(0, dtype=torch.float64) for piece in pieces)
    if len(sides) == 1:
        return cross, [cross.diagonal()]
    return cross, [sum(piece[i].square().sum(2).sum(0, dtype=torch.float64) for piece in pieces) for i in (0, 1)]
