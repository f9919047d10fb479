"""linear_cka and delta_cka against their twins in float64, at every instruction set that this CPU has."""

import pytest
import torch

from inflection_fast import (
    CkaState,
    activation_moments,
    attention_column_mass,
    cka_jackknife,
    cka_matrix,
    delta_cka,
    linear_cka,
    sum_of_squares,
)
from inflection_fast.ops import reference

pytestmark = pytest.mark.kernel

ERROR = 1e-6  # promised at every mean offset up to 1000 standard deviations
BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def features(*shape, wider=0, noise=1.0, offset=0.0, dtype=torch.float32):
    """Both sides of a change, with a spectrum that falls, offset by another vector on either side."""
    spectrum = torch.linspace(2, 0.1, shape[-1])
    x = torch.randn(shape) * spectrum
    y = torch.cat([x, torch.randn(*shape[:-1], wider)], -1)
    y = y + noise * torch.randn(y.shape) * torch.linspace(2, 0.1, y.shape[-1])
    return (x + offset * torch.randn(x.shape[-1])).to(dtype), (y - offset * torch.randn(y.shape[-1])).to(dtype)


def error(got, x, y, **options):
    truth = reference.linear_cka(x.double(), y.double(), **options)
    assert got.dtype == torch.float32 and got.shape == truth.shape
    assert torch.equal(got.isnan(), truth.isnan())
    return ((got - truth) / truth.abs().clamp(min=1)).nan_to_num().abs().max().item()


SHAPES = [(4, 1), (5, 3), (33, 1), (31, 127), (40, 513), (257, 97), (3, 700, 20), (2, 3, 64, 65), (1, 300, 768)]


