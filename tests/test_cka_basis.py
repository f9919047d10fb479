"""The shared basis: found from sums, frozen, and streams projected on it."""

import pytest
import torch

from inflection_fast import CkaBasis, CkaState
from inflection_fast.ops import reference
from inflection_fast.ops.cka import basis as cka_basis

pytestmark = pytest.mark.kernel

BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])
DIM = 60


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(6)


def features(layers=2, rows=500, dim=DIM, offset=0.0, fade=6.0):
    weights = torch.exp(-torch.arange(dim) / fade)
    x = torch.randn(layers, rows, dim) * weights
    y = (
        x @ torch.linalg.qr(torch.randn(dim, dim) + 2 * torch.eye(dim)).Q
        + 0.3 * torch.randn(layers, rows, dim) * weights
    )
    return x + offset * torch.randn(dim), y - offset * torch.randn(dim)


def pushed(x, y, split=None, **options):
    state = CkaState(x.shape[0], x.shape[-1], **options)
    for a, b in zip(x.split(split or x.shape[1], 1), y.split(split or x.shape[1], 1), strict=True):
        state.push(a, b)
    return state


def exact_scatter(x, y, mean_term=True):
    sides = [x.double(), y.double()]
    if not mean_term:
        sides = [side - side.mean(1, keepdim=True) for side in sides]
    rows = torch.cat(sides, 1)
    rows = rows - rows.mean(1, keepdim=True)
    return rows.mT @ rows


def same_space(a, b):
    return torch.linalg.svdvals(a.double().mT @ b.double()).min()


