"""Entropy and row statistics from logits against what one would write today and against one read of the logits."""

import pytest
import torch
from cases import extra_bytes, race

from inflection_fast import attention_entropy, attention_stats

SHAPE = (8, 12, 512, 512)


def eager(x):
    log_p = x.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def bench_entropy_from_logits(benchmark):
    x, compiled = torch.randn(SHAPE) * 3, torch.compile(eager)
    rows = x[..., 0].numel()
    race(
        benchmark,
        "entropy from logits, fp32, B8 H12 T512",
        {
            "ours": lambda: attention_entropy(x),
            "eager": lambda: eager(x),
            "torch.compile": lambda: compiled(x),
            "x.sum()": lambda: x.sum(),
        },
        goals={"eager": 20, "torch.compile": 2, "x.sum()": 1 / 1.8},
        extra={"bytes per row": extra_bytes(lambda: attention_entropy(x)) / rows},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def bench_entropy_from_16_bit_logits(benchmark, dtype):
    x, compiled = (torch.randn(SHAPE) * 3).to(dtype), torch.compile(lambda x: eager(x.float()))
    race(
        benchmark,
        f"entropy from logits, {str(dtype).removeprefix('torch.')}, B8 H12 T512",
        {
            "ours": lambda: attention_entropy(x),
            "eager": lambda: eager(x.float()),
            "torch.compile": lambda: compiled(x),
            "x.sum()": lambda: x.sum(),
        },
    )


def bench_entropy_of_masked_logits(benchmark):
    x, mask = torch.randn(SHAPE) * 3, torch.rand(8, 1, 512, 512) > 0.2
    race(
        benchmark,
        "entropy from logits, fp32, boolean mask, B8 H12 T512",
        {"ours": lambda: attention_entropy(x, attn_mask=mask), "eager": lambda: eager(x.masked_fill(~mask, -1e30))},
    )


def bench_entropy_of_causal_logits(benchmark):
    x, future = torch.randn(SHAPE) * 3, torch.ones(512, 512, dtype=torch.bool).triu(1)
    race(
        benchmark,
        "entropy from logits, fp32, causal, B8 H12 T512",
        {"ours": lambda: attention_entropy(x, is_causal=True), "eager": lambda: eager(x.masked_fill(future, -1e30))},
    )


def bench_all_statistics_from_logits(benchmark):
    x = torch.randn(SHAPE) * 3

    def six():
        p = x.softmax(-1)
        return eager(x), x.logsumexp(-1), x.amax(-1), (x > -torch.inf).sum(-1), p.square().sum(-1), p[..., 0]

    race(
        benchmark,
        "six statistics from logits, fp32, B8 H12 T512",
        {"ours": lambda: attention_stats(x), "eager": six, "x.sum()": lambda: x.sum()},
    )


def bench_gradient_of_entropy(benchmark):
    x = (torch.randn(SHAPE) * 3).requires_grad_()
    compiled = torch.compile(eager)

    def step(function):
        return torch.autograd.grad(function(x).sum(), x)

    race(
        benchmark,
        "entropy and its gradient from logits, fp32, B8 H12 T512",
        {
            "ours": lambda: step(attention_entropy),
            "eager": lambda: step(eager),
            "torch.compile": lambda: step(compiled),
        },
        rounds=7,
    )
