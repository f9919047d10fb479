"""What every key receives, from Q, K and the log-sum-exp of the rows, against eager PyTorch."""

import torch
from cases import extra_bytes, race

from inflection_fast import attention_column_mass, attention_stats_qk

SHAPE = (2, 16, 1024, 64)


def eager(query, key):
    p = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return p.sum(-2), p.square().sum(-2)


def bench_column_mass(benchmark):
    query, key = torch.randn(SHAPE), torch.randn(SHAPE)
    compiled, lse = torch.compile(eager), attention_stats_qk(query, key).lse
    race(
        benchmark,
        "column mass from Q, K and lse, fp32, B2 H16 T1024 D64",
        {
            "ours": lambda: attention_column_mass(query, key, lse),
            "eager": lambda: eager(query, key),
            "torch.compile": lambda: compiled(query, key),
            "lse itself": lambda: attention_stats_qk(query, key),
        },
        extra={"bytes per key": extra_bytes(lambda: attention_column_mass(query, key, lse)) / key[..., 0].numel()},
    )
