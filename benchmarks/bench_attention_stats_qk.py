"""Entropy and row statistics from Q and K against what one would write today and against fused attention itself."""

import pytest
import torch
from cases import extra_bytes, race
from torch.nn.functional import scaled_dot_product_attention as sdpa

from inflection_fast import attention_entropy_qk, attention_stats_qk

SHAPE = (2, 16, 1024, 64)


def views(batch, heads, length, depth, dtype=torch.float32):
    """Query, key and value as a model hands them over: [B, H, T, D] views of [B, T, H, D]."""
    return [torch.randn(batch, length, heads, depth).to(dtype).transpose(1, 2) for _ in range(3)]


def eager(query, key, mask=None):
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    log_p = (scores if mask is None else scores.masked_fill(mask, -1e30)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def identity(query, key):
    """H = lse - scale q . Attention(q, k, v := k): what fused attention can be made to say, with its log-sum-exp."""
    scale = query.shape[-1] ** -0.5
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, scale=scale)[:2]
    return lse - scale * (query * out).sum(-1)


def bench_entropy_from_q_and_k(benchmark):
    query, key, value = views(*SHAPE)
    compiled = torch.compile(eager)
    with torch.no_grad():
        race(
            benchmark,
            "entropy from Q, K, fp32, B2 H16 T1024 D64",
            {
                "ours": lambda: attention_entropy_qk(query, key),
                "eager": lambda: eager(query, key),
                "torch.compile": lambda: compiled(query, key),
                "SDPA": lambda: sdpa(query, key, value),
                "V := K identity": lambda: identity(query, key),
            },
            goals={"eager": 5, "SDPA": 1 / 0.6},
            extra={"bytes per row": extra_bytes(lambda: attention_entropy_qk(query, key)) / query[..., 0].numel()},
        )


def bench_causal_entropy_from_q_and_k(benchmark):
    query, key, value = views(*SHAPE)
    future = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool).triu(1)
    with torch.no_grad():
        race(
            benchmark,
            "entropy from Q, K, fp32, causal, B2 H16 T1024 D64",
            {
                "ours": lambda: attention_entropy_qk(query, key, is_causal=True),
                "eager": lambda: eager(query, key, future),
                "SDPA": lambda: sdpa(query, key, value, is_causal=True),
            },
            goals={"SDPA": 1 / 0.7},
        )


def bench_all_statistics_of_sampled_rows(benchmark):
    query, key, value = views(*SHAPE)
    rows = torch.arange(0, SHAPE[2], 16)
    with torch.no_grad():
        race(
            benchmark,
            "six statistics of 64 rows from Q, K, fp32, B2 H16 T1024 D64",
            {
                "ours": lambda: attention_stats_qk(query, key, rows=rows),
                "eager, entropy only": lambda: eager(query[:, :, rows], key),
                "SDPA of those rows": lambda: sdpa(query[:, :, rows], key, value),
            },
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def bench_entropy_from_16_bit_q_and_k(benchmark, dtype):
    query, key, value = views(*SHAPE, dtype=dtype)
    with torch.no_grad():
        race(
            benchmark,
            f"entropy from Q, K, {str(dtype).removeprefix('torch.')}, B2 H16 T1024 D64",
            {
                "ours": lambda: attention_entropy_qk(query, key),
                "eager": lambda: eager(query, key),
                "SDPA": lambda: sdpa(query, key, value),
            },
            rounds=7,
        )


def bench_gradient_of_entropy_from_q_and_k(benchmark):
    query, key, _ = (x.requires_grad_() for x in views(*SHAPE))

    def step(function):
        return torch.autograd.grad(function(query, key).sum(), (query, key))

    race(
        benchmark,
        "entropy and its gradient from Q, K, fp32, B2 H16 T1024 D64",
        {"ours": lambda: step(attention_entropy_qk), "eager": lambda: step(eager)},
        rounds=7,
        extra={"bytes of a step": extra_bytes(lambda: step(attention_entropy_qk))},
    )
