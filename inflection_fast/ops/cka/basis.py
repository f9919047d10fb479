"""The shared PCA basis of one layer before and after a change: computed from sums, and frozen for long streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from .. import checks, library
from .gram import HEAD, SHIFT_ROWS, empty_grads, layer_indices, packed_size, pooled_scatter, scaled_rows, unpack

__all__ = ["CkaBasis"]

PROJECTED_ROWS = 512  # projected at a time by torch: their float32 copy stays in the cache
DEGREE, ROUNDS, OVERSAMPLING = 12, 2, 16  # block method: products with the scatter per round, rounds, extra columns


@dataclass(frozen=True, eq=False)
class CkaBasis:
    """Leading principal directions of the pooled rows of both sides; computed by `CkaState.basis`.

    Attributes:
        vectors: float32 ``[layers, D, k]``, orthonormal columns, in falling order of variance.
        variance_kept: float64 ``[layers]``, share of the variance of the rows that the columns keep.
        residual: float64 ``[layers]``, ``|T V - V diag(e)| / |T|`` (Frobenius norm) with the scatter T of the rows: the
            error of the columns as eigenvectors. About 1e-15 from `eigh`, larger from the block method.
    """

    vectors: Tensor
    variance_kept: Tensor
    residual: Tensor

    def __post_init__(self):
        if checks.tensor(self.vectors, "vectors").dtype != torch.float32 or self.vectors.ndim != 3:
            got = f"{self.vectors.dtype} {list(self.vectors.shape)}"
            raise ValueError(f"vectors: expected float32 [layers, D, k], got {got}")
        if not 1 <= self.rank <= self.dim:
            raise ValueError(f"vectors: expected 1 to {self.dim} columns, got {self.rank}")

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """The width D of the features."""
        return self.vectors.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns k."""
        return self.vectors.shape[2]

    def __repr__(self) -> str:
        return f"CkaBasis({self.layers} layers, rank {self.rank} of {self.dim})"

    def same_as(self, other: CkaBasis | None) -> bool:
        """Whether the columns are bitwise equal."""
        return other is self or (other is not None and torch.equal(self.vectors, other.vectors))


def check_fits(basis: object, layers: int, dim: int, dim_y: int, device: torch.device) -> None:
    """Refuse a basis that is not for this number of layers and these widths."""
    if not isinstance(basis, CkaBasis):
        raise TypeError(f"basis: expected a CkaBasis, got {type(basis).__name__}")
    if dim != dim_y:
        raise ValueError(f"basis: a shared basis needs both sides of the same width, got {dim} and {dim_y}")
    if (basis.layers, basis.dim) != (layers, dim):
        raise ValueError(f"basis: expected one for {layers} layers of {dim}, got {basis.layers} of {basis.dim}")
    if basis.vectors.device != device:
        raise ValueError(f"basis: is on {basis.vectors.device}, but the state is on {device}")


def check_same_on_ranks(basis: CkaBasis | None, group: distributed.ProcessGroup | None, device: torch.device) -> None:
    """ValueError on all ranks if their bases differ: sums in different bases cannot be added. Collective."""
    checksum = torch.zeros((), dtype=torch.float64, device=device)
    if basis is not None:
        vectors = basis.vectors.double().flatten()
        checksum = vectors @ torch.arange(1, len(vectors) + 1, device=device, dtype=torch.float64).sqrt()
    bounds = torch.stack([checksum, -checksum])
    distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX, group=group)
    if bounds[0] != -bounds[1]:
        raise ValueError("basis: the ranks have different ones; broadcast one before the first update")


def check_rank(rank, dim_x, dim_y) -> None:
    checks.integer(rank, "rank", 1, dim_x)
    if dim_x != dim_y:
        raise ValueError(f"rank: a shared basis needs both sides of the same width, got {dim_x} and {dim_y}")


def variance_share(scatters: Tensor, bases: Tensor) -> Tensor:
    """``[layers]``: share of the traces of ``[layers, D, D]`` in the columns of ``[layers, D, k]``."""
    return ((scatters @ bases) * bases).sum((1, 2)) / scatters.diagonal(dim1=1, dim2=2).sum(1)


