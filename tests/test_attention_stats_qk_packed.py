"""cu_seqlens of the operators from queries and keys: sequences packed one after the other, each as if it were alone."""

import itertools

import pytest
import torch
from helpers.attention_qk import MASKS, check, pair, seeded  # noqa: F401  (seeded is used by every test)
from helpers.attention_qk_gradients import check as check_gradients

from inflection_fast import attention_entropy_qk, attention_stats_qk
from inflection_fast.ops import PackedSequences
from inflection_fast.ops.qk_arguments import key_bounds

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

LENGTHS = {
    "one": [300],
    "a boundary in every block": [1, 70, 3, 0, 0, 90, 24, 111, 1],
    "shorter than a block of rows": [5] * 60,
    "longer than a chunk of keys": [3, 1100, 2],
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (9, 4)},
    "causal window softcap": {"is_causal": True, "window": (40, 2), "softcap": 3.0},
}


def cumulative(lengths, first=0, dtype=torch.int32):
    return torch.tensor([first, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_equal_the_truth(isa, lengths, options):
    T = sum(lengths)
    check(*pair(1, 4, 2, T, T, 24), cu_seqlens=cumulative(lengths), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [64, 129])
def test_every_dtype_and_a_batch_that_shares_the_lengths_equal_the_truth(depth, dtype):
    check(*pair(2, 2, 1, 150, 150, depth, dtype=dtype), cu_seqlens=cumulative([40, 80, 30], dtype=torch.int64))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_sinks_and_rows_within_sequences_equal_the_truth(isa, mask):
    rows = torch.tensor([149, 0, 3, 3, 80, 61, 60, 59] * 5)
    options = {"attn_mask": MASKS[mask](2, 4, 150, 150), "sinks": torch.randn(4) * 2}
    check(*pair(2, 4, 2, 150, 150, 24), cu_seqlens=cumulative([60, 81, 9]), rows=rows, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_sequence_has_the_statistics_that_it_has_alone(isa, options):
    lengths = [70, 1, 129, 200, 13]
    query, key = pair(1, 4, 2, sum(lengths), sum(lengths), 64)
    cu_seqlens = cumulative(lengths)
    packed = attention_stats_qk(query, key, cu_seqlens=cu_seqlens, **options)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = attention_stats_qk(query[:, :, begin:end], key[:, :, begin:end], **options)
        for name, ours, theirs in zip(alone._fields, packed, alone, strict=True):
            torch.testing.assert_close(ours[:, :, begin:end], theirs, rtol=0, atol=1e-5, msg=name)


def test_positions_outside_every_sequence_attend_nothing_and_are_attended_by_nobody(isa):
    query, key = pair(1, 2, 2, 100, 100, 16)
    key[:, :, :20] = key[:, :, 90:] = float("nan")
    query.requires_grad_(), key.requires_grad_()
    cu_seqlens = cumulative([50, 20], first=20)
    stats = attention_stats_qk(query, key, cu_seqlens=cu_seqlens)
    outside = torch.cat([stats.keys[:, :, :20], stats.keys[:, :, 90:]], -1)
    assert (outside == 0).all() and (stats.lse[:, :, :20] == -torch.inf).all()
    assert stats.keys[0, 0, 20:90].tolist() == [50.0] * 50 + [20.0] * 20
    assert all(x.isfinite().all() for x in (stats.entropy, stats.collision, stats.lse[:, :, 20:90]))
    for grad in torch.autograd.grad(stats.entropy.sum(), (query, key)):
        assert (grad[:, :, :20] == 0).all() and (grad[:, :, 90:] == 0).all()
        assert grad.isfinite().all() and (grad[:, :, 20:90] != 0).any(-1).all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [LENGTHS["a boundary in every block"], [3, 700, 2]], ids=str)
def test_gradients_equal_autograd_in_float64(isa, lengths, options):
    T = sum(lengths)
    sinks = [] if "is_causal" in options else [torch.randn(4)]  # without them `sink` is of the sequence's first key
    check_gradients([*pair(1, 4, 2, T, T, 24), *sinks], cu_seqlens=cumulative(lengths), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_picked_rows_and_16_bit_inputs_equal_autograd(dtype):
    rows = torch.tensor([149, 0, 3, 3, 80, 61])
    inputs = pair(2, 4, 2, 150, 150, 40, dtype=dtype)
    check_gradients(inputs, cu_seqlens=cumulative([60, 81, 9]), rows=rows, is_causal=True)


def test_a_poisoned_sequence_spoils_nothing_of_the_others(isa):
    query, key = pair(1, 2, 1, 90, 90, 8)
    key[0, 0, 45] = float("nan")
    query.requires_grad_(), key.requires_grad_()
    entropy = attention_entropy_qk(query, key, cu_seqlens=cumulative([40, 10, 40]))
    assert entropy[0, 0].isnan().nonzero().flatten().tolist() == list(range(40, 50))
    for grad in torch.autograd.grad(entropy.sum(), (query, key)):
        assert grad.isnan().any(-1).nonzero()[:, 2].unique().tolist() == list(range(40, 50))


def test_threads_and_the_other_rows_change_nothing(isa):
    query, key = pair(1, 4, 2, 900, 900, 32)
    cu_seqlens, threads = cumulative([300, 1, 500, 99]), torch.get_num_threads()
    whole = attention_stats_qk(query, key, cu_seqlens=cu_seqlens, is_causal=True)
    try:
        torch.set_num_threads(3)
        again = attention_stats_qk(query, key, cu_seqlens=cu_seqlens, is_causal=True)
    finally:
        torch.set_num_threads(threads)
    rows = torch.arange(3, 900, 11)
    picked = attention_stats_qk(query, key, cu_seqlens=cu_seqlens, is_causal=True, rows=rows)
    for one, three, few in zip(whole, again, picked, strict=True):
        assert torch.equal(one, three) and torch.equal(one[:, :, rows], few)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_position_is_in_the_sequence_that_begins_last_before_it(dtype):
    bounds = key_bounds(torch.tensor([1, 3, 3, 4], dtype=dtype), 6)
    assert bounds.tolist() == [[0, 0], [1, 3], [1, 3], [3, 4], [0, 0], [0, 0]]
    assert bounds.dtype == torch.int64


def test_the_operator_reads_nothing_outside_whatever_the_bounds_are(isa):
    query, key = pair(1, 2, 1, 200, 200, 16)
    huge = 2**62
    wrong = torch.tensor([[-huge, huge], [huge, -huge], [-5, 7], [190, 205], [50, 40]] * 40)
    right = wrong.clamp(0, 200)
    results = []
    for bounds in (wrong, right):
        arguments = (query, key, None, False, 0.3, -1, -1, 0.0, None, None, bounds)
        stats = torch.ops.inflection_fast.attention_stats_qk(*arguments, False)
        ones = torch.ones(1, 2, 200)
        grads = torch.ops.inflection_fast.attention_stats_qk_backward(
            ones, None, None, None, *(stats[i] for i in (0, 1, 4, 5, 6)), *arguments[:8], False, None, bounds
        )
        results.append([*stats, grads[0]])
    assert results[0][3][0, 0, :5].tolist() == [200.0, 0.0, 7.0, 10.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_share_what_is_made_of_the_lengths_once():
    query, key = pair(1, 4, 2, 60, 60, 16)
    lengths = cumulative([20, 40])
    packed = PackedSequences(lengths, 60)
    for ours, theirs in zip(
        attention_stats_qk(query, key, cu_seqlens=packed),
        attention_stats_qk(query, key, cu_seqlens=lengths),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cu_seqlens: made for 60 queries and keys, got 50"):
        attention_stats_qk(query[:, :, :50], key[:, :, :50], cu_seqlens=packed)


def test_compiled_in_one_graph_for_any_length_and_number_of_sequences():
    def loss(query, key, cu_seqlens):
        return attention_entropy_qk(query, key, cu_seqlens=cu_seqlens, is_causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for lengths in ([9, 4], [20, 3, 14], [1, 1, 1, 40]):
        T = sum(lengths)
        inputs = [x.requires_grad_() for x in pair(1, 4, 2, T, T, 16)]
        expected, actual = (function(*inputs, cumulative(lengths)) for function in (loss, compiled))
        torch.testing.assert_close(actual, expected)
        both = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs)


def test_opcheck():
    query, key = (x.requires_grad_() for x in pair(1, 4, 2, 7, 7, 8))
    bounds = key_bounds(cumulative([3, 4]), 7)
    arguments = (query, key, None, True, 0.5, 3, -1, 2.0, None, None, bounds, False)
    torch.library.opcheck(torch.ops.inflection_fast.attention_stats_qk, arguments)


BAD = {
    "expected a tensor": (TypeError, [0, 5]),
    "expected dtype": (TypeError, torch.tensor([0.0, 5.0])),
    "expected one dimension": (ValueError, torch.tensor([[0, 5]])),
    "at least 2 numbers": (ValueError, torch.tensor([5])),
    "never fall": (ValueError, torch.tensor([0, 3, 2, 5])),
    r"in \[0, 5\]": (ValueError, torch.tensor([0, 6])),
    "numbers in": (ValueError, torch.tensor([-1, 5])),
}


@pytest.mark.parametrize("message", BAD)
def test_lengths_that_are_none_are_refused(message):
    error, cu_seqlens = BAD[message]
    with pytest.raises(error, match=f"cu_seqlens: .*{message}"):
        attention_entropy_qk(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), cu_seqlens=cu_seqlens)


def test_fewer_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="cu_seqlens: needs as many queries as keys, got 4 queries and 5 keys"):
        attention_entropy_qk(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8), cu_seqlens=torch.tensor([0, 4]))
