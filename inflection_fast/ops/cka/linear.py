"""Linear CKA of features that are in memory, and its derivative."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import checks, library
from .basis import check_rank, pooled_basis, project
from .gram import MIN_ROWS, cka_from_terms, empty_grads, layer_indices, scaled_rows

__all__ = ["delta_cka", "linear_cka"]


def linear_cka(x: Tensor, y: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Linear CKA of features of the same N samples, one value per layer.

    Equivalent to: ``K, L = x @ x.mT, y @ y.mT; hsic(K, L) / sqrt(hsic(K, K) * hsic(L, L))`` in float64. `hsic` is
    HSIC_1 of Song et al. (2012) or, biased, the inner product of the centred K and L. Computed from D x D sums; no N x
    N matrix is formed.

    The error is at most 1e-6 at any offset common to the rows. On CUDA it is at most 1e-4 for 16-bit features, and at
    most 2e-5 for float32 if one column with two values outweighs all others (`docs/math.md`). Debiased values of
    unrelated features are near 0 and may be negative; biased ones are near ``D / (N + D + 1)``. Differentiable once,
    with respect to both; the backward pass copies one layer at a time to float32. Additional memory: 4 (D + D2)^2 bytes
    per layer, for as many layers as fit into 64 MiB (CUDA: 1 GiB), and on the CPU 3 (D + D2) KiB per thread.

    Args:
        x: ``[..., N, D]``, float32, bfloat16 or float16, any strides. Flatten feature maps ``[N, C, H, W]`` first,
            ``x.flatten(1)``: four dimensions give a warning, or an error if the last two are equal.
        y: ``[..., N, D2]``, dtype and device of `x`; D2 may differ from D if `rank` is None.
        rank: k, 1 to D: compare in the leading k principal directions of the pooled rows of both sides. Only for one
            layer before and after a change, because it is not invariant to a rotation of one side. Needs a second pass
            over the rows, 16 D^2 + 8 N k bytes per layer, and a float32 copy of one layer. None: full space.
        debiased: whether to remove the bias of a small number of samples; needs N >= 4.

    Returns:
        float32 ``[...]``. NaN if a side is constant, if its self term is not above 0, or if a feature is NaN or
        infinite; other layers are not affected.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape, a device, `rank` or the number of rows does not fit.
    """
    return cka_in_float64(x, y, rank, debiased, ("x", "y")).float()


def delta_cka(before: Tensor, after: Tensor, *, rank: int | None = None, debiased: bool = True) -> Tensor:
    """Distance of features before and after a change: 0 if they are equal up to rotation, scale and offset.

    Equivalent to: ``1 - linear_cka(before, after, rank=rank, debiased=debiased)``, subtracted in float64.

    Arguments and errors as for `linear_cka`; both sides have the same width.
    """
    checks.paired_features(before, after, ("before", "after"))
    if before.shape[-1] != after.shape[-1]:
        raise ValueError(f"after: expected {before.shape[-1]} features as before has, got {after.shape[-1]}")
    return (1 - cka_in_float64(before, after, rank, debiased, ("before", "after"))).float()


def cka_in_float64(x, y, rank, debiased, names) -> Tensor:
    check_rows(x, y, rank, debiased, names)
    checks.no_tangent("linear_cka", x, y)
    if rank is not None:
        basis = pooled_basis(x, y, rank)
        x, y = project(x, basis), project(y, basis)
    return cka_from_terms(torch.ops.inflection_fast.cka_terms(x, y, debiased))


def refuse_feature_maps(x: Tensor, name: str) -> None:
    """Refuse features of four dimensions whose last two are equal, as those of images; warn about other ones.

    Feature maps ``[N, C, H, W]`` would be read as N C layers of H samples, which is not a CKA of the N images. Two
    leading dimensions of layers, with as many samples as features, are rare and easy to flatten.
    """
    if x.ndim != 4:
        return
    shape = list(x.shape)
    hint = "flatten feature maps [N, C, H, W] by x.flatten(1), two dimensions of layers by x.flatten(0, 1)"
    if shape[-1] == shape[-2]:
        raise ValueError(f"{name}: expected features [..., N, D], got {shape}; {hint}")
    if not torch.compiler.is_compiling():
        layers = f"{shape[0]} x {shape[1]} layers of {shape[2]} samples with {shape[3]} features"
        warnings.warn(f"{name}: {shape} is read as {layers}; {hint}", stacklevel=5)


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
    return empty_grads(x, y)


@torch.library.impl("inflection_fast::cka_terms_backward", "CompositeExplicitAutograd")
def cka_terms_backward(grad: Tensor, x: Tensor, y: Tensor, debiased: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and y from those of the terms, ``[..., 3]``.

    With centred rows u, v, S = u^T v, p = |u|^2, q = |v|^2, the cross term is ``|S|^2 - a sum(p q) + b sum(p) sum(q)``,
    a = n / (n - 2), b = 1 / ((n - 1) (n - 2)); biased: a = b = 0. Its derivative with respect to u is
    ``2 v S^T + 2 (b sum(q) - a q) u``, centred; a self term is the cross term for v = u. Computed for u / c and v / d
    with powers of two c, d: the cross term of u and v is c^2 d^2 times as large.
    """
    n = x.shape[-2]
    a, b = (n / (n - 2), 1 / ((n - 1) * (n - 2))) if debiased else (0.0, 0.0)
    out = empty_grads(x, y)
    for i in layer_indices(x):
        (u, c), (v, d) = scaled_rows(x[i]), scaled_rows(y[i])
        p, q = u.square().sum(1, keepdim=True), v.square().sum(1, keepdim=True)
        p, q = b * p.sum() - a * p, b * q.sum() - a * q
        s, of_cross, of_x, of_y = u.mT @ v, *grad[i]
        out[0][i] = grad_of_side(u, v, s, p, q, of_x * c**3, of_cross * c * d * d)
        out[1][i] = grad_of_side(v, u, s.mT, q, p, of_y * d**3, of_cross * d * c * c)
    return out


def grad_of_side(u, v, s, weights_u, weights_v, grad_self, grad_cross) -> Tensor:
    grad_self, grad_cross = 4 * grad_self.float(), 2 * grad_cross.float()
    rows = u @ (grad_self * (u.mT @ u)) + v @ (grad_cross * s.mT)
    rows += (grad_self * weights_u + grad_cross * weights_v) * u
    return rows - rows.mean(0)


def backward(ctx, grad):
    return *torch.ops.inflection_fast.cka_terms_backward(grad, *ctx.saved_tensors, ctx.debiased), None


def setup_context(ctx, inputs, output):
    x, y, ctx.debiased = inputs
    ctx.save_for_backward(x, y)


torch.library.register_autograd("inflection_fast::cka_terms", backward, setup_context=setup_context)
library.refuse_second_derivative("inflection_fast::cka_terms_backward")
