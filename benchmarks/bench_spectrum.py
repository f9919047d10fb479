"""Singular values of one weight matrix of a large model: from its smaller Gram matrix in float64, and by LAPACK.

One round without a warm-up, because LAPACK takes more than a minute: `python -m pytest benchmarks/bench_spectrum.py`.
"""

import numpy as np
import torch
from cases import race

from inflection_fast.ops import singular_values

SHAPE = (4096, 14336)  # of an 8B model
TRUE_ROWS = 512  # whose singular values LAPACK finds in float64, as the truth, in seconds


def bench_singular_values(benchmark):
    weight = torch.randn(SHAPE)
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = singular_values(weight)

    def lapack() -> None:
        found["lapack"] = torch.linalg.svdvals(weight).numpy()

    def errors(_: dict[str, float]) -> dict[str, float]:
        rows = weight[:TRUE_ROWS].contiguous()
        truth = torch.linalg.svdvals(rows.double()).numpy()
        error = np.abs(singular_values(rows) / truth - 1)
        between = np.abs(found["ours"] / found["lapack"] - 1)
        return {
            "relative error of the largest, 512 rows": float(error[0]),
            "relative error of the smallest, 512 rows": float(error[-1]),
            "relative difference of the largest": float(between[0]),
            "relative difference of the smallest": float(between[-1]),
        }

    race(
        benchmark,
        "singular values, fp32, 4096 x 14336",
        {"ours": ours, "torch.linalg.svdvals": lapack},
        goals={"torch.linalg.svdvals": 1 / 1.2},
        extra=errors,
        rounds=1,
        warmup=0,
    )
