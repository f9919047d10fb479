"""Debiased linear CKA of twelve layers against loops that compute only the biased value, which is cheaper."""

import torch
from cases import extra_bytes, race

from inflection_fast import CkaState, linear_cka
from inflection_fast.ops import reference

LAYERS, ROWS, DIM, BATCH = 12, 4096, 768, 256


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
