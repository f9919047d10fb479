"""Debiased linear CKA of twelve layers against loops that compute only the biased value, which is cheaper.

Layers against layers are raced against pytorch-cka, the fastest of the packages; what the others get wrong, and by how
much, is in docs/cka.md, measured by cka_failures.py.
"""

import pytest
import torch
from cases import extra_bytes, race
from cka_failures import error_table, ours_minibatch
from cka_failures import streamed as ours_streamed
from cka_rivals import BATCH as MINIBATCH
from cka_rivals import rivals

from inflection_fast import CkaState, cka_jackknife, cka_matrix, linear_cka
from inflection_fast.ops import reference

LAYERS, ROWS, DIM, BATCH = 12, 4096, 768, 256
OFFSETS, TEXTS = (0, 1, 30, 100, 1000), (1, 4, 16, 256)  # of the table of errors


def features():
    x = torch.randn(LAYERS, ROWS, DIM)
    return x, x + torch.randn(LAYERS, ROWS, DIM)


def biased_loop(x, y):
    """What one would write today: three products a pair."""
    out = []
    for a, b in zip(x, y, strict=True):
        a, b = a - a.mean(0), b - b.mean(0)
        out.append((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
    return torch.stack(out)


def symmetric_loop(x, y):
    """Our algorithm on torch's BLAS: the upper triangle of the Gram matrix in column blocks, float32."""
    out = []
    for a, b in zip(x, y, strict=True):
        z = torch.cat([a - a[:BATCH].mean(0), b - b[:BATCH].mean(0)], 1)
        out.append([z[:, :end].T @ z[:, end - DIM // 2 : end] for end in range(DIM // 2, 2 * DIM + 1, DIM // 2)])
    return out


def streamed(x, y):
    state = CkaState(LAYERS, DIM)
    for a, b in zip(x.split(BATCH, 1), y.split(BATCH, 1), strict=True):
        state.push(a, b)
    return state.value()


def worst_error(got, x, y, debiased):
    exact = [reference.linear_cka(a.double(), b.double(), debiased=debiased) for a, b in zip(x, y, strict=True)]
    return (got - torch.stack(exact)).abs().max().item()


def bench_debiased_cka(benchmark):
    x, y = features()
    few = slice(0, 2)  # the definition in float64 holds N x N matrices
    race(
        benchmark,
        "debiased CKA, 12 layers, N4096 D768, fp32",
        {
            "ours": lambda: linear_cka(x, y),
            "streamed by 256 rows": lambda: streamed(x, y),
            "biased loop": lambda: biased_loop(x, y),
            "products by BLAS": lambda: symmetric_loop(x, y),
        },
        goals={"biased loop": 1},
        extra={
            "extra MB": extra_bytes(lambda: linear_cka(x, y)) / 1e6,
            "extra MB streamed": extra_bytes(lambda: streamed(x, y)) / 1e6,
            "extra MB of the biased loop": extra_bytes(lambda: biased_loop(x, y)) / 1e6,
            "error": worst_error(linear_cka(x, y)[few], x[few], y[few], True),
            "error at mean 1000": worst_error(
                linear_cka(x[few] + 1000, y[few] + 1000), x[few] + 1000, y[few] + 1000, True
            ),
            "error at mean 1000 of the biased loop": worst_error(
                biased_loop(x[few] + 1000, y[few] + 1000), x[few] + 1000, y[few] + 1000, False
            ),
        },
        rounds=7,
    )


def bench_debiased_cka_streamed(benchmark):
    x, y = features()
    race(
        benchmark,
        "debiased CKA streamed by 256 rows, 12 layers, N4096 D768, fp32",
        {"ours": lambda: streamed(x, y), "biased loop": lambda: biased_loop(x, y)},
        goals={"biased loop": 1},
        rounds=7,
    )


def bench_gradient_of_cka(benchmark):
    x, y = (t[:2].clone().requires_grad_() for t in features())
    race(
        benchmark,
        "debiased CKA and its gradient, 2 layers, N4096 D768, fp32",
        {
            "ours": lambda: torch.autograd.grad(linear_cka(x, y).sum(), [x, y]),
            "biased loop": lambda: torch.autograd.grad(biased_loop(x, y).sum(), [x, y]),
        },
        rounds=5,
    )


def bench_cka_in_a_frozen_basis(benchmark):
    x, y = features()
    fit = CkaState(LAYERS, DIM)
    fit.push(x[:, : 2 * DIM], y[:, : 2 * DIM])
    basis = fit.basis(rank=128)

    def frozen():
        state = CkaState(LAYERS, DIM, basis=basis)
        for a, b in zip(x.split(BATCH, 1), y.split(BATCH, 1), strict=True):
            state.push(a, b)
        return state.value()

    race(
        benchmark,
        "debiased CKA streamed in a frozen basis of rank 128, 12 layers, N4096 D768, fp32",
        {"ours": frozen, "biased loop": lambda: biased_loop(x, y)},
        goals={"biased loop": 6},
        extra={"extra MB": extra_bytes(frozen) / 1e6},
        rounds=7,
    )


def bench_standard_error_of_cka(benchmark):
    x, y = (side[:2] for side in features())
    sequences = torch.arange(ROWS) // 64
    race(
        benchmark,
        "debiased CKA with a jackknife over 64 sequences, 2 layers, N4096 D768, fp32",
        {"ours": lambda: cka_jackknife(x, y, sequences), "value alone": lambda: linear_cka(x, y)},
        extra={"extra MB": extra_bytes(lambda: cka_jackknife(x, y, sequences)) / 1e6},
        rounds=5,
    )


def layers_that_share():
    """Twelve layers of one model, neighbours alike."""
    common = torch.randn(ROWS, 64)
    mixed = [common @ torch.randn(64, DIM) * (0.1 * layer / LAYERS) + torch.randn(ROWS, DIM) for layer in range(LAYERS)]
    return torch.stack(mixed)


def bench_layers_against_layers(benchmark):
    hsic = pytest.importorskip("cka.hsic", reason="pytorch-cka is not installed")
    x = layers_that_share()

    def theirs(rows=x):
        grams = rows @ rows.mT
        cross = hsic.hsic_cross(grams, grams)
        return cross / torch.outer(cross.diagonal(), cross.diagonal()).sqrt()

    few = [0, 5, 11]
    race(
        benchmark,
        "debiased CKA of 12 x 12 layers, N4096 D768, fp32",
        {
            "ours": lambda: cka_matrix(x),
            "pytorch-cka, all rows": theirs,
            "ours, banded": lambda: cka_matrix(x, method="banded"),
        },
        goals={"pytorch-cka, all rows": 2},
        extra={
            "extra MB": extra_bytes(lambda: cka_matrix(x)) / 1e6,
            "extra MB of pytorch-cka": extra_bytes(theirs) / 1e6,
            "error at mean 1000": matrix_error(cka_matrix, x[few] + 1000),
            "error at mean 1000 of pytorch-cka": matrix_error(theirs, x[few] + 1000),
        },
        rounds=5,
    )


def bench_layers_against_layers_by_minibatches(benchmark):
    hsic = pytest.importorskip("cka.hsic", reason="pytorch-cka is not installed")
    x = layers_that_share()

    def theirs(rows=x):
        cross = 0.0
        for batch in rows.split(MINIBATCH, 1):
            grams = batch @ batch.mT
            cross = cross + hsic.hsic_cross(grams, grams)
        return cross / torch.outer(cross.diagonal(), cross.diagonal()).sqrt()

    def ours(rows=x):
        return cka_matrix(rows, method="minibatch", tile=MINIBATCH)

    centred = x - x.mean(1, keepdim=True)
    race(
        benchmark,
        "minibatch CKA of 12 x 12 layers by 256 rows, N4096 D768, fp32",
        {"ours": ours, "pytorch-cka": theirs},
        goals={"pytorch-cka": 1},
        extra={
            "extra MB": extra_bytes(ours) / 1e6,
            "difference on centred rows": (ours() - theirs(centred)).abs().max().item(),
            "change by a mean of 1000": (ours() - ours(x + 1000)).abs().max().item(),
            "change by a mean of 1000 of pytorch-cka": (theirs() - theirs(x + 1000)).nan_to_num(1).abs().max().item(),
        },
        rounds=7,
    )


def bench_packages(benchmark):
    """Two pairs, small enough for the slowest; then how far each is off on rows of mean 0 to 1000 and on texts."""
    x, y = (side[:2, :2048] for side in features())
    others, absent = rivals()
    print(f"\nnot installed, left out: {', '.join(absent)}" if absent else "")
    estimators = {"ours": ours_streamed, "ours, minibatch": ours_minibatch, **others}

    def each_pair(estimate):
        return lambda: [estimate(a, b) for a, b in zip(x, y, strict=True)]

    calls = {name: each_pair(estimate) for name, estimate in estimators.items()}
    race(
        benchmark,
        "CKA of 2 pairs as packages compute it, N2048 D768, fp32",
        calls,
        extra={f"extra MB of {name}": extra_bytes(call) / 1e6 for name, call in calls.items()},
        rounds=3,
    )
    print(error_table(estimators, OFFSETS, TEXTS))


def matrix_error(estimate, x):
    exact = torch.stack([torch.stack([reference.linear_cka(a.double(), b.double()) for b in x]) for a in x])
    return (estimate(x).double() - exact).nan_to_num(1).abs().max().item()
