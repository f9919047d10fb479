"""attention_entropy_qk and attention_stats_qk against float64 truth: masks, windows, softcap, sinks, rows, groups."""

import math

import pytest
import torch
from truth import FIELDS, INF, qk_stats, worst, zhai_lower_bound

from inflection_fast import attention_entropy_qk, attention_stats, attention_stats_qk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 1e-5  # beside twice the error of the same formula in float32
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 3, 3, 5, 7, 16),
    (1, 4, 2, 64, 64, 64),
    (2, 6, 1, 33, 130, 24),
    (1, 2, 2, 3, 1030, 80),
    (1, 2, 2, 200, 37, 128),
]
SHARP = {"flat": 0.05, "typical": 1.5, "nearly one-hot": 6.0}


def pair(B, H, Hkv, Tq, Tk, D, *, sharp=1.5, dtype=torch.float32):
    q, k = torch.randn(B, H, Tq, D) * sharp, torch.randn(B, Hkv, Tk, D) * sharp
    k[:, :, Tk // 2] *= 2.0
    return q.to(dtype), k.to(dtype)


def assert_within_budget(q, k, fields=FIELDS, **options):
    truth, eager = qk_stats(q, k, **options), qk_stats(q, k, dtype=torch.float32, **options)
    got = attention_stats_qk(q, k, **options)
    values = {name: getattr(got, name) for name in fields}
    values_alone = attention_entropy_qk(q, k, **options)
    for name, value in [*values.items(), ("entropy", values_alone)]:
        assert value.dtype == torch.float32, name
        allowed = 0.0 if name == "keys" else 2 * worst(eager[name], truth[name]) + FLOOR
        assert worst(value, truth[name]) <= allowed, f"{name}: {worst(value, truth[name]):.2e} > {allowed:.2e}"
    return got


@pytest.mark.parametrize("temper", SHARP)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_from_q_and_k_equal_the_truth(dtype, shape, temper):
    assert_within_budget(*pair(*shape, sharp=SHARP[temper], dtype=dtype))


def test_the_three_tempers_span_what_they_claim():
    spread = {t: qk_stats(*pair(1, 4, 4, 64, 64, 64, sharp=s))["entropy"] / math.log(64) for t, s in SHARP.items()}
    assert spread["flat"].min() > 0.99
    assert spread["typical"].min() < 0.6
    assert spread["nearly one-hot"].median() < 0.05


@pytest.mark.parametrize("shape", [(2, 3, 3, 5, 7, 16), (1, 4, 2, 130, 70, 32), (2, 2, 1, 40, 200, 24)], ids=str)
@pytest.mark.parametrize("window", [None, (0, 0), (3, 0), (2, 5), (0, 1000), (64, 64)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_and_window_equal_the_truth(is_causal, window, shape):
    got = assert_within_budget(*pair(*shape), is_causal=is_causal, window=window)
    if is_causal and window is None:
        assert torch.equal(got.keys[0, 0], torch.arange(1, shape[3] + 1).clamp(max=shape[4]).float())


@pytest.mark.parametrize("kind", ["bool", "additive", "finfo.min", "padding"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_equal_the_truth(dtype, is_causal, kind):
    q, k = pair(2, 4, 2, 37, 70, 16, dtype=dtype)
    keep = torch.rand(2, 1, 37, 70) < 0.5
    keep[:, :, 5] = False
    if kind == "padding":
        keep = (torch.arange(70) < torch.tensor([[3], [70]]))[:, None, None, :]
    mask = keep
    if kind == "additive":
        mask = torch.randn(2, 1, 37, 70).masked_fill(~keep, -INF)
    elif kind == "finfo.min":
        mask = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    got = assert_within_budget(q, k, attn_mask=mask, is_causal=is_causal)
    if kind != "padding":
        assert not got.entropy[:, :, 5].any() and not got.keys[:, :, 5].any() and (got.lse[:, :, 5] == -INF).all()


@pytest.mark.parametrize("mask_shape", [(5, 9), (1, 9), (5, 1), (2, 1, 1, 9), (1, 4, 5, 9), (2, 4, 5, 9)], ids=str)
def test_masks_of_fewer_axes_broadcast(mask_shape):
    q, k = pair(2, 4, 2, 5, 9, 16)
    keep = torch.rand(mask_shape) < 0.7
    assert_within_budget(q, k, attn_mask=keep)
    assert_within_budget(q, k, attn_mask=keep.expand(2, 4, 5, 9))
    assert_within_budget(q, k, attn_mask=torch.zeros(mask_shape).masked_fill(~keep, -INF))


@pytest.mark.parametrize("softcap", [0.5, 20.0, 50.0])
def test_softcap_bends_the_scores_before_the_mask(softcap):
    q, k = pair(1, 2, 2, 20, 33, 16, sharp=4.0)
    bias = torch.randn(20, 33).masked_fill(torch.rand(20, 33) < 0.3, -INF)
    got = assert_within_budget(q, k, softcap=softcap)
    assert (got.max_logit <= softcap * (1 + 1e-6)).all()
    assert_within_budget(q, k, softcap=softcap, attn_mask=bias, is_causal=True)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 5.0}, {"window": (2, 2)}], ids=str)
def test_sinks_take_part_in_the_distribution(options):
    q, k = pair(2, 4, 2, 9, 21, 16)
    sinks = torch.tensor([-3.0, 0.0, 2.5, 30.0])
    fields = ("entropy", "lse", "collision", "sink", "keys")
    got = assert_within_budget(q, k, fields, sinks=sinks, **options)
    bare = attention_stats_qk(q, k, **options)
    assert torch.equal(got.keys, bare.keys)  # the virtual column is no key
    assert torch.allclose(got.sink, (sinks[:, None] - got.lse).exp(), atol=1e-5)


def test_a_row_with_no_key_but_a_sink_has_no_entropy_and_no_keys():
    q, k = pair(1, 2, 2, 4, 6, 8)
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[2] = False
    got = attention_stats_qk(q, k, attn_mask=keep, sinks=torch.zeros(2))
    assert not got.entropy[:, :, 2].any() and not got.keys[:, :, 2].any()


@pytest.mark.parametrize("rows", [[0], [5, 2, 11], [3, 3], list(range(12)), []], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (1, 2)}, {"mask": True}, {"sinks": True}], ids=str
)
def test_rows_pick_query_positions_without_moving_them(options, rows):
    q, k = pair(2, 4, 2, 12, 19, 16)
    given = {name: value for name, value in options.items() if name not in ("mask", "sinks")}
    if "mask" in options:
        given["attn_mask"] = torch.rand(2, 1, 12, 19) < 0.6
    fields = FIELDS
    if "sinks" in options:
        given["sinks"], fields = torch.tensor([0.0, 1.0, -1.0, 2.0]), tuple(f for f in FIELDS if f != "max_logit")
    got = assert_within_budget(q, k, fields, rows=torch.tensor(rows, dtype=torch.long), **given)
    assert got.entropy.shape == (2, 4, len(rows))


