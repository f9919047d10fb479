"""attention_entropy and attention_stats, from logits, against float64 truth on the same inputs."""

import math

import pytest
import torch
from truth import FIELDS, INF, logits_stats, worst, zhai_lower_bound

from inflection_fast import AttentionStats, attention_entropy, attention_stats

ENTROPY_NATS = 2e-6  # the accuracy promised from float32 scores
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 64, 64), (3, 4097), (2, 1, 3, 8192), (1, 1, 17, 255), (4, 33, 31)]
TEMPERS = {"flat": 1e-3, "typical": 3.0, "nearly one-hot": 60.0}


def tempered(shape, temper, dtype=torch.float32):
    x = torch.randn(shape) * TEMPERS[temper]
    if shape[-1] > 4:
        x.view(-1, shape[-1])[::2, shape[-1] // 2] += 12.0 if temper == "typical" else 0.0
    return x.to(dtype)


def assert_stats(got, truth, logits_exact=True):
    bound = {
        "entropy": ENTROPY_NATS,
        "lse": 2e-6 + truth["lse"][torch.isfinite(truth["lse"])].abs().amax().item() * 2**-23
        if torch.isfinite(truth["lse"]).any()
        else 0.0,
        "max_logit": 0.0 if logits_exact else 1e-6,
        "keys": 0.0,
        "collision": 2e-6,
        "sink": 2e-6,
    }
    for name in FIELDS:
        value = getattr(got, name)
        assert value.dtype == torch.float32, name
        assert worst(value, truth[name]) <= bound[name], f"{name}: {worst(value, truth[name]):.2e} > {bound[name]:.2e}"


@pytest.mark.parametrize("temper", TEMPERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_equal_the_truth(dtype, shape, temper):
    x = tempered(shape, temper, dtype)
    truth = logits_stats(x)
    assert_stats(attention_stats(x), truth)
    assert worst(attention_entropy(x), truth["entropy"]) <= ENTROPY_NATS


def test_the_three_tempers_span_what_they_claim():
    spread = {t: logits_stats(tempered((64, 64), t))["entropy"] / math.log(64) for t in TEMPERS}
    assert spread["flat"].min() > 0.999
    assert spread["typical"].min() < 0.1 < 0.3 < spread["typical"].max()
    assert spread["nearly one-hot"].median() < 0.02


@pytest.mark.parametrize("keys", [2, 100, 8192])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_entropy_keeps_its_accuracy_at_any_logit_scale(size, keys):
    base = torch.randn(16, keys)
    around = base + size  # a large common offset: nothing of it may be left in the entropy
    rivals = torch.full((16, keys), -size)
    rivals[:, : keys // 2] = size - torch.rand(16, keys // 2)
    for x in (base * size, around, rivals):
        assert worst(attention_entropy(x), logits_stats(x)["entropy"]) <= ENTROPY_NATS


def test_peaked_rows_keep_a_digit_down_to_the_smallest_entropies():
    x = torch.zeros(30, 64)
    x[:, 5] = torch.linspace(2, 31, 30)
    truth = logits_stats(x)["entropy"]
    assert truth.min() < 1e-10
    assert ((attention_entropy(x).double() - truth).abs() / truth).max() < 0.1


@pytest.mark.parametrize("masking", ["bool", "additive", "half additive", "finfo.min", "causal", "causal and bool"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (2, 3, 5, 9), (1, 2, 65, 65), (2, 1, 4, 300)], ids=str)
def test_stats_equal_the_truth_under_a_mask(shape, masking):
    x = tempered(shape, "typical")
    keep = torch.rand(shape) < 0.6
    keep[..., 0, :] = False
    options = {"is_causal": "causal" in masking}
    if "bool" in masking:
        options["attn_mask"] = keep
    elif masking == "additive":
        options["attn_mask"] = (torch.randn(shape) * 2).masked_fill(~keep, -INF)
    elif masking == "half additive":
        options["attn_mask"] = torch.zeros(shape, dtype=torch.bfloat16).masked_fill(~keep, -INF)
    elif masking == "finfo.min":
        options["attn_mask"] = torch.zeros(shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    truth = logits_stats(x, **options)
    if masking != "causal":
        assert (truth["keys"] == 0).any()
    assert_stats(attention_stats(x, **options), truth, logits_exact=masking != "additive")
    assert worst(attention_entropy(x, **options), truth["entropy"]) <= ENTROPY_NATS


@pytest.mark.parametrize("mask_shape", [(5, 9), (1, 9), (5, 1), (2, 1, 1, 9), (1, 3, 5, 9), (2, 1, 5, 9)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_masks_broadcast(mask_shape, additive):
    x = tempered((2, 3, 5, 9), "typical")
    keep = torch.rand(mask_shape) < 0.7
    mask = torch.zeros(mask_shape).masked_fill(~keep, -INF) if additive else keep
    assert_stats(attention_stats(x, attn_mask=mask), logits_stats(x, attn_mask=mask))
    expanded = mask.expand(2, 3, 5, 9)  # stride 0: the form in which Transformers hands masks over
    assert_stats(attention_stats(x, attn_mask=expanded), logits_stats(x, attn_mask=mask))


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 5), (5, 1), (129, 40)], ids=str)
def test_causal_is_top_left_when_queries_and_keys_differ(shape):
    got = attention_stats(torch.randn(1, 1, *shape), is_causal=True)
    expected = torch.arange(1, shape[0] + 1).clamp(max=shape[1]).float()
    assert torch.equal(got.keys[0, 0], expected)
    assert got.entropy[0, 0, 0].abs() <= ENTROPY_NATS


def test_scale_multiplies_the_logits_before_the_mask():
    x, bias = tempered((2, 3, 5, 33), "typical"), torch.randn(5, 33)
    for scale in (0.125, 2.0, -1.0):
        truth = logits_stats(x, scale=scale, attn_mask=bias)
        assert worst(attention_entropy(x, scale=scale, attn_mask=bias), truth["entropy"]) <= 5e-6
        assert worst(attention_stats(x, scale=scale, attn_mask=bias).max_logit, truth["max_logit"]) <= 1e-5


def test_a_row_without_any_key_is_zero_and_has_no_keys():
    x = torch.randn(2, 4, 6)
    keep = torch.ones(2, 4, 6, dtype=torch.bool)
    keep[0, 1], keep[1, 3] = False, False
    for mask in (keep, torch.zeros(2, 4, 6).masked_fill(~keep, -INF)):
        got = attention_stats(x, attn_mask=mask)
        for row in ((0, 1), (1, 3)):
            assert got.entropy[row] == 0 and got.keys[row] == 0 and got.lse[row] == -INF
        assert torch.equal(got.entropy == 0, got.keys == 0)


def test_logits_of_minus_infinity_are_keys_of_no_probability():
    x = torch.randn(3, 8)
    hidden = x.clone()
    hidden[:, 2::3], hidden[2] = -INF, -INF
    got, truth = attention_stats(hidden), logits_stats(hidden)
    for name in ("entropy", "lse", "collision", "sink"):
        assert worst(getattr(got, name), truth[name]) <= ENTROPY_NATS, name
    assert got.entropy[2] == 0 and got.lse[2] == -INF


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("keys", [5, 16, 1025])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_plus_infinity_poison_their_row_only(dtype, keys, poison):
    for column in (0, keys // 2, keys - 1):
        x = torch.randn(4, keys).to(dtype)
        x[2, column] = poison
        got = attention_stats(x)
        for value in (attention_entropy(x), got.entropy, got.lse, got.collision):
            if value is got.lse and poison == INF:
                continue  # an lse of +inf is as honest as NaN
            assert value.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 7), (2, 3, 0)], ids=str)
def test_empty_logits_give_empty_or_keyless_rows(shape):
    got = attention_stats(torch.empty(shape))
    for name in FIELDS:
        assert getattr(got, name).shape == shape[:-1]
    assert not got.entropy.any() and not got.keys.any()
    assert (got.lse == -INF).all()


@pytest.mark.parametrize(
    "view", ["transposed", "every other column", "every other row", "flipped by stride", "expanded"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_any_stride_give_the_same_numbers(dtype, view):
    base = tempered((3, 40, 34), "typical", dtype)
    x = {
        "transposed": base.transpose(-1, -2),
        "every other column": base[..., 1::2],
        "every other row": base[:, ::3, :],
        "flipped by stride": base.permute(1, 0, 2),
        "expanded": base[:, :1, :].expand(3, 40, 34),
    }[view]
    assert not x.is_contiguous()
    truth = logits_stats(x)
    assert_stats(attention_stats(x), truth)
    assert torch.allclose(attention_entropy(x), attention_entropy(x.contiguous()), rtol=0, atol=ENTROPY_NATS)


def test_a_constant_changes_nothing_but_lse_and_max():
    x = (torch.randn(5, 77) * 4).mul(64).round().div(64)
    near, far = attention_stats(x), attention_stats(x + 1024.0)
    for name in ("entropy", "collision", "sink", "keys"):
        assert torch.equal(getattr(near, name), getattr(far, name)), name
    assert torch.allclose(far.lse - 1024.0, near.lse, atol=2e-4)


def test_the_order_of_keys_does_not_matter():
    x = tempered((6, 515), "typical")
    shuffled = x[:, torch.randperm(515)]
    assert torch.allclose(attention_entropy(x), attention_entropy(shuffled), rtol=0, atol=ENTROPY_NATS)


def test_every_key_twice_adds_log_two():
    x = tempered((6, 300), "typical")
    twice = attention_entropy(torch.cat([x, x], -1))
    assert torch.allclose(twice, attention_entropy(x) + math.log(2), rtol=0, atol=2 * ENTROPY_NATS)


@pytest.mark.parametrize("temper", TEMPERS)
def test_the_numbers_stay_in_their_ranges(temper):
    got = attention_stats(tempered((4, 64, 97), temper), is_causal=True)
    assert (got.entropy >= 0).all() and (got.entropy <= got.keys.log() + ENTROPY_NATS).all()
    assert (got.collision <= 1 + 1e-6).all() and (got.collision >= 1 / got.keys - 1e-6).all()
    assert (got.lse >= got.max_logit).all()
    assert (got.sink >= 0).all() and (got.sink <= 1 + 1e-6).all()
    assert (-got.collision.log() <= got.entropy + 1e-5).all()  # Renyi-2 is never above Shannon


def test_sharper_logits_have_less_entropy():
    x = torch.randn(50, 64)
    entropies = torch.stack([attention_entropy(x * sharp) for sharp in (0.1, 0.5, 1.0, 2.0, 8.0, 64.0)])
    assert (entropies.diff(dim=0) < 1e-6).all()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0, 20.0])
def test_zhai_bound_holds_and_is_attained(sigma):
    T = 33
    rows = torch.randn(200, T)
    rows = rows / rows.norm(dim=-1, keepdim=True) * sigma
    bound = zhai_lower_bound(sigma, T)
    assert attention_entropy(rows).min().item() >= bound - ENTROPY_NATS
    peak = torch.full((1, T), -sigma / math.sqrt(T * (T - 1)))
    peak[0, 3] = sigma * math.sqrt((T - 1) / T)
    assert attention_entropy(peak).item() == pytest.approx(bound, abs=5e-6)


def test_stats_are_named_and_ordered():
    got = attention_stats(torch.randn(2, 3, 4))
    assert isinstance(got, AttentionStats)
    assert tuple(getattr(got, "_fields", FIELDS)) == FIELDS
    assert all(getattr(got, name).shape == (2, 3) for name in FIELDS)


def test_the_same_input_gives_the_same_bits_at_any_number_of_threads():
    x, threads = tempered((8, 64, 300), "typical"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attention_entropy(x)
        torch.set_num_threads(2)
        assert torch.equal(alone, attention_entropy(x))
    finally:
        torch.set_num_threads(threads)
