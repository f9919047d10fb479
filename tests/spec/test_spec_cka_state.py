"""CkaState: any split of the rows, any merge, gives what one call on all rows gives."""

import pytest
import torch
from truth import cka, worst

from inflection_fast import CkaState, linear_cka

CKA_ERROR = 1e-6
SPLITS = {
    "one": [150],
    "single rows": [1] * 150,
    "one row first": [1, 149],
    "ragged": [7, 1, 64, 3, 75],
    "two": [75, 75],
}


def features(layers=3, rows=150, dim=12, offset=0.0, dtype=torch.float32):
    x = torch.randn(layers, rows, dim)
    y = x + torch.randn(layers, rows, dim)
    return (x + offset).to(dtype), (y - offset).to(dtype)


def pushed(x, y, split):
    state, start = CkaState(layers=x.shape[0], dim=x.shape[-1]), 0
    for n in split:
        state.push(x[:, start : start + n], y[:, start : start + n])
        start += n
    assert start == x.shape[1]
    return state


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("debiased", [True, False])
def test_any_split_at_any_offset_equals_the_truth(debiased, offset, split):
    x, y = features(offset=offset)
    got = pushed(x, y, split).value(debiased=debiased)
    assert got.shape == (3,)
    assert worst(got, cka(x, y, debiased=debiased)) <= CKA_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_rows_are_summed_exactly(dtype):
    x, y = features(dtype=dtype, offset=3.0)
    for debiased in (True, False):
        assert worst(pushed(x, y, [50, 100]).value(debiased=debiased), cka(x, y, debiased=debiased)) <= CKA_ERROR


@pytest.mark.parametrize("debiased", [True, False])
def test_rows_that_drift_far_from_the_first_batch_equal_the_truth(debiased):
    x, y = features()
    drift = torch.linspace(0, 100, 150)[:, None]
    x, y = x + drift, y - drift
    assert worst(pushed(x, y, [10] * 15).value(debiased=debiased), cka(x, y, debiased=debiased)) <= CKA_ERROR


def test_debiasing_is_of_all_rows_and_not_a_mean_of_batches():
    # Rows inside a batch depend on each other, as tokens of a sequence do.
    common = torch.randn(1, 15, 1, 12).expand(1, 15, 10, 12).reshape(1, 150, 12)
    x, y = (torch.randn(1, 150, 12) + 3.0 * common, torch.randn(1, 150, 12) + 3.0 * common)
    means = torch.stack([cka(x[:, i : i + 10], y[:, i : i + 10]) for i in range(0, 150, 10)]).mean(0)
    exact = cka(x, y)
    assert (means - exact).abs() > 0.1
    assert worst(pushed(x, y, [10] * 15).value(), exact) <= CKA_ERROR


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("debiased", [True, False])
def test_merging_equals_pushing_in_any_order(debiased, offset):
    x, y = features(offset=offset)
    cuts, exact = [0, 40, 41, 100, 150], cka(x, y, debiased=debiased)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 3, 0]):
        parts = [
            pushed(x[:, cuts[i] : cuts[i + 1]], y[:, cuts[i] : cuts[i + 1]], [cuts[i + 1] - cuts[i]]) for i in order
        ]
        total = parts[0]
        for other in parts[1:]:
            total.merge(other)
        assert worst(total.value(debiased=debiased), exact) <= CKA_ERROR


def test_merging_leaves_the_other_as_it_was_and_takes_an_empty_one():
    x, y = features()
    left, right, empty = (
        pushed(x[:, :60], y[:, :60], [60]),
        pushed(x[:, 60:], y[:, 60:], [90]),
        CkaState(layers=3, dim=12),
    )
    before = right.value().clone()
    left.merge(right)
    assert torch.equal(right.value(), before)
    left.merge(empty)
    assert worst(left.value(), cka(x, y)) <= CKA_ERROR
    empty.merge(left)
    assert worst(empty.value(), cka(x, y)) <= CKA_ERROR
    assert (before - left.value()).abs().max() > 1e-4


def test_value_may_be_read_at_any_time_and_pushing_goes_on():
    x, y = features()
    state = CkaState(layers=3, dim=12)
    for start in range(0, 150, 30):
        state.push(x[:, start : start + 30], y[:, start : start + 30])
        assert worst(state.value(), cka(x[:, : start + 30], y[:, : start + 30])) <= CKA_ERROR
        assert torch.equal(state.value(), state.value())


