"""Linear CKA: how alike two sets of features of the same samples are."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from . import checks, library

__all__ = ["delta_cka", "linear_cka"]

MIN_ROWS = {True: 4, False: 2}  # by `debiased`: HSIC_1 divides by n - 3, and one row has no spread
HEAD = 3  # rows of the Gram matrix in front of the features: 1, |u|^2, |v|^2
SHIFT_ROWS = 256  # as kCkaDepth: so many first rows give the shift


def linear_cka(x: Tensor, y: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Linear CKA of features of the same N samples, one value per layer.

    Equivalent to: ``K, L = x @ x.mT, y @ y.mT; hsic(K, L) / sqrt(hsic(K, K) * hsic(L, L))`` in float64, with HSIC_1 of
    Song et al. (2012) or, biased, the inner product of the centred K and L; computed from D x D sums, never N x N ones.

    The error is at most 1e-6 at any offset common to the rows, and 1e-4 for features in 16 bits. Debiased values of
    unrelated features are near 0 and may be negative; biased ones are near ``D / (N + D + 1)``. Differentiable with
    respect to both, once; the gradient holds one layer at a time in float32. Extra memory: 4 (D + D2)^2 bytes per
    layer, of as many layers as 64 MiB hold (1 GiB on CUDA), and on the CPU 3 (D + D2) KiB of packed rows per thread.

    Args:
        x: ``[..., N, D]``, float32, bfloat16 or float16, any strides.
        y: ``[..., N, D2]``, dtype and device of `x`; D2 may differ from D without `rank`.
        rank: k: compare in the leading k principal directions of the rows of both sides pooled, 1 to D, of the same
            layer before and after a change: not invariant to a rotation of one side. A second pass over the rows; also
            holds 16 D^2 bytes and 8 N k bytes for every layer, and one layer of rows in float32. None: full space.
        debiased: estimate without the bias of few samples; needs N >= 4.

    Returns:
        float32 ``[...]``. NaN where a side is constant or its self term is not above 0, and where a feature is NaN or
        infinite; other layers are not affected.

    Raises:
        TypeError: an argument is not of these types and dtypes.
        ValueError: a shape, a device, `rank` or the number of rows does not fit.
    """
    return ratio(x, y, rank, debiased, ("x", "y")).float()


