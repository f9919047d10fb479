"""CKA of bfloat16 and float16 rows: on CUDA they go through tensor cores, with a shift that leaves them exact."""

import pytest
import torch

from inflection_fast import CkaState, delta_cka, linear_cka
from inflection_fast.ops import reference

pytestmark = pytest.mark.kernel

BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(6)


@pytest.fixture
def limit(cka_limit):
    """On a grid as coarse as these rows', equal products are rounded alike, so float32 sums err a little more."""
    return lambda dtype: max(cka_limit(dtype), 5e-6)


def features(*shape, offset=0.0, noise=1.0):
    """Both sides of a change, offset by so many standard deviations, to either side at random."""
    x = torch.randn(shape)
    y = x + noise * torch.randn(shape)
    signs = torch.randn(2, shape[-1]).sign()
    return x + offset * signs[0], y / y.std() + offset * signs[1]


def error(x, y, **options):
    truth = reference.linear_cka(x.double(), y.double(), **options)
    assert truth.isfinite().all()
    return (linear_cka(x, y, **options) - truth).abs().max().item()


@BOTH
@HALVES
@pytest.mark.parametrize("offset", [0.0, 1.0, 2.0, 4.0, 8.0, 1000.0])
def test_no_offset_costs_more_than_the_limit(dtype, offset, debiased, limit):
    for shape in ((64, 70), (300, 20), (700, 3)):
        for noise in (0.01, 1.0, 30.0):
            x, y = (side.to(dtype) for side in features(*shape, offset=offset, noise=noise))
            assert error(x, y, debiased=debiased) <= limit(dtype)


@BOTH
@HALVES
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_without_or_far_from_the_origin_nothing_is_rounded(dtype, offset, debiased):
    x, y = (side.to(dtype) for side in features(400, 30, offset=offset))
    assert error(x, y, debiased=debiased) <= 5e-6
    x = features(400, 30, offset=offset, noise=0.0)[0].to(dtype)
    y = torch.where(torch.rand(x.shape) < 0.1, x * (1 + 2 * torch.finfo(dtype).eps), x)
    assert y.dtype == dtype and not torch.equal(x, y)
    exact = reference.delta_cka(x.double(), y.double(), debiased=debiased)
    assert (delta_cka(x, y, debiased=debiased) - exact).abs() <= 5e-6


@pytest.mark.emulated
@BOTH
@HALVES
def test_columns_of_unlike_means_share_a_tile(dtype, debiased, limit):
    x, y = features(600, 200)
    for side in (x, y):
        side.add_(torch.randn(200).mul(2).exp())
        side[:, 150].mul_(1e-3).add_(40)
        side[:, 7].fill_(3)
    assert error(x.to(dtype), y.to(dtype), debiased=debiased) <= limit(dtype)


@pytest.mark.emulated
@pytest.mark.sanitized
@BOTH
@HALVES
@pytest.mark.parametrize("offset", [0.0, 2.0, 1000.0])
def test_long_rows_and_rows_that_do_not_count(dtype, offset, debiased, limit):
    x, y = features(2, 330, 40, offset=offset)
    x[0, 5] *= 30
    x[1, 300], y[1, 300] = 40 * x[1, 300], 50 * y[1, 300]
    mask = torch.rand(2, 330) < 0.8
    x, y = x.to(dtype), y.to(dtype)
    state = CkaState(2, 40)
    x[~mask], y[~mask] = torch.nan, torch.inf
    for begin, end in ((0, 37), (37, 300), (300, 330)):
        state.push(x[:, begin:end], y[:, begin:end], mask[:, begin:end])
    got = state.value(debiased=debiased)
    for layer in range(2):
        a, b = (side[layer, mask[layer]].double() for side in (x, y))
        truth = reference.linear_cka(a, b, debiased=debiased)
        assert (got[layer] - truth).abs() <= limit(dtype)


@BOTH
@HALVES
def test_more_rows_than_one_sum_in_float32_holds(dtype, debiased, limit):
    for offset in (0.0, 3.0):
        x, y = (side.to(dtype) for side in features(4200, 5, offset=offset))
        assert error(x, y, debiased=debiased) <= limit(dtype)


@pytest.mark.emulated
@pytest.mark.sanitized
@HALVES
@pytest.mark.parametrize("dim", [1, 63, 64, 65, 127, 128, 129, 200, 257])
def test_every_number_of_columns_fills_its_tiles(dtype, dim, limit):
    x, y = (side.to(dtype) for side in features(70, dim, offset=5.0))
    for a, b in ((x, y), (x, y[:, : dim // 2 + 1]), (x[:, : dim // 3 + 1], y), (x[:, ::2], y[:, ::3])):
        assert error(a, b, debiased=False) <= limit(dtype)


@pytest.mark.emulated
@pytest.mark.sanitized
@BOTH
def test_differences_beyond_the_largest_half_do_not_become_infinite(debiased, limit):
    x, y = features(300, 6)
    x = (15_000 * x).clamp(-60_000, 60_000)  # so that the two rows are not among the long ones
    x[:, 2] = 40_000 + x[:, 2] / 150
    x[11, 2], x[12, 2] = -40_000, 65_000
    x, y = x.half(), (y * 6000).half()
    assert error(x, y, debiased=debiased) <= limit(torch.float16)


@HALVES
def test_calls_do_not_differ_by_a_bit(dtype):
    x, y = (side.to(dtype) for side in features(3, 90, 40, offset=3.0))
    base = linear_cka(x, y)
    assert all(torch.equal(linear_cka(x, y), base) for _ in range(3))


def test_the_sides_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="y: expected dtype"):
        linear_cka(torch.zeros(9, 3).half(), torch.zeros(9, 3).bfloat16())
