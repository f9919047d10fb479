"""CKA has no scale: features of any size have the value of features near 1, by every estimator."""

import pytest
import torch

from inflection_fast import CkaState, linear_cka
from inflection_fast.ops import cka_jackknife, cka_matrix, reference

ROWS = 300
SIZES = [(1e-12, 1e-12), (1e-12, 1.0), (1e9, 1e9), (1e-25, 1e20), (1e-35, 1e30)]  # of x and y
SCALED = pytest.mark.parametrize("sizes", SIZES, ids=str)
DTYPED = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def features(sizes, dtype):
    """x and y [3, N, 40] of these sizes, and both near 1 in float64: what the reference squares."""
    torch.manual_seed(4)
    x = torch.randn(3, ROWS, 40) + 1
    sides = [(side * size).to(dtype) for side, size in zip((x, x + 0.8 * torch.randn_like(x)), sizes, strict=True)]
    return *sides, *(side.double() / size for side, size in zip(sides, sizes, strict=True))


@SCALED
@DTYPED
@pytest.mark.parametrize("rank", [None, 7])
def test_linear_cka(isa, cka_limit, sizes, dtype, rank):
    x, y, near_x, near_y = features(sizes, dtype)
    if rank is not None and sizes[0] != sizes[1]:
        pytest.skip("the basis of both sides pooled is that of the larger one")
    exact = reference.linear_cka(near_x, near_y, rank=rank)
    assert (linear_cka(x, y, rank=rank) - exact).abs().max() <= cka_limit(dtype)


@SCALED
@DTYPED
def test_a_state_whose_sums_merge(isa, cka_limit, sizes, dtype):
    x, y, near_x, near_y = features(sizes, dtype)
    first, second = CkaState(3, 40), CkaState(3, 40)
    first.push(x[:, :100], y[:, :100])
    second.push(x[:, 100:], y[:, 100:])
    first.merge(second)
    assert (first.value() - reference.linear_cka(near_x, near_y)).abs().max() <= cka_limit(dtype)


@pytest.mark.parametrize("first", [1e-30, 1e-9, 1e9, 1e30])
def test_a_state_whose_rows_change_their_size(isa, cka_limit, first):
    x, y, _, _ = features((1.0, 1.0), torch.float32)
    x[:, :50] *= first
    y[:, :50] *= first
    state = CkaState(3, 40)
    state.push(x[:, :50], y[:, :50])
    state.push(x[:, 50:], y[:, 50:])
    exact = reference.linear_cka(x.double(), y.double())
    assert (state.value() - exact).abs().max() <= cka_limit(torch.float32)


@SCALED
@DTYPED
@pytest.mark.parametrize(
    "options",
    [{}, {"debiased": False}, {"method": "banded", "band": 9}, {"method": "minibatch", "tile": ROWS}],
    ids=str,
)
def test_matrices(isa, sizes, dtype, options):
    x, y, near_x, near_y = features(sizes, dtype)
    exact = reference.linear_cka(near_x, near_y, debiased=options.get("debiased", True))
    ours = cka_matrix(x, y, **options)
    assert (ours.diagonal() - exact).abs().max() <= 1e-6
    assert (cka_matrix(x, **options).diagonal() - 1).abs().max() <= 1e-6


@SCALED
def test_gradients_are_larger_as_features_are_smaller(isa, sizes):
    x, y, near_x, near_y = features(sizes, torch.float32)
    (ours,) = torch.autograd.grad(linear_cka(x.requires_grad_(), y).sum(), x)
    (exact,) = torch.autograd.grad(reference.linear_cka(near_x.requires_grad_(), near_y).sum(), near_x)
    assert (ours.double() * sizes[0] - exact).abs().max() <= 2e-6 * exact.abs().max()


@SCALED
def test_standard_errors(sizes):
    sequences = torch.arange(ROWS) // 10
    ours, expected = (cka_jackknife(*features(of, torch.float32)[:2], sequences) for of in (sizes, (1.0, 1.0)))
    torch.testing.assert_close(ours.standard_error, expected.standard_error, rtol=1e-5, atol=0)
