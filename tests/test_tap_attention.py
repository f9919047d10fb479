"""Sums of attention rows behind a flag, against float64."""

import pytest
import torch

from inflection_fast import ops
from inflection_fast.measure.attention import rows_of
from inflection_fast.measure.schedule import RowSampler
from inflection_fast.ops.tap_attention import ATTENTION_SUMS, tap_attention
from inflection_fast.quantities.attention import Attention

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

B, H, HKV, T, D = 3, 4, 2, 37, 8
BETWEEN = slice(1, None)  # everything but the number of calls


def slots_of(heads=H + 1, slots=2):
    return torch.zeros(slots, len(ATTENTION_SUMS), heads, dtype=torch.float64)


def flag(up=True):
    return torch.full((1,), int(up), dtype=torch.int32)


def inputs(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    query, key = torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2), torch.randn(B, HKV, T, D, dtype=dtype)
    tokens = torch.arange(T) < torch.tensor([[T], [T - 9], [1]])
    return 3 * query, key, tokens


def truth(query, key, tokens, rows, weights, is_causal):
    """[5, H]: rows, entropy, collision, sink, largest logit in float64."""
    scores = query.double() @ key.double().repeat_interleave(H // HKV, 1).mT * D**-0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    p = scores.softmax(-1)
    counts = tokens[:, None, :].expand(B, H, T)
    by_row = [
        torch.ones(B, H, T), -torch.special.xlogy(p, p).sum(-1), p.square().sum(-1), p[..., 0]
    ]  # fmt: skip
    sums = [(value * counts)[..., rows].double().sum(0) @ weights for value in by_row]
    largest = scores.amax(-1).masked_fill(~counts, -torch.inf)[..., rows].amax((0, 2))
    return torch.stack([*sums, largest])


@pytest.mark.parametrize("sampled", [False, True], ids=["all rows", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_are_those_of_float64(dtype, is_causal, sampled):
    query, key, tokens = inputs(dtype)
    sampler = RowSampler(10 if sampled else None, 0, torch.device("cpu"))
    sampler.begin(3)
    draws = sampler.uniform() if sampled else None
    sampler.begin(3)
    strata = sampler.draw(T)
    rows = torch.arange(T) if strata.rows is None else strata.rows
    slots = slots_of()
    tap_attention(query, key, slots, 1, flag=flag(), draws=draws, tokens=tokens, is_causal=is_causal)
    expected = truth(query, key, tokens, rows, strata.weights, is_causal)
    assert expected[1].min() > 1 and expected[0].min() < B * T  # heads that look around, and rows that are padding
    torch.testing.assert_close(slots[1, [1, 2, 3, 4, 8], :H], expected, rtol=1e-4, atol=1e-5)
    assert (slots[1, 0, :H] == 1).all() and not slots[0].any() and not slots[1, :, H:].any()


@pytest.mark.parametrize("rows", [2, 10, T])
def test_sums_are_those_that_the_quantity_makes_of_the_operator(rows):
    query, key, tokens = inputs()
    sampler = RowSampler(rows, 5, torch.device("cpu"))
    sampler.begin(0)
    draws = sampler.uniform()
    sampler.begin(0)
    strata = sampler.draw(T)
    stats = ops.attention_stats_qk(query, key, is_causal=True, rows=strata.rows)
    valid = tokens if strata.rows is None else tokens[:, strata.rows]
    quantity = Attention()
    sums = {name: torch.zeros(1, H, dtype=torch.float64) for name in ("rows", "entropy")}
    sums |= {"parts": torch.zeros(1, 5, H), "max_logit": torch.full((1, H), -torch.inf)}
    quantity.on_attention(sums, rows_of((0,), torch.tensor([0]), slice(0, H), [stats], valid, strata))
    slots = slots_of(heads=H, slots=1)
    tap_attention(query, key, slots, 0, flag=flag(), draws=draws, tokens=tokens, is_causal=True)
    expected = torch.cat([sums["rows"], sums["entropy"], sums["parts"][0].double(), sums["max_logit"].double()])
    torch.testing.assert_close(slots[0, BETWEEN], expected, rtol=1e-6, atol=1e-6)


def test_a_flag_that_is_down_leaves_everything():
    query, key, tokens = inputs()
    for draws in (None, torch.rand(10, dtype=torch.float64)):
        slots = slots_of()
        tap_attention(query * torch.nan, key, slots, 0, flag=flag(False), draws=draws, tokens=tokens)
        assert not slots.any()


def test_a_second_call_replaces_and_counts():
    query, key, _ = inputs()
    once, twice = slots_of(), slots_of()
    tap_attention(query, key, once, 0, flag=flag())
    for scale in (9.0, None):
        tap_attention(query, key, twice, 0, flag=flag(), scale=scale)
    assert torch.equal(once[0, BETWEEN], twice[0, BETWEEN]) and (twice[0, 0, :H] == 2).all()


def test_padding_may_hold_nan_and_nan_of_a_token_is_seen():
    query, key, tokens = inputs()
    query[2, 1, 5] = torch.nan  # padding
    slots = slots_of()
    tap_attention(query, key, slots, 0, flag=flag(), tokens=tokens)
    assert slots.isfinite().all()
    query[0, 1, 5] = torch.nan
    tap_attention(query, key, slots, 0, flag=flag(), tokens=tokens)
    broken = slots[0, :, :H].isnan().any(0)
    assert broken.tolist() == [False, True, False, False] and slots[0, ATTENTION_SUMS.index("max_logit"), 1].isnan()


def test_a_row_without_keys_does_not_count():
    query, key, _ = inputs()
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[4] = False
    slots = slots_of()
    tap_attention(query, key, slots, 0, flag=flag(), attn_mask=mask)
    assert (slots[0, ATTENTION_SUMS.index("rows"), :H] == B * (T - 1)).all()


def test_what_does_not_fit_is_named():
    query, key, tokens = inputs()
    with pytest.raises(ValueError, match="flag: is on meta"):
        tap_attention(query, key, slots_of(), 0, flag=flag().to("meta"))
    with pytest.raises(RuntimeError, match="room for 2 heads"):
        tap_attention(query, key, slots_of(heads=2), 0, flag=flag())
    with pytest.raises(RuntimeError, match=r"slot: 2 is outside \[0, 2\)"):
        tap_attention(query, key, slots_of(), 2, flag=flag())
    with pytest.raises(RuntimeError, match="tokens: expected bool"):
        tap_attention(query, key, slots_of(), 0, flag=flag(), tokens=tokens[:, 1:])


def test_opcheck():
    query, key, tokens = inputs()
    arguments = (None, True, 0.3, -1, -1, 0.0, None, tokens, torch.rand(5, dtype=torch.float64), flag(), slots_of(), 0)
    torch.library.opcheck(torch.ops.inflection_fast.tap_attention.default, (query, key, *arguments))
