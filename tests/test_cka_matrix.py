"""CKA of all pairs of layers: by tiles it is the definition, in part or in batches what each is said to be."""

import pytest
import torch
from cases import extra_bytes

from inflection_fast import cka_matrix, linear_cka
from inflection_fast.ops import checks, reference
from inflection_fast.ops.cka.matrix import bytes_needed, neighbours

ERROR = 1e-6
BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(9)


def features(layers=3, rows=300, dim=17, offset=0.0, common=None):
    """Layers that share what `common` [rows, 5] holds, the later ones more of it."""
    common = torch.randn(rows, 5) if common is None else common
    mixed = [common @ torch.randn(5, dim) * (i + 1) / layers + torch.randn(rows, dim) for i in range(layers)]
    return torch.stack(mixed) + offset * torch.randn(dim)


def truth(x, y=None, **options):
    x, y = x.double(), (x if y is None else y).double()
    return torch.stack([torch.stack([reference.linear_cka(a, b, **options) for b in y]) for a in x])


def minibatch_truth(x, y, size):
    """Nguyen et al. (2021) with HSIC_1 from its definition over one batch at a time, float64."""

    def hsic(k, m):
        k, m = (g - torch.diag(g.diagonal()) for g in (k, m))
        n = len(k)
        one = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return one / (n * (n - 3))

    def added(a, b):
        return sum(hsic(p @ p.T, q @ q.T) for p, q in zip(a.double().split(size), b.double().split(size), strict=True))

    return torch.stack([torch.stack([added(a, b) / (added(a, a) * added(b, b)).sqrt() for b in y]) for a in x])


@BOTH
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("tile", [4, 64, 256, 1000])
def test_any_tile_at_any_offset_within_a_model(tile, offset, debiased):
    x = features(rows=70 if tile == 4 else 300, offset=offset)
    got = cka_matrix(x, tile=tile, debiased=debiased)
    exact = truth(x, debiased=debiased)
    assert got.dtype == torch.float32 and exact.min() < 0.5 < exact[0, -1] + 0.5
    assert (got - exact).abs().max() <= ERROR
    assert torch.equal(got, got.mT) or (got - got.mT).abs().max() <= 1e-7


@BOTH
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_two_models_of_different_width_and_depth(offset, debiased):
    common = torch.randn(600, 5)
    x, y = features(3, 600, 17, offset, common), features(2, 600, 40, -offset, common)
    got = cka_matrix(x, y, tile=50, debiased=debiased)
    assert got.shape == (3, 2)
    assert (got - truth(x, y, debiased=debiased)).abs().max() <= ERROR


