"""More than 2^31 elements, in number or between two of them. Memory that nobody touches is not taken.

Two tests take half a minute and 8 GiB: `make fuzz` runs them, or INFLECTION_LARGE_TENSORS=1.
"""

import math
import os

import numpy as np
import pytest
import torch

from inflection_fast import (
    activation_moments,
    attention_column_mass,
    attention_stats,
    attention_stats_qk,
    cka_matrix,
    linear_cka,
    sum_of_squares,
)
from inflection_fast.ops import MOMENT_SUMS, reference

pytestmark = pytest.mark.kernel

STEP = 2**31 + 8  # elements; of 16 bits more than 2^32 bytes


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


def numbers(*shape):
    return torch.randn(shape).bfloat16()


def far(x, dim):
    """The same numbers, those along `dim` more than 2^31 elements apart."""
    near = x.movedim(dim, 0)
    room = torch.empty(STEP * (len(near) - 1) + near[0].numel(), dtype=x.dtype)
    out = room.as_strided(near.shape, [STEP, *torch.empty(near.shape[1:]).stride()])
    out.copy_(near)
    return out.movedim(0, dim)


def assert_same(operator, tensors, far_ones):
    """Values and gradients do not depend on where the numbers lie."""
    leaves = [x.clone().requires_grad_() for x in tensors], [x.requires_grad_() for x in far_ones]
    results = [operator(*own) for own in leaves]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    totals = [sum(value.sum() for value in found if value.requires_grad) for found in results]
    if isinstance(totals[0], int):
        return
    grads = [torch.autograd.grad(total, own) for total, own in zip(totals, leaves, strict=True)]
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.emulated
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 70), 0), ((1, 2, 70), 1), ((2, 3, 2), 2)], ids=str)
def test_logits_and_masks_that_lie_far_apart(isa, shape, dim):
    x, bias = numbers(*shape), numbers(*shape)
    assert_same(lambda x: attention_stats(x, scale=0.5), [x], [far(x, dim)])
    assert_same(lambda x, bias: attention_stats(x, attn_mask=bias), [x, bias], [far(x, dim), far(bias, dim)])


@pytest.mark.emulated
@pytest.mark.parametrize(("batch", "length", "depth", "dim"), [(2, 9, 8, 0), (1, 2, 8, 2), (1, 9, 2, 3)])
def test_queries_and_keys_that_lie_far_apart(isa, batch, length, depth, dim):
    query, key = numbers(batch, 2, length, depth), numbers(batch, 1, length, depth)
    lse = attention_stats_qk(query, key).lse
    for operator in (attention_stats_qk, lambda q, k: attention_column_mass(q.detach(), k.detach(), lse)):
        assert_same(operator, [query, key], [far(query, dim), far(key, dim)])


@pytest.mark.emulated
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 70), 0), ((3, 2, 70), 1), ((3, 5, 2), 2)], ids=str)
def test_activations_that_lie_far_apart(isa, shape, dim):
    x, y = numbers(*shape), numbers(*shape)
    far_x, far_y = far(x, dim), far(y, dim)
    assert torch.equal(sum_of_squares([far_x, far_y], [0, 1]), sum_of_squares([x, y], [0, 1]))
    for got, expected in zip(activation_moments(far_y, far_x), activation_moments(y, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.emulated
@pytest.mark.parametrize(("shape", "dim"), [((2, 40, 6), 0), ((1, 2, 6), 1), ((1, 40, 2), 2)], ids=str)
def test_features_that_lie_far_apart(isa, shape, dim):
    x, y = numbers(*shape), numbers(*shape)
    assert_same(lambda x, y: [linear_cka(x, y, debiased=False)], [x, y], [far(x, dim), far(y, dim)])
    if shape[1] > 2:
        for options in ({}, {"method": "minibatch", "tile": 16}):
            expected = cka_matrix(x, y, **options)
            torch.testing.assert_close(cka_matrix(far(x, dim), far(y, dim), **options), expected, rtol=0, atol=1e-6)


# ---- more than 2^31 of them ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """[2^16 + 1, 2^15] in bfloat16, 4 GiB of zeros of which the first and the last row are others."""
    x = torch.from_numpy(np.zeros((2**16 + 1, 2**15), np.uint16)).view(torch.bfloat16)  # torch.zeros would write them
    torch.manual_seed(5)
    x[0], x[-1] = numbers(2**15), 2 * numbers(2**15)
    assert x.numel() > 2**31
    return x


def free_bytes():
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    return int(lines["MemAvailable"].split()[0]) * 1024


slow = pytest.mark.skipif(
    os.environ.get("INFLECTION_LARGE_TENSORS") != "1" or free_bytes() < 9 * 2**30,
    reason="takes half a minute and 8 GiB: INFLECTION_LARGE_TENSORS=1",
)


def test_rows_of_many_logits(many):
    stats = attention_stats(many)
    for row in (0, -1):
        truth = reference.attention_stats(many[row].double()[None])
        for name, got, exact in zip(stats._fields, stats, truth, strict=True):
            assert abs(got[row] - exact[0]) <= 2e-6 * max(1, exact[0]), name
    assert (stats.entropy[1:-1] - math.log(2**15)).abs().max() <= 2e-6 and (stats.keys == 2**15).all()


@slow
def test_gradient_of_many_logits(many):
    many.requires_grad_()
    try:
        (got,) = torch.autograd.grad(attention_stats(many).entropy.sum(), many)
        for row in (0, -1):
            x = many[row].detach().double()[None].requires_grad_()
            (exact,) = torch.autograd.grad(reference.attention_stats(x).entropy.sum(), x)
            assert (got[row].double() - exact[0]).abs().max() <= 2**-8 * exact.abs().max()
        assert got[2**15].abs().max() <= 1e-9
    finally:
        many.requires_grad_(False)


def test_sums_over_many_elements(many):
    exact = many[[0, -1]].double().square().sum()
    assert sum_of_squares([many], [0]).item() == pytest.approx(exact.item(), rel=1e-12)
    sums, largest = activation_moments(many)
    assert sums[MOMENT_SUMS.index("elements")] == many.numel()
    assert sums[MOMENT_SUMS.index("second")].item() == pytest.approx(exact.item(), rel=1e-12)
    assert largest == many[[0, -1]].abs().max()


@slow
def test_many_scores_of_queries_and_keys():
    query, key = numbers(1, 64, 4096, 2), numbers(1, 1, 4096, 2)
    wide = query.expand(2, 64, 4096, 2), key.expand(2, 1, 4096, 2)
    assert 2 * 64 * 4096**2 >= 2**31
    stats = attention_stats_qk(*wide)
    truth = reference.attention_stats_qk(query[:, -1:].double(), key.double())
    for name, got, exact in zip(stats._fields, stats, truth, strict=True):
        assert (got[1, -1] - exact[0, 0]).abs().max() <= 1e-4, name
    mass, squares = attention_column_mass(*wide, stats.lse)
    assert torch.equal(mass[0], mass[1]) and torch.equal(squares[0], squares[1])
    assert (mass.sum(-1) / 4096 - 1).abs().max() <= 1e-5


def test_more_keys_than_are_counted_are_refused():
    logits, query = torch.zeros(1, 1).expand(1, 2**31), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="logits: expected at most 2147483392 keys, got 2147483648"):
        attention_stats(logits)
    with pytest.raises(ValueError, match="key: expected at most 2147483392 keys, got 2147483648"):
        attention_stats_qk(query, query.expand(1, 1, 2**31, 1))