def delta_cka(before: Tensor, after: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """How far features have moved: 0 for the same up to rotation, scale and offset.

    Equivalent to: ``1 - linear_cka(before, after, rank=rank, debiased=debiased)``, subtracted in float64.

    Arguments and errors as for `linear_cka`; both sides of the same width.
    """
    checks.paired_features(before, after, ("before", "after"))
    if before.shape[-1] != after.shape[-1]:
        raise ValueError(f"after: expected {before.shape[-1]} features as before has, got {after.shape[-1]}")
    return (1 - ratio(before, after, rank, debiased, ("before", "after"))).float()


def ratio(x, y, rank, debiased, names) -> Tensor:
    check_rows(x, y, rank, debiased, names)
    checks.no_tangent("linear_cka", x, y)
    if rank is not None:
        basis = pooled_basis(x, y, rank)
        x, y = project(x, basis), project(y, basis)
    return of_terms(torch.ops.inflection_fast.cka_terms(x, y, debiased))


def check_rows(x, y, rank, debiased, names) -> None:
    checks.paired_features(x, y, names)
    checks.flag(debiased, "debiased")
    if x.shape[-2] < MIN_ROWS[debiased]:
        kind = "debiased" if debiased else "biased"
        raise ValueError(f"{names[0]}: {kind} CKA needs at least {MIN_ROWS[debiased]} rows, got {x.shape[-2]}")
    if rank is not None:
        check_rank(rank, x.shape[-1], y.shape[-1])


def check_rank(rank, dim_x, dim_y) -> None:
    checks.integer(rank, "rank", 1, dim_x)
    if dim_x != dim_y:
        raise ValueError(f"rank: a shared basis needs both sides of the same width, got {dim_x} and {dim_y}")


def of_terms(terms: Tensor) -> Tensor:
    """CKA from ``[..., 3]``: the cross term and both self terms; undefined unless both self terms are above 0."""
    cross, own_x, own_y = terms.unbind(-1)
    return torch.where((own_x > 0) & (own_y > 0), cross / (own_x.sqrt() * own_y.sqrt()), torch.nan)


def pooled_basis(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors ``[..., D, rank]`` of the scatter of the rows of both sides, float64.

    Differentiable as a subspace: to first order, it turns towards the other eigenvectors by their coupling over the
    gap. Turns within the subspace change nothing that is computed from it, so their gaps, which may be 0, do not occur.
    """
    scatter = torch.ops.inflection_fast.cka_scatter(x, y)
    return leading(scatter, rank, x.requires_grad or y.requires_grad)


def leading(scatter: Tensor, rank: int, differentiable: bool = False) -> Tensor:
    finite = scatter.isfinite().all(-1).all(-1)[..., None, None]
    scatter = torch.where(finite, scatter, 0.0)  # the rows themselves make the values of such a layer NaN
    values, vectors = torch.linalg.eigh(scatter.detach())
    rest, top = vectors[..., :-rank], vectors[..., -rank:]
    if not differentiable:
        return top
    gap = values[..., None, -rank:] - values[..., :-rank, None]
    turn = rest @ ((rest.mT @ scatter @ top) / torch.where(gap > 0, gap, torch.inf))
    return top + (turn - turn.detach())


def project(x: Tensor, basis: Tensor) -> Tensor:
    """Rows in the basis, ``[..., N, rank]`` float32, less a shift so that an offset costs no digits."""
    shift = x[..., :SHIFT_ROWS, :].detach().mean(-2, keepdim=True, dtype=torch.float64).float()
    basis = basis.float()
    layers = [(x[i].float() - shift[i]) @ basis[i] for i in layers_of(x)]  # one by one: this copies rows to float32
    if not layers:
        return x.new_empty((*x.shape[:-1], basis.shape[-1]), dtype=torch.float32)
    return torch.stack(layers).reshape(*x.shape[:-1], basis.shape[-1])


def new_grads(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, whatever the strides of what they are gradients of."""
    return x.new_empty(x.shape), y.new_empty(y.shape)


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


@torch.library.register_fake("inflection_fast::cka_terms")
def _(x, y, debiased):
    return x.new_empty((*x.shape[:-2], 3), dtype=torch.float64)


@torch.library.register_fake("inflection_fast::cka_push")
def _(gram, shift, x, y, mask, adopt):
    return None


@torch.library.register_fake("inflection_fast::cka_adopt")
def _(seen, shift, x, y, mask):
    return None


@torch.library.register_fake("inflection_fast::cka_gram_terms")
def _(gram, dim_x, dim_y, debiased):
    return gram.new_empty((gram.shape[0], 3))


@torch.library.register_fake("inflection_fast::cka_scatter")
def _(x, y):
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=torch.float64)


@torch.library.register_fake("inflection_fast::cka_terms_backward")
def _(grad, x, y, debiased):
    return new_grads(x, y)


@torch.library.register_fake("inflection_fast::cka_scatter_backward")
def _(grad, x, y):
    return new_grads(x, y)


@torch.library.impl("inflection_fast::cka_scatter", "CompositeExplicitAutograd")
def cka_scatter(x: Tensor, y: Tensor) -> Tensor:
    """Centred scatter of the rows of both sides together: see `pooled`.

    Each side has a Gram matrix of its own, because one shift would be far from the mean of one of them.
    """
    dim, n = x.shape[-1], x.shape[-2]
    out = x.new_empty((*x.shape[:-2], dim, dim), dtype=torch.float64)
    for i in layers_of(x):
        scatters, means = [], []
        for side in (x[i][None], y[i][None]):
            gram = x.new_zeros((1, packed(HEAD + dim)), dtype=torch.float64)
            shift = x.new_zeros((1, dim), dtype=torch.float32)
            torch.ops.inflection_fast.cka_push(gram, shift, side, side[..., :0], None, True)
            full = unpack(gram[0], HEAD + dim)
            mean = full[0, HEAD:] / n
            scatters.append(full[HEAD:, HEAD:] - torch.outer(full[0, HEAD:], mean))
            means.append(shift[0] + mean)
        out[i] = pooled(*scatters, means[0] - means[1], n)
    return out


def pooled(own_x: Tensor, own_y: Tensor, apart: Tensor, n: Tensor | int) -> Tensor:
    """Scatter of n rows of either side together, from that of each and the difference of their means."""
    return own_x + own_y + torch.outer(apart, apart * (n / 2))


@torch.library.impl("inflection_fast::cka_scatter_backward", "CompositeExplicitAutograd")
def cka_scatter_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scatter of rows w with mean m, ``sum (w - m) (w - m)^T``: ``(w - m) (g + g^T)``."""
    grad = grad + grad.mT
    out = new_grads(x, y)
    for i in layers_of(x):
        rows, power = scaled(torch.cat([x[i], y[i]]))
        rows = rows @ (grad[i] * power).float()
        out[0][i], out[1][i] = rows.chunk(2)
    return out


@torch.library.impl("inflection_fast::cka_terms_backward", "CompositeExplicitAutograd")
def cka_terms_backward(grad: Tensor, x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    """With u, v the centred rows, S = u^T v, p = |u|^2, q = |v|^2: the cross term is
    ``|S|^2 - a sum(p q) + b sum(p) sum(q)``, a = n / (n - 2), b = 1 / ((n - 1) (n - 2)); biased, a = b = 0.
    Its derivative by u is ``2 v S^T + 2 (b sum(q) - a q) u``, then centred; a self term is the cross term at v = u.
    Taken of u / c and v / d, powers of two: the cross term is c^2 d^2 times theirs.
    """  # fmt: skip
    n = x.shape[-2]
    a, b = (n / (n - 2), 1 / ((n - 1) * (n - 2))) if debiased else (0.0, 0.0)
    out = new_grads(x, y)
    for i in layers_of(x):
        (u, c), (v, d) = scaled(x[i]), scaled(y[i])
        weights = [b * r.sum() - a * r for r in (u.square().sum(1, keepdim=True), v.square().sum(1, keepdim=True))]
        cross = u.mT @ v
        for mine, other, to_mine, to_other, own, both, s, result in (
            (u, v, weights[0], weights[1], grad[i][1] * c**3, grad[i][0] * c * d * d, cross, out[0]),
            (v, u, weights[1], weights[0], grad[i][2] * d**3, grad[i][0] * d * c * c, cross.mT, out[1]),
        ):
            own, both = 4 * own.float(), 2 * both.float()
            by = mine @ (own * (mine.mT @ mine)) + other @ (both * s.mT)
            by += (own * to_mine + both * to_other) * mine
            result[i] = by - by.mean(0)
    return out


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


def backward(ctx, grad):
    return *torch.ops.inflection_fast.cka_terms_backward(grad, *ctx.saved_tensors, ctx.debiased), None


def setup_context(ctx, inputs, output):
    x, y, ctx.debiased = inputs
    ctx.save_for_backward(x, y)


torch.library.register_autograd("inflection_fast::cka_terms", backward, setup_context=setup_context)
torch.library.register_autograd(
    "inflection_fast::cka_scatter",
    lambda ctx, grad: torch.ops.inflection_fast.cka_scatter_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
library.refuse_second_derivative("inflection_fast::cka_terms_backward")
library.refuse_second_derivative("inflection_fast::cka_scatter_backward")
