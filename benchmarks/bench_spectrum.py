"""Singular values of one weight matrix of a large model: from its smaller Gram matrix in float64, and by LAPACK."""

import torch
from cases import race

from inflection_fast.ops import singular_values

SHAPE = (4096, 14336)  # of an 8B model


def bench_singular_values(benchmark):
    weight = torch.randn(SHAPE)
    truth = torch.linalg.svdvals(weight[:512].double())
    found = torch.from_numpy(singular_values(weight[:512].contiguous()))
    race(
        benchmark,
        "singular values, fp32, 4096 x 14336",
        {"ours": lambda: singular_values(weight), "torch.linalg.svdvals": lambda: torch.linalg.svdvals(weight)},
        goals={"torch.linalg.svdvals": 1 / 1.2},
        extra={"error over the largest": float((found - truth).abs().max() / truth[0])},
        rounds=1,
        warmup=0,
    )
