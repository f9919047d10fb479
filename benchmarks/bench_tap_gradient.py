"""What a tap of gradients costs a block of a graph: measured, and with its flag down."""

import torch
from cases import race

from inflection_fast import sum_of_squares
from inflection_fast.ops.tap_gradient import tap_gradient

SHAPE = (8, 64, 384)  # the output of a block of MiniLM on 8 texts


def bench_tap_of_gradients(benchmark):
    gradient, slots = torch.randn(SHAPE), torch.zeros(1, 2, dtype=torch.float64)
    up, down = (torch.full((1,), value, dtype=torch.int32) for value in (1, 0))
    race(
        benchmark,
        "tap of gradients, fp32, [8, 64, 384]",
        {
            "measured": lambda: tap_gradient(gradient, slots, 0, flag=up),
            "flag down": lambda: tap_gradient(gradient, slots, 0, flag=down),
            "sum_of_squares": lambda: sum_of_squares([gradient], [0]),
        },
        calls=20,
    )
