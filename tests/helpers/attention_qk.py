"""Queries, keys and masks for the operators from Q and K, and how far they may be from the float64 truth."""

import pytest
import torch

from inflection_fast import attention_entropy_qk, attention_stats_qk
from inflection_fast.ops import reference

INF = float("inf")


MASKS = {
    "padding": lambda B, H, Q, K: (torch.arange(K) < torch.tensor([K, K // 2])[:B, None])[:, None, None],
    "bool": lambda B, H, Q, K: torch.rand(B, 1, Q, K) > 0.5,
    "added": lambda B, H, Q, K: torch.randn(H, Q, K).masked_fill(torch.rand(H, Q, K) > 0.7, -INF),
    "added, transposed": lambda B, H, Q, K: torch.randn(B, H, K, Q).mT,
    "half, lowest": lambda B, H, Q, K: torch.zeros(Q, K).masked_fill(torch.rand(Q, K) > 0.5, -65504.0).half(),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def pair(B, H, Hkv, Q, K, D, *, sharp=1.5, dtype=torch.float32):
    """Views as a model makes them, [B, H, Q, D] of [B, Q, H, D], with one key that stands out."""
    query = (torch.randn(B, Q, H, D) * sharp).to(dtype).transpose(1, 2)
    key = (torch.randn(B, K, Hkv, D) * sharp).to(dtype).transpose(1, 2)
    if K:
        key[:, :, K // 2] *= 2
    return query, key


def widened(options):
    """The same options for the reference in float64: masked stays masked when a 16-bit mask is widened."""
    options = {name: value.double() if name == "sinks" else value for name, value in options.items()}
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        lowest = torch.finfo(mask.dtype).min / 2
        options["attn_mask"] = mask.double().masked_fill(mask <= lowest, -INF)
    return options


def worst(actual, truth):
    assert torch.equal(actual.isnan(), truth.isnan())
    same = (actual == truth) | truth.isnan()
    return (actual.double() - truth).masked_fill(same, 0.0).abs().max().item() if same.numel() else 0.0


def check(query, key, **options):
    """Ours may err twice as much as the reference in float32 on the same inputs, plus 1e-5; `keys` not at all."""
    truth = reference.attention_stats_qk(query.double(), key.double(), **widened(options))
    eager = reference.attention_stats_qk(query.float(), key.float(), **options)
    actual = attention_stats_qk(query, key, **options)
    assert torch.equal(actual.entropy.nan_to_num(7.0), attention_entropy_qk(query, key, **options).nan_to_num(7.0))
    for name, ours, theirs, exact in zip(actual._fields, actual, eager, truth, strict=True):
        allowed = 0.0 if name == "keys" else 2 * worst(theirs, exact) + 1e-5
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert worst(ours, exact) <= allowed, f"{name}: {worst(ours, exact):.2e} > {allowed:.2e}"
    return actual


def integers(dtype, offset):
    """Scores that are small integers and an offset that all have in common: exact in every dtype."""
    query, key = (torch.randint(-2, 3, (1, 2, length, 9)).to(dtype) for length in (30, 150))
    query[..., 8] = key[..., 8] = offset**0.5
    return query, key


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