def test_pushing_changes_no_input_and_an_empty_batch_changes_nothing():
    x, y = features()
    was_x, was_y, state = x.clone(), y.clone(), pushed(x, y, [150])
    value = state.value()
    state.push(x[:, :0], y[:, :0])
    assert torch.equal(state.value(), value) and torch.equal(x, was_x) and torch.equal(y, was_y)


def test_a_state_keeps_nothing_of_a_batch_that_is_overwritten_later():
    x, y = features()
    buffer_x, buffer_y, state = torch.empty(3, 50, 12), torch.empty(3, 50, 12), CkaState(layers=3, dim=12)
    for start in (0, 50, 100):
        buffer_x.copy_(x[:, start : start + 50])
        buffer_y.copy_(y[:, start : start + 50])
        state.push(buffer_x, buffer_y)
    assert worst(state.value(), cka(x, y)) <= CKA_ERROR


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_a_pooled_basis_of_any_rank_may_be_chosen_afterwards(rank):
    x, y = features(offset=100.0)
    x, y = x * torch.linspace(3, 0.3, 12), y * torch.linspace(3, 0.3, 12)
    got = pushed(x, y, [20, 130]).value(rank=rank, debiased=False)
    assert worst(got, cka(x, y, rank=rank, debiased=False)) <= CKA_ERROR


def test_state_agrees_with_the_function():
    x, y = features()
    assert torch.allclose(pushed(x, y, [150]).value(), linear_cka(x, y), rtol=0, atol=1e-6)


def test_strided_rows_are_taken_as_they_are():
    x, y = torch.randn(150, 3, 12).transpose(0, 1), torch.randn(150, 3, 24).transpose(0, 1)[..., ::2]
    assert worst(pushed(x, y, [80, 70]).value(), cka(x, y)) <= CKA_ERROR


def test_a_spoiled_layer_and_a_constant_layer_are_nan_alone():
    x, y = features(layers=4)
    x[1, 100, 3], y[2] = float("nan"), 7.0
    for debiased in (True, False):
        assert pushed(x, y, [75, 75]).value(debiased=debiased).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_than_four_rows_have_no_debiased_value(rows):
    x, y = features()
    state = pushed(x[:, :rows], y[:, :rows], [rows] if rows else [])
    try:
        value = state.value()
    except ValueError as refused:
        assert str(rows) in str(refused)
    else:
        assert value.isnan().all()


@pytest.mark.parametrize("rank, debiased, error", [
    (3, True, ValueError), (0, False, ValueError), (13, False, ValueError), (-1, False, ValueError),
    (1.5, False, TypeError),
])  # fmt: skip
def test_a_rank_without_a_frozen_basis_or_out_of_range_is_refused(rank, debiased, error):
    state = pushed(*features(), [150])
    with pytest.raises(error, match=r"rank|debiased"):
        state.value(rank=rank, debiased=debiased)


@pytest.mark.parametrize("x, y, error", [
    (torch.zeros(3, 5, 11), torch.zeros(3, 5, 11), ValueError),
    (torch.zeros(2, 5, 12), torch.zeros(2, 5, 12), ValueError),
    (torch.zeros(5, 12), torch.zeros(5, 12), ValueError),
    (torch.zeros(3, 5, 12), torch.zeros(3, 4, 12), ValueError),
    (torch.zeros(3, 5, 12).double(), torch.zeros(3, 5, 12).double(), TypeError),
    (torch.zeros(3, 5, 12).long(), torch.zeros(3, 5, 12).long(), TypeError),
    (torch.zeros(3, 5, 12), [1.0], TypeError),
])  # fmt: skip
def test_a_bad_batch_is_refused_and_leaves_the_state_as_it_was(x, y, error):
    good = features()
    state = pushed(*good, [150])
    value = state.value()
    with pytest.raises(error):
        state.push(x, y)
    assert torch.equal(state.value(), value)


def test_merging_with_another_shape_or_with_no_state_is_refused():
    state = pushed(*features(), [150])
    for other in (CkaState(layers=2, dim=12), CkaState(layers=3, dim=8)):
        with pytest.raises(ValueError):
            state.merge(other)
    with pytest.raises(TypeError):
        state.merge(3)


@pytest.mark.parametrize("layers, dim", [(0, 4), (4, 0), (-1, 4), (1.5, 4), ("3", 4)])
def test_a_state_of_no_size_is_refused(layers, dim):
    with pytest.raises((TypeError, ValueError)):
        CkaState(layers=layers, dim=dim)
