"""Derivatives of the statistics from queries and keys: against float64 autograd, compiled, and where they must be 0."""

import pytest
import torch
from helpers.attention_qk import MASKS, integers, pair, seeded, widened  # noqa: F401  (seeded is used by every test)
from helpers.attention_qk_gradients import FIELDS, check, gradients

from inflection_fast import attention_entropy_qk, attention_stats_qk

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 6, 2, 49, 131, 24), (1, 2, 1, 70, 600, 64), (1, 2, 2, 30, 90, 512)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_autograd_in_float64(isa, dtype, shape):
    check(pair(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_do_not_depend_on_an_offset_near_the_resolution_of_a_float(isa, dtype):
    plain, offset = 2.0**6, 2.0**22
    query, key = integers(dtype, plain)
    weights = torch.randn(4, 1, 2, 30)
    weights[1] = 0.0  # lse grows with the offset
    few = gradients(attention_stats_qk, [query, key], {"scale": 1.0}, weights)
    query[..., 8] = key[..., 8] = offset**0.5
    far = gradients(attention_stats_qk, [query, key], {"scale": 1.0}, weights)
    for ours, expected in zip(far, few, strict=True):
        size = expected[..., :8].abs().max()
        assert (
            size > 0.1 and (ours - expected)[..., :8].abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * size
        )


@pytest.mark.parametrize("scale", [1e-20, 1e2, 1e5, 1e8, 1e20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_one_hot_rows_are_finite_and_vanish(isa, dtype, scale):
    query, key = pair(1, 2, 1, 37, 150, 32, sharp=1.0, dtype=dtype)
    ours = gradients(
        attention_stats_qk,
        [query, key],
        {"scale": scale},
        torch.randn(4, 1, 2, 37).index_fill_(0, torch.tensor(1), 0.0),
    )
    assert all(x.isfinite().all() for x in ours)
    if scale > 1e5:
        assert all((x == 0).all() for x in ours)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 4)}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_gradients_with_masks_bounds_and_sinks_equal_autograd(mask, options, sinks):
    inputs = [*pair(2, 4, 2, 49, 131, 24), *([torch.randn(4)] if sinks else [])]
    check(inputs, attn_mask=None if mask is None else MASKS[mask](2, 4, 49, 131), **options)


def test_gradients_of_picked_rows_add_up_where_a_row_repeats(isa):
    query, key = pair(1, 4, 2, 61, 150, 40)
    rows = torch.tensor([60, 0, 0, 13])
    grad_query, _ = check([query, key], rows=rows, is_causal=True)
    others = torch.ones(61, dtype=torch.bool)
    others[rows] = False
    assert (grad_query[:, :, others] == 0).all() and (grad_query[:, :, 60] != 0).any()


def test_gradients_do_not_depend_on_the_number_of_threads():
    inputs, threads = pair(1, 4, 2, 100, 1200, 64), torch.get_num_threads()
    weights = torch.randn(4, 1, 4, 100)
    whole = gradients(attention_stats_qk, inputs, {"is_causal": True}, weights)
    try:
        torch.set_num_threads(3)
        again = gradients(attention_stats_qk, inputs, {"is_causal": True}, weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_keyless_rows_and_hidden_keys_have_gradient_zero_and_pass_no_nan_on(isa):
    query, key = pair(1, 1, 1, 30, 50, 8)
    mask = torch.ones(30, 50, dtype=torch.bool)
    mask[:, 9] = mask[4] = False
    key[0, 0, 9] = query[0, 0, 4] = float("nan")
    query.requires_grad_(), key.requires_grad_()
    grad_query, grad_key = torch.autograd.grad(attention_entropy_qk(query, key, attn_mask=mask).sum(), (query, key))
    assert (grad_query[0, 0, 4] == 0).all() and (grad_key[0, 0, 9] == 0).all()
    assert grad_query.isfinite().all() and grad_key.isfinite().all()


def test_a_poisoned_row_spoils_its_own_gradient_and_those_of_the_keys_it_attends(isa):
    query, key = pair(1, 1, 1, 30, 50, 8)
    query[0, 0, 20] = float("nan")
    query.requires_grad_(), key.requires_grad_()
    loss = attention_entropy_qk(query, key, is_causal=True).sum()
    grad_query, grad_key = torch.autograd.grad(loss, (query, key))
    assert grad_query[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [20]
    assert grad_key[0, 0].isnan().any(-1).nonzero().flatten().tolist() == list(range(21))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_gradient_makes_attended_keys_nan_and_no_others(isa, dtype, field):
    query, key = pair(1, 1, 1, 30, 50, 8, dtype=dtype)
    query.requires_grad_(), key.requires_grad_()
    mask = torch.rand(30, 50) > 0.5
    mask[20, :5] = True
    weights = torch.ones(1, 1, 30)
    weights[0, 0, 20] = INF
    loss = (getattr(attention_stats_qk(query, key, attn_mask=mask), field) * weights).sum()
    grad_query, grad_key = torch.autograd.grad(loss, (query, key))
    assert torch.equal(grad_query[0, 0].isnan().all(-1), torch.arange(30) == 20)
    assert torch.equal(grad_key[0, 0].isnan().all(-1), mask[20])
    assert grad_query[0, 0][torch.arange(30) != 20].isfinite().all() and grad_key[0, 0][~mask[20]].isfinite().all()


def test_forward_mode_is_refused_with_what_to_do():
    query, key = pair(1, 2, 1, 5, 7, 8)
    for number in range(3):
        inputs = [query, key, torch.randn(2)]
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            inputs[number] = torch.autograd.forward_ad.make_dual(inputs[number], torch.ones_like(inputs[number]))
            attention_stats_qk(*inputs[:2], sinks=inputs[2])


def test_the_gradient_of_max_logit_and_keys_is_refused_and_so_is_the_second_derivative():
    query, key = (x.requires_grad_() for x in pair(1, 1, 1, 3, 4, 8))
    stats = attention_stats_qk(query, key)
    assert not stats.max_logit.requires_grad and not stats.keys.requires_grad
    (first,) = torch.autograd.grad(stats.entropy.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": (2, 1), "softcap": 3.0}], ids=str)
def test_compiled_in_one_graph_gives_the_same_numbers(options):
    def loss(query, key, sinks, rows):
        stats = attention_stats_qk(query, key, sinks=sinks, rows=rows, **options)
        return (stats.entropy * 2 + stats.collision).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (9, 33):  # the second shape compiles again, for any length
        inputs = [x.requires_grad_() for x in (*pair(1, 4, 2, length, 40, 16), torch.randn(4))]
        rows = torch.tensor([0, 3, 8])
        expected, actual = loss(*inputs, rows), compiled(*inputs, rows)
        torch.testing.assert_close(actual, expected)
        both = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        for ours, theirs in both:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 1, 4])], ids=["all", "picked"])
@pytest.mark.parametrize("entropy_only", [False, True])
def test_opcheck(entropy_only, rows):
    query, key = (x.requires_grad_() for x in pair(1, 4, 2, 5, 7, 8))
    sinks, mask = torch.randn(4, requires_grad=True), torch.rand(5, 7) > 0.3
    arguments = (query, key, mask, True, 0.5, 3, -1, 2.0, sinks, rows, None, entropy_only)
    torch.library.opcheck(torch.ops.inflection_fast.attention_stats_qk, arguments)
