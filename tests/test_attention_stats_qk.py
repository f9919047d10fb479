"""attention_entropy_qk and attention_stats_qk: against float64, and by invariances that need no reference."""

import math
import os
import resource

import pytest
import torch
from helpers.attention_qk import INF, MASKS, K, Q, check, integers, pair, seeded  # noqa: F401

from inflection_fast import attention_entropy_qk, attention_stats, attention_stats_qk

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERS = {"flat": 0.05, "typical": 1.5, "nearly one-hot": 5.0}
# B, H, Hkv, Q, K, D: smallest; odd; grouped; more than one block of rows and keys; more than one packed chunk of keys
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 5, 7, 3),
    (2, 6, 2, 49, 131, 24),
    (1, 2, 2, 70, 1100, 64),
    (1, 2, 1, 3, 400, 512),
]


@pytest.mark.parametrize("sharp", TEMPERS.values(), ids=TEMPERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_equal_the_truth(isa, dtype, shape, sharp):
    check(*pair(*shape, sharp=sharp, dtype=dtype))


def test_the_tempers_span_what_they_claim():
    entropy = {t: check(*pair(1, 4, 4, 40, 64, 64, sharp=s)).entropy / math.log(64) for t, s in TEMPERS.items()}
    assert entropy["flat"].min() > 0.99
    assert entropy["typical"].min() < 0.6
    assert entropy["nearly one-hot"].median() < 0.05


def assert_probabilities(stats):
    """What holds of every row, whatever its scores are, to the last bit."""
    assert all(x.isfinite().all() for x in stats)
    assert (stats.entropy >= 0).all() and (stats.entropy <= stats.keys.add(1).log() + 1e-5).all()
    for name in ("collision", "sink"):
        assert (getattr(stats, name) >= 0).all() and (getattr(stats, name) <= 1).all()


SCALES = [1e-30, 1e-3, 1e2, 1e4, 1e5, 1e6, 1e8, 1e20, 1e36]


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "sinks": True}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size_give_the_truth_and_probabilities(isa, dtype, scale, options):
    query, key = pair(1, 2, 1, 37, 150, 32, sharp=1.0, dtype=dtype)
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor([scale, -3 * scale])}
    assert_probabilities(check(query, key, scale=scale * 32**-0.5, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_offset_near_the_resolution_of_a_float_changes_nothing(isa, dtype):
    plain, offset = 2.0**6, 2.0**22
    query, key = integers(dtype, plain)
    expected = attention_stats_qk(query, key, scale=1.0)
    query[..., 8] = key[..., 8] = offset**0.5
    actual = check(query, key, scale=1.0)
    for name in ("entropy", "collision", "sink"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(actual.max_logit - offset, expected.max_logit - plain)


@pytest.mark.parametrize("largest", [2.0**126, torch.finfo(torch.float32).max])
def test_the_largest_floats_are_scores(isa, largest):
    query, key = torch.ones(1, 1, 3, 1), torch.full((1, 1, 70, 1), -largest)
    query[0, 0, 2] = -1.0
    key[0, 0, 40] = largest
    stats = attention_stats_qk(query, key, scale=1.0)
    assert_probabilities(stats)
    assert stats.max_logit.tolist() == [[[largest] * 3]] and stats.lse.tolist() == [[[largest] * 3]]
    torch.testing.assert_close(stats.entropy[0, 0], torch.tensor([0.0, 0.0, math.log(69)]))
    assert attention_stats_qk(query, key, scale=1.0, sinks=torch.tensor([-largest])).entropy[0, 0, 0] == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_has_probability_one_and_entropy_zero(isa, dtype, scale):
    query, key = pair(2, 2, 1, 50, 1, 24, sharp=1.0, dtype=dtype)
    stats = attention_stats_qk(query, key, scale=scale)
    assert [x.unique().tolist() for x in (stats.entropy, stats.keys, stats.collision, stats.sink)] == [
        [0],
        [1],
        [1],
        [1],
    ]
    assert torch.equal(stats.lse, stats.max_logit)


@pytest.mark.parametrize("keys", [0, 5])
def test_a_sink_alone_has_probability_one_and_entropy_zero(isa, keys):
    query, key = pair(1, 60, 1, 3, keys, 24)
    sinks = torch.randn(60) * 100
    stats = attention_stats_qk(query, key, sinks=sinks, attn_mask=torch.zeros(3, keys, dtype=torch.bool))
    found = [x.unique().tolist() for x in (stats.entropy, stats.keys, stats.collision, stats.sink)]
    assert found == [[0], [0], [1], [1]]
    torch.testing.assert_close(stats.lse, sinks[:, None].expand_as(stats.lse[0])[None], rtol=2e-7, atol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 4)}, {"window": (None, 0)}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(2, 6, 2, 49, 131, 24), (1, 2, 2, 60, 300, 512)], ids=str)