@pytest.mark.parametrize("mean_term", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_the_leading_directions_with_and_without_the_mean_term(offset, mean_term):
    x, y = features(offset=offset)
    got = pushed(x, y, 77).basis(rank=8, mean_term=mean_term)
    values, vectors = torch.linalg.eigh(exact_scatter(x, y, mean_term))
    assert same_space(got.vectors, vectors[..., -8:]) > 1 - 1e-6
    torch.testing.assert_close(got.variance_kept, values[:, -8:].sum(1) / values.sum(1), rtol=1e-6, atol=0)
    assert (got.residual < 1e-14).all()
    eye = torch.eye(8).expand(2, -1, -1)
    torch.testing.assert_close(got.vectors.mT @ got.vectors, eye, rtol=0, atol=1e-6)
    along = (got.vectors * (exact_scatter(x, y, mean_term) @ got.vectors.double())).sum(1)
    assert (along.diff(dim=1) < 0).all()  # the one of most variance first
    if offset and mean_term:
        assert same_space(got.vectors, torch.linalg.eigh(exact_scatter(x, y, False))[1][..., -8:]) < 0.9


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_as_many_directions_as_keep_a_share_of_the_variance(share):
    x, y = features()
    x[1], y[1] = x[1] / torch.exp(-torch.arange(DIM) / 6), y[1] / torch.exp(-torch.arange(DIM) / 6)  # needs more
    got = pushed(x, y).basis(variance=share)
    values = torch.linalg.eigvalsh(exact_scatter(x, y)).flip(-1)
    shares = values.cumsum(1) / values.sum(1, keepdim=True)
    assert (got.variance_kept >= share - 1e-9).all()
    assert got.rank == 1 or (shares[:, got.rank - 2] < share).any()


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_the_block_method_from_an_earlier_basis_is_eigh(rank):
    x, y = features(rows=900)
    before = pushed(x, y).basis(rank=rank)
    moved = pushed(x, y + 0.3 * features(rows=900)[0])
    got, exact = moved.basis(start=before), moved.basis(rank=rank)
    assert same_space(before.vectors, exact.vectors) < 1 - 1e-4  # it had somewhere to go
    assert same_space(got.vectors, exact.vectors) > 1 - 1e-6
    torch.testing.assert_close(got.variance_kept, exact.variance_kept, rtol=1e-9, atol=0)
    assert (got.residual < 1e-6).all() and got.rank == rank


def test_the_block_method_filters_a_slowly_falling_spectrum():
    x = features(layers=1, rows=900, dim=300, fade=150.0)[0]
    before = pushed(x, x).basis(rank=8)
    moved = pushed(x, x + 0.3 * features(layers=1, rows=900, dim=300, fade=150.0)[0])
    assert (moved.basis(start=before).residual < 3e-9).all()


def test_a_block_method_that_has_not_arrived_says_so(monkeypatch):
    x, y = features(fade=1e4)  # eigenvalues side by side
    start = CkaBasis(torch.linalg.qr(torch.randn(2, DIM, 6)).Q, torch.ones(2), torch.ones(2))
    monkeypatch.setattr("inflection_fast.ops.cka.basis.ROUNDS", 1)
    monkeypatch.setattr("inflection_fast.ops.cka.basis.DEGREE", 2)
    assert (pushed(x, y).basis(start=start).residual > 1e-3).all()


@BOTH
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("split", [None, 1, 37], ids=["at once", "single rows", "ragged"])
def test_a_frozen_basis_streams_the_value_in_it(split, offset, debiased):
    x, y = features(offset=offset)
    basis = pushed(x[:, :200], y[:, :200]).basis(rank=7)
    state = pushed(x, y, split, basis=basis)
    u, v = x.double() @ basis.vectors.double(), y.double() @ basis.vectors.double()
    truth = reference.linear_cka(u, v, debiased=debiased)
    assert (state.value(debiased=debiased) - truth).abs().max() <= 1e-6
    assert (truth - reference.linear_cka(x.double(), y.double(), debiased=debiased)).abs().max() > 1e-4


SHAPES = [(1, 1, 1, 1), (2, 9, 5, 3), (1, 300, 131, 17), (2, 257, 300, 40), (1, 4, 128, 128)]  # layers, N, D, k
PROJECTIONS = {"kernel": torch.ops.inflection_fast.cka_project, "torch": cka_basis.cka_project}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projected_rows_and_their_sums_are_those_of_float64(isa, shape, project, dtype):
    layers, rows, dim, rank = shape
    shift = 1000 * torch.randn(layers, 2 * dim)
    near = shift.view(layers, 2, 1, dim)
    x, y = ((torch.randn(layers, rows, dim) + near[:, number]).to(dtype) for number in (0, 1))
    y = y.mT.contiguous().mT  # features that do not follow each other
    basis = torch.linalg.qr(torch.randn(layers, dim, dim)).Q[..., :rank]
    mask = torch.rand(layers, rows) < 0.8
    broken = x.masked_fill(~mask[..., None], torch.nan)  # rows that do not count are not read
    sums = torch.ones(layers, 2 * dim + 2, dtype=torch.float64)
    got = project(sums, broken, y, shift, basis, mask)
    u = torch.stack([x, y], 1).double() - near.double()
    u = u.masked_fill(~mask[:, None, :, None], 0.0)
    exact, scale = u @ basis.double()[:, None], u.norm(dim=-1).max()
    assert all(side.shape == (layers, rows, rank) and side.dtype == torch.float32 for side in got)
    assert (torch.stack(got, 1) - exact).abs().max() <= 1e-6 * scale
    truth = torch.cat([u.sum(2).flatten(1), u.square().sum((2, 3))], 1) + 1
    torch.testing.assert_close(sums, truth, rtol=1e-5, atol=1e-5 * scale)


def test_opcheck_of_the_projection():
    x, y = features(rows=20)
    basis, shift = torch.randn(2, DIM, 4), torch.randn(2, 2 * DIM)
    sums = torch.zeros(2, 2 * DIM + 2, dtype=torch.float64)
    for mask in (None, torch.rand(2, 20) < 0.5):
        torch.library.opcheck(torch.ops.inflection_fast.cka_project, (sums, x, y, shift, basis, mask))


def test_a_full_basis_is_no_basis():
    x, y = features(offset=30.0)
    plain = pushed(x, y)
    torch.testing.assert_close(pushed(x, y, basis=plain.basis(rank=DIM)).value(), plain.value(), rtol=0, atol=1e-6)
    frozen = pushed(x, y, basis=plain.basis(rank=9)).value(debiased=False)
    torch.testing.assert_close(frozen, plain.value(rank=9, debiased=False), rtol=0, atol=1e-6)


def test_sixteen_bit_rows_are_projected_in_float32():
    x, y = (side.bfloat16() for side in features(offset=10.0))
    basis = pushed(x, y).basis(rank=7)
    u, v = x.double() @ basis.vectors.double(), y.double() @ basis.vectors.double()
    assert (pushed(x, y, 99, basis=basis).value() - reference.linear_cka(u, v)).abs().max() <= 1e-6


def test_the_variance_kept_is_that_of_the_stream_and_falls_when_it_leaves_the_basis():
    x, y = features(offset=5.0)
    basis = pushed(x, y).basis(rank=7)
    got = pushed(x, y, 37, basis=basis).result()
    torch.testing.assert_close(got.variance_kept, basis.variance_kept, rtol=1e-5, atol=0)
    assert got.rank == 7 and got.rows.tolist() == [500, 500]
    away = pushed(x.flip(-1), y.flip(-1), 37, basis=basis).result()
    along = basis.vectors.double()
    scatter = exact_scatter(x.flip(-1), y.flip(-1))
    exact = ((scatter @ along) * along).sum((1, 2)) / scatter.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(away.variance_kept, exact, rtol=1e-4, atol=0)
    assert (exact < 0.5 * basis.variance_kept).all()


@pytest.mark.emulated
def test_masked_rows_are_not_read():
    x, y = features()
    basis, mask = pushed(x, y).basis(rank=7), torch.rand(2, 500) < 0.6
    mask[1, :300] = False
    exact = [pushed(x[i : i + 1, mask[i]], y[i : i + 1, mask[i]], basis=only(basis, i)).result() for i in (0, 1)]
    x[~mask], y[~mask] = torch.nan, torch.inf
    state = CkaState(2, DIM, basis=basis)
    for rows in (slice(0, 250), slice(250, 500)):
        state.push(x[:, rows], y[:, rows], mask[:, rows])
    got = state.result()
    torch.testing.assert_close(got.value, torch.cat([one.value for one in exact]), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.variance_kept, torch.cat([one.variance_kept for one in exact]), rtol=1e-4, atol=0)


def only(basis, layer):
    part = slice(layer, layer + 1)
    return CkaBasis(basis.vectors[part], basis.variance_kept[part], basis.residual[part])


def test_projected_states_merge_whatever_the_shifts():
    x, y = features(offset=100.0)
    x = x + torch.linspace(0, 20, 500)[:, None]  # shifts far from each other and from the means
    basis = pushed(x, y).basis(rank=7)
    whole = pushed(x, y, basis=basis).result()
    parts = [pushed(x[:, rows], y[:, rows], 9, basis=basis) for rows in (slice(0, 90), slice(90, 500))]
    assert not torch.equal(parts[0].shift, parts[1].shift)
    parts[0].merge(parts[1])
    got = parts[0].result()
    torch.testing.assert_close(got.value, whole.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.variance_kept, whole.variance_kept, rtol=1e-5, atol=0)
    other = pushed(x, y).basis(rank=7, mean_term=False)
    with pytest.raises(ValueError, match="other: expected the same basis"):
        parts[0].merge(CkaState(2, DIM, basis=other))
    with pytest.raises(ValueError, match="other: expected the same basis"):
        parts[0].merge(CkaState(2, DIM))


def test_a_projected_state_is_small_and_says_so():
    basis = CkaBasis(torch.linalg.qr(torch.randn(2, 700, 8)).Q, torch.ones(2), torch.zeros(2))
    state = CkaState(2, 700, basis=basis)
    held = state._sums.nbytes + state.shift.nbytes
    assert held == CkaState.bytes_needed(2, 700, rank=8) < CkaState.bytes_needed(2, 700) / 100
    assert repr(basis) == "CkaBasis(2 layers, rank 8 of 700)"


BASIS = CkaBasis(torch.eye(DIM)[:, :5].expand(2, -1, -1).contiguous(), torch.ones(2), torch.zeros(2))


@pytest.mark.parametrize("call, kind, words", [
    (lambda s: s.basis(), ValueError, "rank, variance, start: expected exactly one"),
    (lambda s: s.basis(rank=3, variance=0.9), ValueError, "rank, variance, start: expected exactly one"),
    (lambda s: s.basis(rank=61), ValueError, "rank: expected 1 to 60, got 61"),
    (lambda s: s.basis(variance=1.5), ValueError, "variance: expected a share above 0 and up to 1, got 1.5"),
    (lambda s: s.basis(start=torch.eye(3)), TypeError, "basis: expected a CkaBasis, got Tensor"),
    (lambda s: s.basis(start=CkaBasis(torch.zeros(2, 60, 21), None, None)), ValueError, "start: expected a rank of at"),
    (lambda s: CkaState(3, DIM, basis=BASIS), ValueError, "basis: expected one for 3 layers of 60, got 2 of 60"),
    (lambda s: CkaState(2, DIM, 7, basis=BASIS), ValueError, "basis: a shared basis needs both sides of the same"),
    (lambda s: CkaState(2, DIM, basis=BASIS).basis(rank=2), ValueError, "basis: the rows of this state are already"),
    (lambda s: CkaState(2, DIM, basis=BASIS).value(rank=2), ValueError, "rank: the rows of this state are already"),
    (lambda s: CkaState(2, 5, 6).basis(rank=2), ValueError, "rank: a shared basis needs both sides of the same width"),
    (lambda s: CkaBasis(torch.zeros(2, 3), None, None), ValueError, r"vectors: expected float32 \[layers, D, k\]"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, kind, words):
    state = pushed(*features(rows=100))
    with pytest.raises(kind, match=words):
        call(state)
