"""Rank of attention matrices against their singular values in float64."""

import pytest
import torch

from inflection_fast.ops import attention_rank, reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def probabilities(query, key, valid=None, sinks=None, **options):
    names = ("attn_mask", "is_causal", "scale", "window", "softcap")
    arguments = [options.get(name) for name in names]
    scores, attend = reference.qk_scores(query.double(), key.double(), *arguments, None, None)
    scores = scores.masked_fill(~attend, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    p = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return p if valid is None else p * valid[:, None, :, None]


def truth(p, share=0.9):
    squares = torch.linalg.svdvals(p).square()
    total = squares.sum(-1)
    k = (squares.cumsum(-1) < share * total[..., None]).sum(-1).double() + 1
    return k, total / squares[..., 0], p.square().sum(-2).amax(-1) / total


def pair(B, H, Hkv, T, D, sharp=1.0, dtype=torch.float32):
    query = torch.randn(B, H, T, D) * sharp
    key = torch.randn(B, Hkv, T, D) * sharp + torch.randn(B, Hkv, 1, D) * sharp
    return query.to(dtype), key.to(dtype)


def check(query, key, tolerance=1e-4, **options):
    ours = attention_rank(query, key, **options)
    k, stable, mass = truth(probabilities(query, key, **options))
    assert torch.equal(ours.k, k), (ours.k, k)
    torch.testing.assert_close(ours.stable, stable, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.column_mass, mass, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.captured, torch.ones_like(k), rtol=1e-6, atol=0)
    return ours


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sharp", [0.2, 0.6, 1.5])
def test_ranks_equal_those_of_the_svd_at_512_tokens(causal, sharp):
    ours = check(*pair(1, 2, 1, 512, 32, sharp), is_causal=causal)
    assert (ours.k < 20).all() if sharp == 0.2 else (ours.k > 2).all()


B, T = 2, 61
OPTIONS = {
    "padding": {"attn_mask": (torch.arange(T) < torch.tensor([[40], [61]]))[:, None, None]},
    "a mask per head": {"attn_mask": torch.rand(B, 4, T, T) > 0.4},
    "one mask for all": {"attn_mask": torch.rand(T, T) > 0.3, "is_causal": True},
    "bias": {"attn_mask": torch.randn(1, 4, T, T).masked_fill(torch.rand(T, T) > 0.8, torch.finfo(torch.float32).min)},
    "window": {"window": (7, 3)},
    "causal window": {"window": (9, -1), "is_causal": True},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "sinks": {"sinks": torch.tensor([0.0, 3.0, -2.0, 8.0])},
    "rows of padding": {"valid": torch.arange(T) < torch.tensor([[40], [61]]), "is_causal": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks_bounds_and_sinks(options):
    check(*pair(B, 4, 2, T, 8), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(dtype):
    check(*pair(1, 2, 2, 90, 16, dtype=dtype), tolerance=1e-3)


def test_strips_change_nothing(monkeypatch):
    query, key = pair(1, 2, 2, 130, 16)
    whole = attention_rank(query, key, is_causal=True)
    monkeypatch.setattr("inflection_fast.ops.rank.STRIP_BYTES", 4 * 130 * 7)
    for exact_keys in (1024, 0):
        strips = attention_rank(query, key, is_causal=True, exact_keys=exact_keys)
        torch.testing.assert_close(strips.stable, whole.stable, rtol=1e-5, atol=0)
        assert exact_keys == 0 or torch.equal(strips.k, whole.k)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sharp", [0.2, 0.6])
def test_the_krylov_space_finds_the_same_at_512_tokens(causal, sharp):
    query, key = pair(1, 2, 1, 512, 32, sharp)
    ours = attention_rank(query, key, is_causal=causal, exact_keys=0)
    k, stable, mass = truth(probabilities(query, key, is_causal=causal))
    assert torch.equal(ours.k, k) and (ours.captured > 0.9).all()
    torch.testing.assert_close(ours.stable, stable, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.column_mass, mass, rtol=1e-4, atol=0)


def test_a_rank_beyond_the_krylov_space_is_unknown_and_not_too_small():
    query = torch.randn(1, 1, 301, 64)
    query = query / query.norm(dim=-1, keepdim=True) * 200  # each attends to itself alone: the identity, rank 301
    assert check(query, query).k == 271  # the first above 0.9 * 301, clear of rounding
    # A flat spectrum is the hardest one: the space that A^T A spans from a block is that block and rounding.
    ours = attention_rank(query, query, exact_keys=0, block=16, steps=2)
    assert ours.k.isnan().all() and ours.captured.item() == pytest.approx(48 / 301, rel=1e-3)
    torch.testing.assert_close(ours.stable, torch.full((1, 1), 301.0).double(), rtol=1e-2, atol=0)


def test_uniform_attention_and_a_pure_sink_both_have_rank_one_and_are_told_apart():
    query, key = torch.ones(1, 2, 64, 8), torch.zeros(1, 2, 64, 8)
    key[0, 1, 5] = 40.0
    ours = check(query, key)
    assert (ours.k == 1).all()
    torch.testing.assert_close(ours.column_mass, torch.tensor([[1 / 64, 1.0]]).double())


def test_memory_grows_with_the_length_and_not_with_its_square():
    query, key = pair(1, 1, 1, 4096, 8, 0.2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention_rank(query, key, block=4, steps=1)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 4096 * 4096 * 4  # a strip is 8 MiB and a few live at a time; A alone is 64 MiB


def test_a_poisoned_head_leaves_the_others():
    query, key = pair(1, 2, 2, 40, 8)
    clean = attention_rank(query, key)
    query[0, 1, 3] = float("nan")
    for exact_keys in (1024, 0):
        ours = attention_rank(query, key, exact_keys=exact_keys, block=20, steps=1)
        assert ours.k[0, 1].isnan() and ours.stable[0, 1].isnan() and ours.column_mass[0, 1].isnan()
        assert ours.k[0, 0] == clean.k[0, 0]


def test_a_head_without_keys_has_no_rank():
    query, key = pair(1, 1, 1, 20, 8)
    ours = attention_rank(query, key, attn_mask=torch.zeros(20, 20, dtype=torch.bool))
    assert all(field.isnan().all() for field in ours)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
BAD = {
    "key: 3 heads": (ValueError, {"key": torch.zeros(2, 3, 7, 8)}),
    "share: expected a number above 0": (ValueError, {"share": 1.0}),
    "block: expected at least 1": (ValueError, {"block": 0}),
    "valid: expected shape": (ValueError, {"valid": torch.ones(2, 4, dtype=torch.bool)}),
    "is_causal: expected a bool": (TypeError, {"is_causal": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_name_of_the_argument(message):
    error, options = BAD[message]
    with pytest.raises(error, match=message):
        attention_rank(**{"query": Q, "key": K} | options)
