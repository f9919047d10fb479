"""Linear CKA: how alike two sets of features of the same samples are."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import checks, library
from .basis import check_rank, pooled_basis, project
from .gram import MIN_ROWS, layers_of, new_grads, of_terms, scaled

__all__ = ["delta_cka", "linear_cka"]


def linear_cka(x: Tensor, y: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Linear CKA of features of the same N samples, one value per layer.

    Equivalent to: ``K, L = x @ x.mT, y @ y.mT; hsic(K, L) / sqrt(hsic(K, K) * hsic(L, L))`` in float64, with HSIC_1 of
    Song et al. (2012) or, biased, the inner product of the centred K and L; computed from D x D sums, never N x N ones.

    The error is at most 1e-6 at any offset common to the rows, and 1e-4 for features in 16 bits on CUDA (there 2e-5 in
    float32 if one column that has two values outweighs all others; `docs/math.md`). Debiased values of
    unrelated features are near 0 and may be negative; biased ones are near ``D / (N + D + 1)``. Differentiable with
    respect to both, once; the gradient holds one layer at a time in float32. Extra memory: 4 (D + D2)^2 bytes per
    layer, of as many layers as 64 MiB hold (1 GiB on CUDA), and on the CPU 3 (D + D2) KiB of packed rows per thread.

    Args:
        x: ``[..., N, D]``, float32, bfloat16 or float16, any strides. Feature maps ``[N, C, H, W]`` are rows after
            ``x.flatten(1)``: four dimensions give a warning, and an error where the last two are equal.
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


def refuse_feature_maps(x: Tensor, name: str) -> None:
    """Refuse features of four dimensions whose last two are equal, as those of images are, and name others.

    ``[N, C, H, W]`` would be read as N C layers of H samples: a number for each of them, and none of these is a CKA of
    the N images. Layers in two leading dimensions, of as many samples as features, are rare and easy to flatten.
    """
    if x.ndim != 4:
        return
    shape, ways = list(x.shape), "feature maps [N, C, H, W] are rows by x.flatten(1), layers in two dimensions one by"
    if shape[-1] == shape[-2]:
        raise ValueError(f"{name}: expected features [..., N, D], got {shape}; {ways} x.flatten(0, 1)")
    if not torch.compiler.is_compiling():
        taken = f"{shape[0]} x {shape[1]} layers of {shape[2]} samples with {shape[3]} features"
        warnings.warn(f"{name}: {shape} is read as {taken}; {ways} x.flatten(0, 1)", stacklevel=5)


def check_rows(x, y, rank, debiased, names) -> None:
    checks.paired_features(x, y, names)
    refuse_feature_maps(x, names[0])
    checks.flag(debiased, "debiased")
    if x.shape[-2] < MIN_ROWS[debiased]:
        kind = "debiased" if debiased else "biased"
        raise ValueError(f"{names[0]}: {kind} CKA needs at least {MIN_ROWS[debiased]} rows, got {x.shape[-2]}")
    if rank is not None:
        check_rank(rank, x.shape[-1], y.shape[-1])


@torch.library.register_fake("inflection_fast::cka_terms")
def _(x, y, debiased):
    return x.new_empty((*x.shape[:-2], 3), dtype=torch.float64)


@torch.library.register_fake("inflection_fast::cka_terms_backward")
def _(grad, x, y, debiased):
    return new_grads(x, y)


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


def backward(ctx, grad):
    return *torch.ops.inflection_fast.cka_terms_backward(grad, *ctx.saved_tensors, ctx.debiased), None


def setup_context(ctx, inputs, output):
    x, y, ctx.debiased = inputs
    ctx.save_for_backward(x, y)


torch.library.register_autograd("inflection_fast::cka_terms", backward, setup_context=setup_context)
library.refuse_second_derivative("inflection_fast::cka_terms_backward")