def test_masks_and_bounds_equal_the_truth(isa, shape, mask, options):
    B, H, _, Q, K, _ = shape
    window = {"window": (-1, 0)} if options.get("window") == (None, 0) else options
    check(*pair(*shape), attn_mask=MASKS[mask](B, H, Q, K), **window)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 3)}], ids=str)
def test_softcap_sinks_and_rows_together_equal_the_truth(isa, options):
    query, key = pair(2, 4, 2, 61, 150, 40, sharp=2.0)
    rows = torch.tensor([60, 0, 0, 13, 59, 12] * 6)
    mask = MASKS["added"](2, 4, 61, 150)
    check(query, key, softcap=4.0, sinks=torch.randn(4) * 3, rows=rows, attn_mask=mask, **options)


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 0, 5, 8), (1, 2, 2, 5, 0, 8), (0, 2, 2, 5, 5, 8), (1, 0, 2, 5, 5, 8)], ids=str
)
def test_empty_tensors_give_empty_or_keyless_rows(shape):
    stats = attention_stats_qk(torch.zeros(*shape[:2], shape[3], 8), torch.zeros(shape[0], shape[2], shape[4], 8))
    assert all(x.shape == (shape[0], shape[1], shape[3]) for x in stats)
    if shape[4] == 0:
        assert [float(x[0, 0, 0]) for x in stats] == [0.0, -INF, -INF, 0.0, 0.0, 0.0]


def test_a_row_without_keys_is_keyless_whatever_hides_them(isa):
    query, key = pair(1, 2, 2, 5, 300, 16)
    hidden = torch.zeros(5, 300, dtype=torch.bool)
    for options in ({"attn_mask": hidden}, {"attn_mask": torch.full((5, 300), torch.finfo(torch.float32).min)}):
        stats = attention_stats_qk(query, key, **options)
        assert [x.unique().tolist() for x in stats] == [[0.0], [-INF], [-INF], [0.0], [0.0], [0.0]]
    with_sink = attention_stats_qk(query, key, attn_mask=hidden, sinks=torch.tensor([0.5, -2.0]))
    assert torch.equal(with_sink.lse[0, :, 0], torch.tensor([0.5, -2.0]))
    assert with_sink.max_logit.unique().tolist() == [-INF]
    assert with_sink.sink.unique().tolist() == [1.0]
    assert with_sink.keys.unique().tolist() == [0.0]


@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
def test_a_poisoned_key_spoils_the_rows_that_attend_it_and_no_other(isa, poison):
    query, key = pair(1, 1, 1, 30, 200, 8)
    query.abs_()
    clean = attention_stats_qk(query, key, is_causal=True)
    key[0, 0, 17] = poison
    stats = attention_stats_qk(query, key, is_causal=True)
    assert torch.equal(stats.keys, clean.keys)
    for field in ("entropy", "lse", "max_logit", "collision", "sink"):
        ours, before = getattr(stats, field)[0, 0], getattr(clean, field)[0, 0]
        assert torch.equal(ours[:17], before[:17])
        assert ours[17:].isnan().all() if poison != -INF else ours[17:].isfinite().all()
    shown = torch.ones(200, dtype=torch.bool)
    shown[17] = False
    for mask in (shown, torch.zeros(200).masked_fill(~shown, -INF)):
        assert all(x.isfinite().all() for x in attention_stats_qk(query, key, attn_mask=mask))


def test_a_poisoned_query_spoils_its_row_only(isa):
    query, key = pair(1, 2, 1, 30, 40, 8)
    clean = attention_stats_qk(query, key)
    query[0, 1, 7, 3] = float("nan")
    stats = attention_stats_qk(query, key)
    for field, ours, before in zip(stats._fields, stats, clean, strict=True):
        expected = before.clone()
        if field != "keys":
            expected[0, 1, 7] = float("nan")
        assert torch.equal(ours.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (200, 50)}], ids=str)
