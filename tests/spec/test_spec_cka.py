"""linear_cka, delta_cka and CkaState against HSIC_1 from n x n matrices in float64."""

import pytest
import torch
from truth import cka, worst

from inflection_fast import delta_cka, linear_cka

CKA_ERROR = 1e-6  # promised at every mean offset up to 1000 standard deviations and every split of the rows
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def features(*shape, noise=0.8, offset=0.0, dtype=torch.float32):
    """Correlated features with a few strong directions, as hidden states have, and an outlier channel."""
    spectrum = torch.linspace(2.0, 0.2, shape[-1])
    x = torch.randn(shape) * spectrum
    y = x + noise * torch.randn(shape) * spectrum
    x[..., 0] *= 5.0
    return (x + offset).to(dtype), (y + offset).to(dtype)


@pytest.mark.parametrize("shape", [(4, 1), (5, 3), (50, 8), (2, 30, 64), (2, 3, 65, 33), (1, 300, 130)], ids=str)
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cka_equals_the_truth(dtype, debiased, shape):
    x, y = features(*shape, dtype=dtype)
    got, truth = linear_cka(x, y, debiased=debiased), cka(x, y, debiased=debiased)
    assert got.dtype == torch.float32
    for g, t in zip(got.reshape(-1), truth.reshape(-1), strict=True):
        if torch.isfinite(t):  # of four rows the unbiased self term may be negative
            assert abs(g.item() - t.item()) <= CKA_ERROR * max(1.0, abs(t.item()))
        else:
            assert g.isnan()


@pytest.mark.parametrize("offset", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cka_keeps_its_accuracy_at_any_mean_offset(dtype, debiased, offset):
    x, y = torch.randn(3, 200, 48), torch.randn(3, 200, 48)
    y = x + y
    x, y = (x + offset).to(dtype), (y - offset).to(dtype)
    assert worst(linear_cka(x, y, debiased=debiased), cka(x, y, debiased=debiased)) <= CKA_ERROR


def test_cka_keeps_its_accuracy_at_channelwise_offsets_and_scales():
    x, y = features(400, 32)
    shift = torch.linspace(-1000, 1000, 32)
    for size in (1e-3, 1.0, 1e3):
        a, b = (x + shift) * size, (y - shift) * size
        for debiased in (True, False):
            assert worst(linear_cka(a, b, debiased=debiased), cka(a, b, debiased=debiased)) <= CKA_ERROR


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("debiased", [True, False])
def test_cka_in_a_shared_basis_equals_the_truth(debiased, rank):
    x, y = features(2, 120, 8)
    got = linear_cka(x, y, rank=rank, debiased=debiased)
    assert worst(got, cka(x, y, rank=rank, debiased=debiased)) <= CKA_ERROR
    if rank == 8:  # the whole space
        assert torch.allclose(got, linear_cka(x, y, debiased=debiased), rtol=0, atol=2 * CKA_ERROR)


@pytest.mark.parametrize("options", [{}, {"debiased": False}, {"rank": 2}, {"rank": 3, "debiased": False}], ids=str)
def test_delta_cka_is_one_minus_cka(options):
    x, y = features(2, 64, 12)
    assert torch.allclose(delta_cka(x, y, **options), 1 - linear_cka(x, y, **options), rtol=0, atol=1e-7)
    assert delta_cka(x, x, **options).abs().max() <= CKA_ERROR


def test_a_small_change_is_not_lost_in_one_minus_cka():
    x, noise = features(200, 16)[0], torch.randn(200, 16)
    y = x + 1e-2 * noise
    exact = 1 - cka(x, y)
    assert 1e-6 < exact < 1e-3
    assert worst(delta_cka(x, y), exact) <= CKA_ERROR


def test_unrelated_features_are_near_zero_debiased_and_at_the_floor_biased():
    x, y = torch.randn(256, 768), torch.randn(256, 768)
    assert linear_cka(x, y).abs() < 0.02
    assert linear_cka(x, y, debiased=False).item() == pytest.approx(768 / (256 + 768 + 1), abs=0.01)


def test_the_debiased_value_may_be_negative_and_is_not_clamped():
    values = torch.stack([linear_cka(torch.randn(8, 5), torch.randn(8, 5)) for _ in range(40)])
    assert (values < -1e-3).any()


@pytest.mark.parametrize("debiased", [True, False])
def test_a_rotation_a_scale_a_shift_and_a_reordering_change_nothing(debiased):
    x, y = features(100, 10)
    base = linear_cka(x, y, debiased=debiased)
    rotation, order = torch.linalg.qr(torch.randn(10, 10))[0], torch.randperm(100)
    for a, b in ((x @ rotation, y), (x, 7.0 * y), (x + 3.0, y - 2.0), (x[order], y[order]), (y, x)):
        assert abs(linear_cka(a, b, debiased=debiased) - base) <= 3e-6
    assert abs(linear_cka(x[order], y, debiased=debiased) - base) > 0.05


@pytest.mark.parametrize("debiased", [True, False])
def test_a_constant_layer_is_nan_and_its_neighbours_are_not(debiased):
    x, y = features(3, 20, 6)
    x[1] = 2.5
    got = linear_cka(x, y, debiased=debiased)
    assert got.isnan().tolist() == [False, True, False]


def test_nan_and_infinite_features_spoil_their_layer_only():
    x, y = features(4, 20, 6)
    x[1, 3, 2], y[2, 0, 0] = float("nan"), float("inf")
    assert linear_cka(x, y).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_any_stride_give_the_same_numbers(dtype):
    x, y = (t.to(dtype) for t in features(12, 40, 24))
    for a, b in (
        (x.mT, y.mT),
        (x[..., ::2], y[..., ::2]),
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x[:1].expand(2, 40, 24), y[:2]),
    ):
        before = a.clone()
        assert worst(linear_cka(a, b), cka(a, b)) <= CKA_ERROR
        assert torch.equal(a, before)