@pytest.mark.emulated
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_is_the_definition_in_float64(isa, shape, dtype, debiased, cka_limit):
    for offset in (0.0, 3.0):
        x, y = features(*shape, wider=shape[-1] // 2, offset=offset, dtype=dtype)
        assert error(linear_cka(x, y, debiased=debiased), x, y, debiased=debiased) <= cka_limit(dtype)


@BOTH
@pytest.mark.parametrize("offset", [1.0, 30.0, 1000.0])
def test_offsets_common_to_the_rows_cost_no_digits(isa, offset, debiased):
    for shape in ((9, 30), (600, 70)):
        x, y = features(2, *shape, offset=offset)
        assert error(linear_cka(x, y, debiased=debiased), x, y, debiased=debiased) <= ERROR


@pytest.mark.emulated
@BOTH
@pytest.mark.parametrize("length", [10.0, 100.0, 1000.0])
def test_rows_far_longer_than_the_others_cost_no_digits(isa, length, debiased):
    for n, d in ((24, 40), (300, 200)):
        x, y = features(4, n, d)
        x[0, 0] *= length  # of one side only
        x[1:, 0] *= length
        y[1:, 0] *= length  # of both
        x[2, 7] *= length / 3
        y[3, n // 2] *= length
        assert error(linear_cka(x, y, debiased=debiased), x, y, debiased=debiased) <= ERROR


@pytest.mark.emulated
@BOTH
@pytest.mark.parametrize("rows", [40, 256, 600])
def test_products_that_are_equal_do_not_all_round_the_same_way(isa, rows, debiased):
    # A feature of two values: its products are one number, and what adding it rounds off is the same in every row.
    size = 10 ** torch.linspace(-2, 2, 60)[:, None, None]
    x = torch.where(torch.rand(60, rows, 1) < 0.5, -size, size)
    y = torch.where(torch.rand(60, rows, 1) < 0.02, -x, x) * 0.37
    for dtype in (torch.float32, torch.float16):
        a, b = x.to(dtype), y.to(dtype)
        assert error(linear_cka(a, b, debiased=debiased), a, b, debiased=debiased) <= ERROR


@BOTH
@pytest.mark.parametrize("rows", [256, 600])
def test_one_feature_that_outweighs_all_others_costs_no_digits(isa, rows, debiased):
    x, y = features(60, rows, 30)
    for two_values in (False, True):
        x[..., 4] = 1e3 * torch.linspace(1, 2, 60)[:, None] * (x[..., 4].sign() if two_values else x[..., 4])
        y[..., 9] = x[..., 4] * torch.where(torch.rand(60, rows) < 0.02, -0.3, 0.3)
        assert error(linear_cka(x, y, debiased=debiased), x, y, debiased=debiased) <= ERROR


@BOTH
def test_few_rows_of_many_features_cost_no_digits(isa, debiased):
    for n in (4, 40, 100):
        x, y = features(n, 800)
        assert error(linear_cka(x, y, debiased=debiased), x, y, debiased=debiased) <= ERROR


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_any_stride_are_read_in_place(isa, dtype, debiased, cka_limit):
    x, y = features(6, 40, 24, dtype=dtype)
    wide = torch.cat([x, y], -1)
    for a, b in (
        (x.mT, y.mT),
        (x[..., ::3], y[:, :, ::3]),
        (wide[..., 1:23], wide[..., 24:]),
        (x.transpose(0, 1), y.transpose(0, 1)),
        (x.flip(1)[:, 5:], y.expand(2, 6, 40, 24)[1, :, 5:]),
        (x[:1].expand(4, 40, 24), y[2:]),
        (x.unflatten(0, (2, 3)).transpose(0, 1), y.unflatten(0, (2, 3)).transpose(0, 1)),
    ):
        assert error(linear_cka(a, b, debiased=debiased), a, b, debiased=debiased) <= cka_limit(dtype)


@BOTH
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_shared_basis_is_that_of_the_pooled_rows(rank, debiased):
    for offset in (0.0, 1000.0):
        x, y = features(2, 2, 90, 30, noise=0.3, offset=offset)
        options = {"rank": rank, "debiased": debiased}
        assert error(linear_cka(x, y, **options), x, y, **options) <= ERROR
    assert torch.allclose(linear_cka(x, y, rank=30, debiased=debiased), linear_cka(x, y, debiased=debiased), atol=2e-6)


@BOTH
@pytest.mark.parametrize("rank", [None, 5])
def test_delta_of_a_small_change(rank, debiased):
    x = features(500, 40)[0]
    y = x + 3e-3 * torch.randn_like(x)
    options = {"rank": rank, "debiased": debiased}
    exact = reference.delta_cka(x.double(), y.double(), **options)
    assert 1e-6 < exact < 1e-5
    assert delta_cka(x, y, **options).item() == pytest.approx(exact.item(), abs=2e-7)
    assert delta_cka(x, x, **options).abs() <= 1e-9


@BOTH
def test_rotation_scale_offset_order_and_sides_change_nothing(isa, debiased):
    x, y = features(200, 50)
    order, turn = torch.randperm(200), torch.linalg.qr(torch.randn(50, 50))[0]
    base = linear_cka(x, y, debiased=debiased)
    for a, b in ((x @ turn, y), (x, 1e4 * y), (1e-4 * x, y), (x + 5, y), (x[order], y[order]), (y, x)):
        assert (linear_cka(a, b, debiased=debiased) - base).abs() <= ERROR
    assert (linear_cka(x[order], y, debiased=debiased) - base).abs() > 0.1


def test_unrelated_features_lie_at_the_floor_biased_and_around_zero_debiased():
    x, y = torch.randn(2, 20, 256, 300)
    assert linear_cka(x, y, debiased=False).mean().item() == pytest.approx(300 / (256 + 300 + 1), abs=0.01)
    values = linear_cka(x, y)
    assert values.mean().abs() < 5e-3 and (values < 0).any()


@pytest.mark.emulated
@BOTH
def test_constant_and_broken_layers_are_nan_and_nothing_else_is(isa, debiased):
    for rank in (None, 2):
        x, y = features(6, 300, 8)
        x[1], y[2], x[3, 5], y[4, 290, 3] = 1000.1, torch.randn(8), torch.nan, torch.inf
        got = linear_cka(x, y, rank=rank, debiased=debiased)
        assert got.isnan().tolist() == [False, True, True, True, True, False]


def test_one_row_unlike_equal_others_is_no_debiased_layer():
    x, y = features(20, 6)
    x[:19] = x[0]
    assert linear_cka(x, y).isnan() and not linear_cka(x, y, debiased=False).isnan()


def test_rows_that_occur_many_times_move_the_debiased_value_towards_the_biased_one():
    x, y = features(30, 40)
    biased, apart = linear_cka(x, y, debiased=False), []
    for times in (1, 4, 16, 64):
        a, b = x.repeat(times, 1), y.repeat(times, 1)
        assert error(linear_cka(a, b), a, b) <= ERROR
        assert (linear_cka(a, b, debiased=False) - biased).abs() <= ERROR
        apart.append((linear_cka(a, b) - biased).abs().item())
    assert apart[0] > 3 * apart[1] > 9 * apart[2] > 27 * apart[3]


def test_threads_and_calls_do_not_change_a_bit():
    x, y = features(3, 500, 130)
    base, threads = linear_cka(x, y), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear_cka(x, y), base)
    finally:
        torch.set_num_threads(threads)


@BOTH
@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradients_are_those_of_the_twin_in_float64(offset, rank, debiased):
    x, y = features(2, 30, 9, offset=offset)
    weight = torch.tensor([1.0, -2.5])
    a, b = x.clone().requires_grad_(), y.mT.contiguous().mT.requires_grad_()
    got = torch.autograd.grad((delta_cka(a, b, rank=rank, debiased=debiased) * weight).sum(), [a, b])
    a, b = x.double().requires_grad_(), y.double().requires_grad_()
    exact = torch.autograd.grad((reference.delta_cka(a, b, rank=rank, debiased=debiased) * weight).sum(), [a, b])
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == torch.float32 and (g - e).abs().max() <= 1e-5 * e.abs().max()


def test_gradient_of_one_side_in_16_bits():
    x, y = features(40, 12, dtype=torch.bfloat16)
    y = y.requires_grad_()
    (got,) = torch.autograd.grad(linear_cka(x, y), y)
    z = y.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_cka(x.double(), z), z)
    assert got.dtype == torch.bfloat16 and (got - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: sum_of_squares([torch.zeros(2), x], [0, 0]),
        lambda x: activation_moments(torch.zeros(9, 4), x).sums,
        lambda x: attention_column_mass(x[None, None], torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 9)).mass,
        lambda x: cka_matrix(x[None]),
        lambda x: cka_jackknife(torch.randn(9, 4), x, torch.arange(9)).value,
        lambda x: CkaState(1, 4).update(x[None], x[None]),
    ],
)
def test_forward_mode_is_refused_by_what_has_no_derivative_too(function):
    x = torch.randn(9, 4)
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives are not implemented; pass x.detach\(\)"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_forward_mode_is_refused_with_what_to_do():
    x = torch.randn(9, 4)
    for function in (lambda x: linear_cka(x, x.detach()), lambda x: delta_cka(x.detach(), x, rank=2)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("rank", [None, 3])
def test_second_derivatives_are_refused(rank):
    x, y = features(20, 6)
    x.requires_grad_()
    (first,) = torch.autograd.grad(linear_cka(x, y, rank=rank), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        first.sum().backward()


def test_opcheck():
    x, y = (t.requires_grad_() for t in features(2, 20, 6))
    a, b = x.detach(), y.detach()
    ops, check = torch.ops.inflection_fast, torch.library.opcheck
    gram, shift = torch.zeros(2, 120).double(), torch.zeros(2, 12)
    for mask, adopt in ((None, True), (torch.rand(2, 20) < 0.5, False)):
        check(ops.cka_push, (gram, shift, a, b, mask, adopt))
    ops.cka_push(gram, shift, a, b, None, True)
    for debiased in (True, False):
        check(ops.cka_terms, (x, y[..., :4], debiased))
        check(ops.cka_terms_backward, (torch.randn(2, 3).double(), a, b, debiased))
        check(ops.cka_gram_terms, (gram, 6, 6, debiased))
    check(ops.cka_scatter, (x, y))
    check(ops.cka_scatter_backward, (torch.randn(2, 6, 6).double(), a, b))


@pytest.mark.parametrize("rank", [None, 3])
def test_compiled_in_one_graph_with_its_gradient(rank):
    def loss(x, y):
        return (delta_cka(x, y, rank=rank) * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (20, 33):
        x, y = (t.requires_grad_() for t in features(2, n, 6))
        expected, got = loss(x, y), compiled(x, y)
        assert torch.allclose(got, expected, rtol=0, atol=ERROR)
        for g, e in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(expected, [x, y]), strict=True):
            assert torch.allclose(g, e, rtol=1e-4, atol=1e-6)


X, Y = torch.zeros(2, 10, 6), torch.zeros(2, 10, 6)


@pytest.mark.parametrize("x, y, options, kind, words", [
    (X[:, :3], Y[:, :3], {}, ValueError, "x: debiased CKA needs at least 4 rows, got 3"),
    (X[:, :1], Y[:, :1], {"debiased": False}, ValueError, "x: biased CKA needs at least 2 rows, got 1"),
    (X, Y[:, :9], {}, ValueError, r"y: expected shape \[2, 10, D\]"),
    (X[0, 0], Y, {}, ValueError, r"x: expected features \[..., N, D\]"),
    (X[..., :0], Y, {}, ValueError, "x: expected features of at least one dimension"),
    (X.double(), Y, {}, TypeError, "x: expected dtype float32, bfloat16 or float16, got torch.float64"),
    (X, Y.half(), {}, TypeError, "y: expected dtype torch.float32 as x has, got torch.float16"),
    (X, Y.to("meta"), {}, ValueError, "y: is on meta"),
    (X, "y", {}, TypeError, "y: expected a tensor, got str"),
    (X, Y, {"rank": 7}, ValueError, "rank: expected 1 to 6, got 7"),
    (X, Y, {"rank": True}, TypeError, "rank: expected an int, got bool"),
    (X, Y[..., :4], {"rank": 2}, ValueError, "rank: a shared basis needs both sides of the same width"),
    (X, Y, {"debiased": 1}, TypeError, "debiased: expected a bool, got int"),
])  # fmt: skip
def test_wrong_arguments_are_named(x, y, options, kind, words):
    with pytest.raises(kind, match=words):
        linear_cka(x, y, **options)


def test_delta_names_its_own_arguments_and_needs_one_width():
    with pytest.raises(ValueError, match="after: expected 6 features as before has, got 4"):
        delta_cka(X, Y[..., :4])
    with pytest.raises(TypeError, match="before: expected dtype"):
        delta_cka(X.int(), Y)


def test_no_layers_give_no_values():
    for options in ({}, {"rank": 2}):
        assert linear_cka(X[:0], Y[:0], **options).shape == (0,)


def test_feature_maps_are_refused_or_named():
    maps = torch.randn(6, 3, 7, 7)
    with pytest.raises(
        ValueError, match=r"x: expected features \[..., N, D\], got \[6, 3, 7, 7\]; .* by x.flatten\(1\)"
    ):
        linear_cka(maps, maps)
    with pytest.raises(ValueError, match="before: expected features"):
        delta_cka(maps, maps)
    with pytest.warns(UserWarning, match="is read as 6 x 3 layers of 5 samples with 7 features"):
        assert linear_cka(maps[:, :, :5], maps[:, :, :5]).shape == (6, 3)
    assert linear_cka(maps.flatten(1), maps.flatten(1)) == 1
