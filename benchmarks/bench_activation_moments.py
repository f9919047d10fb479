"""Moments of a block's output and its way from the input, against what one would write today and against one read."""

import pytest
import torch
from cases import race

from inflection_fast import activation_moments

SHAPE = (8, 512, 768)


def eager(y, x):
    """The same numbers in float32, which holds no norms above 1e19; massive activations by the median of each row."""
    norm_x, size = x.norm(dim=-1), y.abs()
    massive = (size > 100) & (size >= 1000 * size.median(-1, keepdim=True).values)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    powers = [y.pow(k).sum() for k in (1, 2, 3, 4)]
    return *powers, size.amax(), massive.sum(), ((y - x).norm(dim=-1) / norm_x).sum(), cosine.sum(), x.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_activation_moments(benchmark, dtype):
    x = torch.randn(SHAPE).to(dtype)
    y = (x + torch.randn(SHAPE) * 0.3).to(dtype)
    compiled = torch.compile(eager)
    race(
        benchmark,
        f"moments of a block's output, its input beside it, {str(dtype).removeprefix('torch.')}, B8 T512 D768",
        {
            "ours": lambda: activation_moments(y, x),
            "eager": lambda: eager(y.float(), x.float()),
            "torch.compile": lambda: compiled(y.float(), x.float()),
            "y.sum(), x.sum()": lambda: (y.sum(), x.sum()),
        },
    )