def test_the_same_layers_on_both_sides_are_the_diagonal_of_pairs():
    common = torch.randn(300, 5)
    x, y = features(common=common), features(common=common)
    pairs = linear_cka(x, y)
    torch.testing.assert_close(cka_matrix(x, y).diagonal(), pairs, rtol=0, atol=ERROR)
    torch.testing.assert_close(cka_matrix(x).diagonal(), torch.ones(3), rtol=0, atol=ERROR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_rows_of_any_strides(dtype):
    x = features(offset=10.0).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    assert (cka_matrix(x, tile=70) - truth(x)).abs().max() <= ERROR


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("size", [50, 51], ids=["even", "odd"])
def test_minibatches_are_hsic_1_of_each_batch_at_any_offset(size, offset):
    common = torch.randn(310, 5)
    x, y = features(3, 310, 17, offset, common), features(2, 310, 25, -offset, common)  # 10 or 4 rows are left at last
    u, v = (side.double() - side.double().mean(1, keepdim=True) for side in (x, y))
    exact = minibatch_truth(u, v, size)
    assert (cka_matrix(x, y, method="minibatch", tile=size) - exact).abs().max() <= ERROR
    assert (cka_matrix(x, method="minibatch", tile=size) - minibatch_truth(u, u, size)).abs().max() <= ERROR
    assert (exact - truth(x, y)).abs().max() > 1e-3


def test_minibatches_are_those_of_pytorch_cka_where_rows_are_centred():
    hsic = pytest.importorskip("cka.hsic", reason="pytorch-cka is not installed")
    x = features(rows=310)
    x = x - x.mean(1, keepdim=True)
    theirs = sum(hsic.hsic_cross(*[batch @ batch.mT] * 2) for batch in x.split(50, 1))
    theirs = theirs / torch.outer(theirs.diagonal(), theirs.diagonal()).sqrt()
    assert (cka_matrix(x, method="minibatch", tile=50) - theirs).abs().max() <= ERROR


def test_a_band_is_between_minibatch_and_exact_on_texts():
    texts = torch.arange(400) // 20  # rows of one text follow each other
    common = 2 * torch.randn(20, 5)[texts] + 0.2 * torch.randn(400, 5)
    x = features(3, 400, 17, 50.0, common)
    exact = truth(x)
    off = ~torch.eye(3, dtype=torch.bool)
    batches = (cka_matrix(x, method="minibatch", tile=20) - exact)[off].abs()
    drawn = torch.stack([cka_matrix(x, method="banded", tile=20, band=2, seed=s) for s in range(30)])
    assert batches.min() > 0.1
    assert (drawn.mean(0) - exact)[off].abs().max() < 0.03  # right on average over orders
    spread = [torch.stack([cka_matrix(x, method="banded", tile=20, band=band, seed=s) for s in range(8)]).std(0)[off]
              for band in (0, 2, 8)]  # fmt: skip
    assert spread[0].mean() > spread[1].mean() > spread[2].mean() > 0
    assert (cka_matrix(x, method="banded", tile=20, band=10) - exact).abs().max() <= ERROR  # all of the ring


@BOTH
@pytest.mark.parametrize("tile", [50, 64], ids=["even ring", "odd ring"])
def test_a_band_around_the_whole_ring_is_exact(tile, debiased):
    x = features()
    assert (cka_matrix(x, method="banded", tile=tile, band=99, debiased=debiased) - truth(x, debiased=debiased)).abs(
    ).max() <= ERROR  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("band", [0, 1, 2, 3, 9])
def test_each_pair_on_the_ring_occurs_once(count, band):
    pairs = [frozenset((i, j)) for i in range(count) for j in neighbours(i, count, band)]
    near = {frozenset((i, (i + d) % count)) for i in range(count) for d in range(1, min(band, count - 1) + 1)}
    assert len(pairs) == len(set(pairs)) and set(pairs) == near - {frozenset((i,)) for i in range(count)}


def test_the_same_seed_gives_the_same_band_and_another_another():
    x = features()
    draw = [cka_matrix(x, method="banded", tile=30, band=1, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("method", ["exact", "banded", "minibatch"])
def test_constant_and_broken_layers_are_nan_alone(method):
    x = features(layers=4, offset=100.0)
    x[1], x[2, 5, 3] = 7.3, torch.nan
    got = cka_matrix(x, method=method, tile=60)
    broken = torch.tensor([False, True, True, False])
    assert torch.equal(got.isnan(), broken[:, None] | broken)


@pytest.mark.parametrize("method", ["exact", "banded", "minibatch"])
def test_constant_layers_are_nan_whatever_the_constant(method):
    x = (10 * torch.randn(40, 1, 5)).repeat(1, 122, 1)  # a float32 mean of equal numbers is not quite that number
    assert cka_matrix(x, method=method, tile=61).isnan().all()


@pytest.mark.parametrize("two", [False, True], ids=["one model", "two"])
def test_millions_of_products_add_up_no_rounding(two):
    signs = torch.randn(2048, 1).sign() * torch.where(torch.arange(2048)[:, None] % 64 == 0, 8.0, 1.0)
    flipped = torch.where(torch.rand(2048, 1) < 0.3, -signs, signs) + 0.2 * torch.randn(
        2048, 1
    )  # few sizes of products
    x = torch.stack([signs, flipped])
    got = cka_matrix(x, x.flip(0) if two else None, tile=2048)  # 2^22 of them at a time
    assert (got - truth(x, x.flip(0) if two else x)).abs().max() <= 1e-7


@pytest.mark.parametrize("method", ["exact", "banded", "minibatch"])
def test_layers_with_equal_features_are_1_and_not_missing(method):
    x = features(layers=4, offset=1000.0)
    x[2] = x[0]
    got = cka_matrix(x, method=method, tile=60)
    assert (got[0, 2] - 1).abs() <= ERROR and not got.isnan().any()
    assert (got[0] - got[2]).abs().max() <= ERROR  # alike to every other layer too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["exact", "banded", "minibatch"])
def test_the_memory_is_what_was_said_and_no_buffer_grows_with_the_square_of_the_rows(method, dtype):
    x = torch.randn(4, 3000, 80).to(dtype)
    for sides in ([x], [x[:2], x[2:]]):
        need = bytes_needed(sides, method, 300)
        peak = extra_bytes(lambda sides=sides: cka_matrix(*sides, method=method, tile=300))
        assert 0.5 * need < peak <= need < 4 * 3000**2


@pytest.mark.parametrize("method", ["exact", "banded", "minibatch"])
def test_a_matrix_that_would_not_fit_is_refused(method, monkeypatch):
    x = features()
    need = bytes_needed([x], method, 100)
    monkeypatch.setattr(checks, "memory_bytes", lambda device: need)
    cka_matrix(x, method=method, tile=100)
    monkeypatch.setattr(checks, "memory_bytes", lambda device: need - 1)
    with pytest.raises(ValueError, match=f"tile: {method} CKA by 100 rows would take {need} bytes, cpu has {need - 1}"):
        cka_matrix(x, method=method, tile=100)


X = torch.randn(2, 20, 6)


@pytest.mark.parametrize("call, kind, words", [
    (lambda: cka_matrix(X[0]), ValueError, r"x: expected features \[L, N, D\], got shape \[20, 6\]"),
    (lambda: cka_matrix(X, X[:, :19]), ValueError, "y: expected 20 rows as x has, got 19"),
    (lambda: cka_matrix(X, X.bfloat16()), TypeError, "y: expected dtype torch.float32 as x has"),
    (lambda: cka_matrix(X.double()), TypeError, "x: expected dtype"),
    (lambda: cka_matrix(X[:, :3]), ValueError, "x: expected at least 4 rows, got 3"),
    (lambda: cka_matrix(X, method="some"), ValueError, "method: expected one of"),
    (lambda: cka_matrix(X, tile=3), ValueError, "tile: expected at least 4, got 3"),
    (lambda: cka_matrix(X, band=-1), ValueError, "band: expected at least 0, got -1"),
    (lambda: cka_matrix(X, method="minibatch", tile=9), ValueError, "tile: 20 rows leave a last minibatch of 2"),
    (lambda: cka_matrix(X, method="minibatch", debiased=False), ValueError, "debiased: minibatches are debiased"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