def test_grouped_queries_equal_repeated_keys():
    q, k = pair(2, 6, 2, 31, 45, 32)
    grouped, repeated = attention_stats_qk(q, k), attention_stats_qk(q, k.repeat_interleave(3, dim=1))
    for name in FIELDS:
        assert torch.allclose(getattr(grouped, name), getattr(repeated, name), rtol=0, atol=2e-6), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["BTHD", "key transposed", "query sliced", "packed qkv"])
def test_strided_views_give_the_same_numbers(layout, dtype):
    B, H, T, D = 2, 4, 35, 16
    if layout == "BTHD":
        q, k = (torch.randn(B, T, H, D).to(dtype).transpose(1, 2) for _ in range(2))
    elif layout == "key transposed":
        q, k = torch.randn(B, H, T, D).to(dtype), torch.randn(B, H, D, T).to(dtype).transpose(-1, -2)
    elif layout == "query sliced":
        q, k = torch.randn(B, H, T, 2 * D).to(dtype)[..., ::2], torch.randn(B, H, T, D + 3).to(dtype)[..., 3:]
    else:
        q, k, _ = torch.randn(B, T, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    assert not (q.is_contiguous() and k.is_contiguous())
    assert_within_budget(q, k, is_causal=True)


def test_default_scale_is_one_over_root_d_and_scale_is_taken():
    q, k = pair(1, 2, 2, 8, 9, 25)
    assert torch.equal(attention_entropy_qk(q, k), attention_entropy_qk(q, k, scale=0.2))
    assert_within_budget(q, k, scale=0.7)
    assert_within_budget(q, k, scale=-0.3)


def test_q_and_k_agree_with_their_logits():
    q, k = pair(2, 3, 3, 20, 40, 32)
    logits = q @ k.transpose(-1, -2) / math.sqrt(32)
    fused, plain = attention_stats_qk(q, k, is_causal=True), attention_stats(logits, is_causal=True)
    for name in FIELDS:
        assert torch.allclose(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=2e-5), name


@pytest.mark.parametrize("size", [0.02, 0.1, 0.25])
def test_zhai_bound_on_weights_holds(size):
    T, d = 24, 16
    x, w_q, w_k = torch.randn(T, d), torch.randn(d, d) * size, torch.randn(d, d) * size
    sigma = (torch.linalg.matrix_norm(w_k @ w_q.T, 2) * torch.linalg.matrix_norm(x @ x.T, 2)).item()
    entropy = attention_entropy_qk((x @ w_q)[None, None], (x @ w_k)[None, None], scale=1.0)
    assert entropy.min().item() >= zhai_lower_bound(sigma, T) - FLOOR
    assert zhai_lower_bound(sigma, T) > 1.0 or size > 0.05


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_a_poisoned_query_spoils_its_row_only(poison):
    q, k = pair(1, 2, 1, 70, 40, 16)
    q[0, 1, 66, 3] = poison
    for options in ({}, {"is_causal": True}):
        entropy = attention_entropy_qk(q, k, **options)
        assert entropy.isnan().nonzero().tolist() == [[0, 1, 66]]


def test_a_poisoned_key_spoils_the_rows_that_attend_it():
    q, k = pair(1, 2, 2, 50, 50, 16)
    k[0, 0, 30, 2] = math.nan
    assert attention_entropy_qk(q, k)[0].isnan().all(-1).tolist() == [True, False]
    causal = attention_entropy_qk(q, k, is_causal=True)
    assert causal[0, 0].isnan().tolist() == [i >= 30 for i in range(50)]
    assert not causal[0, 1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 4, 8), (1, 2, 2, 0, 4, 8), (1, 2, 2, 3, 0, 8)], ids=str)
def test_empty_queries_or_keys_give_empty_or_keyless_rows(shape):
    B, H, Hkv, Tq, Tk, D = shape
    got = attention_stats_qk(torch.randn(B, H, Tq, D), torch.randn(B, Hkv, Tk, D))
    assert all(getattr(got, name).shape == (B, H, Tq) for name in FIELDS)
    assert not got.entropy.any() and not got.keys.any() and (got.lse == -INF).all()


def test_an_additive_mask_and_its_bool_twin_agree():
    q, k = pair(2, 2, 2, 19, 23, 16)
    keep = torch.rand(2, 1, 19, 23) < 0.5
    zero_or_gone = attention_stats_qk(q, k, attn_mask=torch.zeros(keep.shape).masked_fill(~keep, -INF))
    for name, value in zip(FIELDS, (getattr(attention_stats_qk(q, k, attn_mask=keep), n) for n in FIELDS), strict=True):
        assert torch.allclose(value, getattr(zero_or_gone, name), rtol=0, atol=2e-6), name
