"""What a tap of attention costs a block of a graph: measured, and with its flag down."""

import torch
from cases import race

from inflection_fast import attention_stats_qk
from inflection_fast.ops.tap_attention import ATTENTION_SUMS, tap_attention

SHAPE = (8, 12, 64, 32)  # a block of MiniLM on 8 texts


def bench_tap_of_attention(benchmark):
    query, key = torch.randn(SHAPE), torch.randn(SHAPE)
    slots = torch.zeros(1, len(ATTENTION_SUMS), SHAPE[1], dtype=torch.float64)
    up, down = (torch.full((1,), value, dtype=torch.int32) for value in (1, 0))
    race(
        benchmark,
        "tap of attention, fp32, B8 H12 T64 D32",
        {
            "measured": lambda: tap_attention(query, key, slots, 0, flag=up),
            "flag down": lambda: tap_attention(query, key, slots, 0, flag=down),
            "attention_stats_qk": lambda: attention_stats_qk(query, key),
        },
        calls=20,
    )