def test_cka_of_no_layers_is_empty():
    assert linear_cka(torch.empty(0, 8, 4), torch.empty(0, 8, 4)).shape == (0,)


def test_cka_is_differentiated_rightly_or_not_at_all():
    x, y = features(2, 20, 6)
    for options in ({}, {"debiased": False}):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = linear_cka(a, b, **options)
        assert out.requires_grad, "operators are differentiable"
        got = torch.autograd.grad(out.sum(), [a, b])
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        exact = torch.autograd.grad(cka(a, b, **options).sum(), [a, b])
        for g, e in zip(got, exact, strict=True):
            assert worst(g, e) <= 1e-5 * max(1.0, e.abs().max().item())


def test_compiled_in_one_graph():
    compiled = torch.compile(lambda x, y: linear_cka(x, y) * 2, fullgraph=True, backend="aot_eager")
    for n in (20, 31):
        x, y = features(2, n, 6)
        assert torch.allclose(compiled(x, y), linear_cka(x, y) * 2, rtol=0, atol=1e-6)


X, Y = torch.zeros(2, 10, 6), torch.zeros(2, 10, 6)


@pytest.mark.parametrize("function", [linear_cka, delta_cka])
@pytest.mark.parametrize("x, y, options, error, word", [
    (X[:, :3], Y[:, :3], {}, ValueError, "3"),
    (X[:, :0], Y[:, :0], {"debiased": False}, ValueError, "0"),
    (X[0, 0], Y[0, 0], {}, ValueError, ""),
    (X, Y[:, :9], {}, ValueError, "9"),
    (X, Y[:1], {}, ValueError, ""),
    (X.double(), Y.double(), {}, TypeError, "float64"),
    (X.long(), Y.long(), {}, TypeError, "int64"),
    (X, Y.half(), {}, TypeError, "float16"),
    ([1.0], Y, {}, TypeError, ""),
    (X, None, {}, TypeError, ""),
    (X, Y.to("meta"), {}, ValueError, "meta"),
    (X, Y, {"rank": 0}, ValueError, "rank"),
    (X, Y, {"rank": -2}, ValueError, "rank"),
    (X, Y, {"rank": 7}, ValueError, "rank"),
    (X, Y, {"rank": 2.5}, TypeError, "rank"),
    (X, Y, {"rank": "all"}, TypeError, "rank"),
])  # fmt: skip
def test_bad_features_are_refused_by_name(function, x, y, options, error, word):
    with pytest.raises(error, match=word):
        function(x, y, **options)