def test_a_row_does_not_depend_on_threads_or_on_the_other_rows(isa, options):
    query, key = pair(1, 4, 2, 600, 700, 128)
    threads = torch.get_num_threads()
    whole = attention_stats_qk(query, key, **options)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for ours, theirs in zip(attention_stats_qk(query, key, **options), whole, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    rows = torch.arange(250, 600, 7)
    for ours, theirs in zip(attention_stats_qk(query, key, rows=rows, **options), whole, strict=True):
        assert torch.equal(ours, theirs[:, :, rows])


def test_tiles_that_are_skipped_change_nothing(isa):
    query, key = pair(2, 2, 1, 100, 700, 32)
    mask = torch.zeros(2, 1, 1, 700, dtype=torch.bool)
    mask[0, ..., 130:140] = mask[1, ..., 640:] = True
    stats = check(query, key, attn_mask=mask)
    assert torch.equal(stats.keys[:, 0, 0], torch.tensor([10.0, 60.0]))
    picked = attention_stats_qk(query[:1], key[:1, :, 130:140])
    torch.testing.assert_close(stats.entropy[0], picked.entropy[0], rtol=0, atol=1e-5)


def test_key_order_and_a_constant_added_to_the_scores_change_nothing(isa):
    query, key = pair(1, 2, 2, 20, 333, 48)
    first = attention_stats_qk(query, key)
    shuffled = attention_stats_qk(query, key[:, :, torch.randperm(333)])
    shifted = attention_stats_qk(query, key, attn_mask=torch.full((1,), 3.0))
    for other, lse in ((shuffled, first.lse), (shifted, first.lse + 3.0)):
        torch.testing.assert_close(other.entropy, first.entropy, rtol=0, atol=5e-6)
        torch.testing.assert_close(other.collision, first.collision, rtol=0, atol=5e-6)
        torch.testing.assert_close(other.lse, lse, rtol=0, atol=5e-6)


def test_groups_equal_repeated_keys_and_fused_equals_from_logits():
    query, key = pair(2, 6, 2, 50, 70, 64)
    grouped = attention_stats_qk(query, key, is_causal=True)
    repeated = attention_stats_qk(query, key.repeat_interleave(3, 1), is_causal=True)
    logits = attention_stats(query @ key.repeat_interleave(3, 1).mT, is_causal=True, scale=64**-0.5)
    for ours, same, unfused in zip(grouped, repeated, logits, strict=True):
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours, unfused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 64, 200])
def test_the_bound_of_zhai_et_al_holds(size):
    x, wq, wk = torch.randn(size, 32), torch.randn(32, 16) / 8, torch.randn(32, 16) / 8
    query, key = (x @ wq)[None, None], (x @ wk)[None, None]
    sigma = (torch.linalg.matrix_norm(wk @ wq.mT, 2) * torch.linalg.matrix_norm(x @ x.mT, 2)).item() / 4
    beta = math.exp(-sigma * math.sqrt(size / (size - 1)))
    bound = math.log1p((size - 1) * beta) + sigma * math.sqrt(size * (size - 1)) * beta / (1 + (size - 1) * beta)
    entropy = attention_entropy_qk(query, key)
    assert entropy.min() >= bound - 1e-5
    assert entropy.max() <= math.log(size) + 1e-5


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="ASan holds back what was freed")
def test_memory_beyond_the_result_does_not_grow_with_the_square_of_the_length():
    query, key = pair(1, 2, 1, 8192, 8192, 8)  # a block of scores per head would be 256 MiB
    attention_entropy_qk(query[:, :, :64], key)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention_entropy_qk(query, key)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 * 1024


def test_rows_outside_are_refused_and_never_read_by_the_operator():
    query, key = pair(1, 2, 2, 5, 7, 8)
    for bad in ([5], [0, -1]):
        with pytest.raises(ValueError, match="rows"):
            attention_stats_qk(query, key, rows=torch.tensor(bad))
    rows = torch.tensor([0, 5, -1, 4])
    options = (None, False, 0.3, -1, -1, 0.0, None, rows, None, False)
    raw = torch.ops.inflection_fast.attention_stats_qk(query, key, *options)
    assert raw[0].isnan()[0, 0].tolist() == [False, True, True, False]


BAD = {
    "query: expected a tensor": (TypeError, ([1.0], K), {}),
    "query: expected dtype": (TypeError, (Q.double(), K), {}),
    "query: expected 4 dimensions": (ValueError, (Q[0], K), {}),
    "key: dtype": (TypeError, (Q, K.half()), {}),
    "key: batch size 1": (ValueError, (Q, K[:1]), {}),
    "key: head dimension 4": (ValueError, (Q, K[..., :4]), {}),
    "key: 3 heads do not divide the 4": (ValueError, (Q, torch.zeros(2, 3, 7, 8)), {}),
    "query: head dimension must be": (ValueError, (torch.zeros(1, 1, 2, 513), torch.zeros(1, 1, 2, 513)), {}),
    "attn_mask: shape": (ValueError, (Q, K), {"attn_mask": torch.zeros(5, 8)}),
    "attn_mask: expected dtype": (TypeError, (Q, K), {"attn_mask": torch.zeros(5, 7).long()}),
    "attn_mask: requires grad": (ValueError, (Q, K), {"attn_mask": torch.zeros(5, 7, requires_grad=True)}),
    "is_causal: expected a bool": (TypeError, (Q, K), {"is_causal": 1}),
    "scale: expected a finite": (ValueError, (Q, K), {"scale": INF}),
    "window: expected a pair": (TypeError, (Q, K), {"window": 3}),
    "window: expected bounds": (ValueError, (Q, K), {"window": (-2, 0)}),
    "softcap: expected a number above 0": (ValueError, (Q, K), {"softcap": 0.0}),
    "sinks: expected one per head": (ValueError, (Q, K), {"sinks": torch.zeros(2)}),
    "rows: expected dtype": (TypeError, (Q, K), {"rows": torch.zeros(2, dtype=torch.int32)}),
    "rows: expected shape": (ValueError, (Q, K), {"rows": torch.zeros(1, 1).long()}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_name_of_the_argument(message):
    error, arguments, options = BAD[message]
    with pytest.raises(error, match=message):
        attention_stats_qk(*arguments, **options)