def pooled_basis(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors ``[..., D, rank]`` of the pooled scatter of both sides, float64.

    The gradient is that of the subspace: first-order perturbation towards the other eigenvectors. Rotations within the
    subspace do not change CKA, so gaps between the leading eigenvalues, which may be 0, do not occur.
    """
    scatter = torch.ops.inflection_fast.cka_scatter(x, y)
    return leading_eigenvectors(scatter, rank, x.requires_grad or y.requires_grad)


def finite_scatter(scatter: Tensor) -> Tensor:
    """0 in place of a matrix with NaN or infinity, which `eigh` refuses. The rows make the CKA of such a layer NaN."""
    return torch.where(scatter.isfinite().all(-1).all(-1)[..., None, None], scatter, 0.0)


def leading_eigenvectors(scatter: Tensor, rank: int, differentiable: bool = False) -> Tensor:
    """Eigenvectors ``[..., D, rank]`` of the largest eigenvalues of ``[..., D, D]``; see `pooled_basis`."""
    scatter = finite_scatter(scatter)
    values, vectors = torch.linalg.eigh(scatter.detach())
    rest, top = vectors[..., :-rank], vectors[..., -rank:]
    if not differentiable:
        return top
    gap = values[..., None, -rank:] - values[..., :-rank, None]
    turn = rest @ ((rest.mT @ scatter @ top) / torch.where(gap > 0, gap, torch.inf))
    return top + (turn - turn.detach())


def project(x: Tensor, basis: Tensor) -> Tensor:
    """Rows in the basis, ``[..., N, rank]`` float32. A shift is subtracted first, so that an offset costs no digits."""
    shift = x[..., :SHIFT_ROWS, :].detach().mean(-2, keepdim=True, dtype=torch.float64).float()
    basis = basis.float()
    layers = [(x[i].float() - shift[i]) @ basis[i] for i in layer_indices(x)]  # copies a layer to float32
    if not layers:
        return x.new_empty((*x.shape[:-1], basis.shape[-1]), dtype=torch.float32)
    return torch.stack(layers).reshape(*x.shape[:-1], basis.shape[-1])


def find_basis(scatters: Tensor, rank: int | None, variance: float | None, start: CkaBasis | None) -> CkaBasis:
    """The leading eigenvectors of ``[layers, D, D]``: `rank` of them, or as many as keep this share of the `variance`.

    `start`: approximate columns of the same rank, from which the block method starts instead of `eigh`.
    """
    scatters = finite_scatter(scatters)
    traces = scatters.diagonal(dim1=-2, dim2=-1).sum(-1)
    if start is not None:
        values, vectors = block_eigh(scatters, start.vectors.double())
    else:
        values, vectors = torch.linalg.eigh(scatters)
        values, vectors = values.flip(-1), vectors.flip(-1)
    if variance is not None:
        shares = values.cumsum(-1) / traces[:, None]
        rank = min(int((shares < variance).sum(-1).max()) + 1, values.shape[-1])
    values, vectors = values[:, :rank], vectors[..., :rank]
    norms = torch.linalg.matrix_norm(scatters)
    residual = torch.linalg.matrix_norm(scatters @ vectors - vectors * values[:, None, :]) / norms
    return CkaBasis(vectors.float().contiguous(), values.sum(-1) / traces, residual)


def block_eigh(scatters: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues ``[layers, k]`` and eigenvectors ``[layers, D, k]`` of ``[layers, D, D]``, improved from
        `start`.

    Chebyshev-filtered subspace iteration (Zhou et al. 2006): the polynomial is small on all eigenvalues below those of
    the block, so a round of DEGREE products replaces hundreds of power iterations. The block has OVERSAMPLING more
    columns than needed, so that its smallest eigenvalue lies below the wanted ones.
    """
    k, dim = start.shape[-1], start.shape[-2]
    extra = torch.randn(dim, OVERSAMPLING, dtype=start.dtype, generator=torch.Generator().manual_seed(0))
    extra = extra.to(start.device).expand(len(start), -1, -1)
    block = torch.linalg.qr(torch.cat([start, scatters @ extra], -1)).Q
    values, block = rayleigh_ritz(scatters, block)
    for _ in range(ROUNDS):
        half = values[:, -1:, None] / 2  # the polynomial damps [0, smallest eigenvalue of the block]
        half = torch.where(half > 0, half, 1.0)
        before, filtered = block, scatters @ block / half - block
        for _ in range(DEGREE - 1):
            before, filtered = filtered, 2 * (scatters @ filtered / half - filtered) - before
        filtered = filtered / torch.linalg.vector_norm(filtered, dim=-2, keepdim=True).clamp(min=1e-300)
        values, block = rayleigh_ritz(scatters, torch.linalg.qr(filtered).Q)
    return values[:, :k], block[..., :k]


def rayleigh_ritz(scatters: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh-Ritz eigenvalues and eigenvectors from a block of orthonormal columns, in falling order."""
    values, turn = torch.linalg.eigh(block.mT @ scatters @ block)
    return values.flip(-1), block @ turn.flip(-1)


class Projection:
    """Projects rows on a frozen basis, and adds up the variance of the rows in the full space.

    ``sums`` is float64 ``[layers, D + D + 2]``: sums of u, v, |u|^2 and |v|^2 with u = x - shift, v = y - shift.
    """

    def __init__(self, basis: CkaBasis, sums: Tensor):
        self.basis, self.sums = basis, sums

    def push(self, x: Tensor, y: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows ``[layers, N, D]`` of both sides in the basis, ``[layers, N, k]`` float32."""
        return torch.ops.inflection_fast.cka_project(self.sums, x, y, shift, self.basis.vectors, mask)

    def rebase(self, move: Tensor, rows: Tensor) -> None:
        """Change the shift by ``-move``, ``[layers, D + D]``: u becomes u + move."""
        dim = self.basis.dim
        for number in (0, 1):
            side = slice(number * dim, (number + 1) * dim)
            e, s = move[:, side], self.sums[:, side]
            self.sums[:, 2 * dim + number] += 2 * (e * s).sum(-1) + rows * e.square().sum(-1)
            s += rows[:, None] * e

    def variance(self, shift: Tensor, rows: Tensor) -> Tensor:
        """Pooled variance of both sides in the full space, ``[layers]``: the trace of the scatter."""
        dim = self.basis.dim
        sums, squares = self.sums[:, : 2 * dim], self.sums[:, 2 * dim :].sum(-1)
        means = shift.double() + sums / rows[:, None]
        difference = means[:, :dim] - means[:, dim:]
        return squares - sums.square().sum(-1) / rows + rows / 2 * difference.square().sum(-1)


@torch.library.register_fake("inflection_fast::cka_project")
def _(sums, x, y, shift, basis, mask):
    shape = (*x.shape[:2], basis.shape[2])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def cka_project(
    sums: Tensor, x: Tensor, y: Tensor, shift: Tensor, basis: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For devices without a kernel: ``(x - c) P`` of both sides; adds to the `sums` of `Projection`."""
    dim = x.shape[2]
    shape = (*x.shape[:2], basis.shape[2])
    out = x.new_empty(shape, dtype=torch.float32), y.new_empty(shape, dtype=torch.float32)
    for number, rows in enumerate((x, y)):
        side = slice(number * dim, (number + 1) * dim)
        for layer in range(rows.shape[0]):
            for first in range(0, rows.shape[1], PROJECTED_ROWS):
                part = slice(first, first + PROJECTED_ROWS)
                u = rows[layer, part].float() - shift[layer, side]  # before the product: an offset costs no digits
                if mask is not None:
                    u = u.masked_fill_(~mask[layer, part, None], 0.0)
                torch.mm(u, basis[layer], out=out[number][layer, part])
                sums[layer, side] += u.sum(0)
                sums[layer, 2 * dim + number] += torch.ops.inflection_fast.sum_of_squares([u], [0], 1)[0]
    return out


torch.library.impl("inflection_fast::cka_project", "CompositeExplicitAutograd", cka_project)


# ---- all rows at once ----


@torch.library.register_fake("inflection_fast::cka_scatter")
def _(x, y):
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)


@torch.library.register_fake("inflection_fast::cka_scatter_backward")
def _(grad, x, y):
    return empty_grads(x, y)


@torch.library.impl("inflection_fast::cka_scatter", "CompositeExplicitAutograd")
def cka_scatter(x: Tensor, y: Tensor) -> Tensor:
    """Centred scatter of the rows of both sides together: see `pooled_scatter`.

    Each side has its own Gram matrix, because a common shift would be far from the mean of one side.
    """
    dim, n = x.shape[-1], x.shape[-2]
    out = x.new_empty((*x.shape[:-2], dim, dim), dtype=torch.float64)
    for i in layer_indices(x):
        scatters, means = [], []
        for side in (x[i][None], y[i][None]):
            gram = x.new_zeros((1, packed_size(HEAD + dim)), dtype=torch.float64)
            shift = x.new_zeros((1, dim), dtype=torch.float32)
            torch.ops.inflection_fast.cka_push(gram, shift, side, side[..., :0], None, True)
            full = unpack(gram[0], HEAD + dim)
            mean = full[0, HEAD:] / n
            scatters.append(full[HEAD:, HEAD:] - torch.outer(full[0, HEAD:], mean))
            means.append(shift[0] + mean)
        out[i] = pooled_scatter(scatters[0], scatters[1], means[0] - means[1], n)
    return out


@torch.library.impl("inflection_fast::cka_scatter_backward", "CompositeExplicitAutograd")
def cka_scatter_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scatter ``sum (w - m) (w - m)^T`` of rows w with mean m: ``(w - m) (g + g^T)``."""
    grad = grad + grad.mT
    out = empty_grads(x, y)
    for i in layer_indices(x):
        rows, power = scaled_rows(torch.cat([x[i], y[i]]))
        rows = rows @ (grad[i] * power).float()
        out[0][i], out[1][i] = rows.chunk(2)
    return out


torch.library.register_autograd(
    "inflection_fast::cka_scatter",
    lambda ctx, grad: torch.ops.inflection_fast.cka_scatter_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
library.refuse_second_derivative("inflection_fast::cka_scatter_backward")
