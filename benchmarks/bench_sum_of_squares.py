"""Sums of squares of a model's gradients by block against torch's fused norms and against one read."""

import torch
from cases import race

from inflection_fast import sum_of_squares

BLOCKS, WIDTH = 6, 384  # MiniLM
SHAPES = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] + [(WIDTH,)] * 9 + [(4 * WIDTH,)]


def bench_sums_of_squares_of_a_model(benchmark):
    tensors = [torch.randn(shape) for _ in range(BLOCKS) for shape in SHAPES]
    groups = [block for block in range(BLOCKS) for _ in SHAPES]
    index = torch.tensor(groups)

    def by_torch():
        norms = torch.stack(torch._foreach_norm(tensors)).double()
        return norms.new_zeros(BLOCKS).index_add_(0, index, norms.square())

    race(
        benchmark,
        "sums of squares of 6 blocks, 96 tensors, 10.6M elements, fp32",
        {
            "ours": lambda: sum_of_squares(tensors, groups),
            "torch._foreach_norm, index_add_": by_torch,
            "sum() of each": lambda: [tensor.sum() for tensor in tensors],
        },
    )
