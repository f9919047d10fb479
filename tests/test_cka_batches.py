"""Inner products of Gram matrices batch by batch: the kernel and torch's products are those of float64."""

import pytest
import torch
from cases import extra_bytes

from inflection_fast import cka_matrix
from inflection_fast.ops.cka import matrix
from inflection_fast.ops.cka.matrix import bytes_needed, debias

pytestmark = pytest.mark.kernel

ERROR = 1e-6
KINDS = {"kernel": torch.ops.inflection_fast.cka_batches, "torch": matrix.cka_batches}
EITHER = pytest.mark.parametrize("products", KINDS.values(), ids=KINDS)
SHAPES = [(1, 4, 1, 4), (2, 9, 5, 9), (3, 61, 17, 19), (5, 130, 128, 64), (4, 300, 131, 145), (13, 70, 40, 33)]
# layers, rows, features, rows of a batch: the last batch has at least 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def features(layers, rows, dim, common):
    """Layers that share what `common` [rows, 3] holds."""
    return torch.stack([common @ torch.randn(3, dim) + torch.randn(rows, dim) for _ in range(layers)])


def truth(x, y, tile):
    """The definition, float64: of rows less the mean of their batch."""
    grams = []
    for side in (x, y):
        batches = side.double().split(tile, 1)
        grams.append([u @ u.mT for u in (batch - batch.mean(1, keepdim=True) for batch in batches)])
        for gram in grams[-1]:
            gram.diagonal(dim1=1, dim2=2).zero_()
    cross = torch.stack([torch.einsum("iab,jab->ij", k, m) for k, m in zip(*grams, strict=True)])
    own = [torch.stack([gram.square().sum((1, 2)) for gram in side]) for side in grams]
    return cross, own, [torch.cat([gram.sum(2) for gram in side], 1) for side in grams]


def check(got, exact):
    """Relative to the size of what was multiplied."""
    (cross, own, sums), (cross_64, own_64, sums_64) = got, exact
    assert all(part.dtype == torch.float64 for part in got)
    scale = (own_64[0][:, :, None] * own_64[-1][:, None]).sqrt()
    assert cross.shape == cross_64.shape and ((cross - cross_64).abs() / scale).max() <= ERROR
    wide = torch.cat(own_64, 1)
    assert own.shape == wide.shape and ((own - wide).abs() / wide).max() <= ERROR
    wide = torch.cat(sums_64)
    assert sums.shape == wide.shape and ((sums - wide).abs() / wide.abs().amax(1, keepdim=True)).max() <= 10 * ERROR


def hsic(products, x, y, tile):
    """HSIC_1 of the first batch from what the operator gives: cross and both self terms."""
    cross, own, sums = (part[0] if i < 2 else part[:, :tile] for i, part in enumerate(products(x, y, tile)))
    layers = [len(x), len(y)]
    return debias(cross, own.split(layers), sums.split(layers))


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_batch_gives_what_float64_gives(isa, shape, dtype, products):
    layers, rows, dim, tile = shape
    common = torch.randn(rows, 3)
    x, y = features(layers, rows, dim, common).to(dtype), features(4, rows, dim + 3, common).to(dtype)
    y = y.mT.contiguous().mT  # features that do not follow each other
    cross, own, sums = truth(x, x, tile)
    check(products(x, None, tile), (cross, own[:1], sums[:1]))
    check(products(x, y, tile), truth(x, y, tile))


@EITHER
@pytest.mark.parametrize("offset", [1.0, 30.0, 1000.0])
def test_an_offset_of_the_rows_costs_no_digits(isa, offset, products):
    common = torch.randn(200, 3)
    x, y = features(3, 200, 150, common), features(2, 200, 70, common)
    x, y = x + offset * torch.randn(150), y - offset * torch.randn(70)
    got = hsic(products, x, y, 200)
    cross, own, sums = truth(x, y, 200)
    exact = debias(cross[0], [side[0] for side in own], sums)
    scale = torch.outer(exact[1], exact[2]).sqrt()
    assert ((got[0] - exact[0]).abs() / scale).max() <= ERROR
    assert all((a / b - 1).abs().max() <= ERROR for a, b in zip(got[1:], exact[1:], strict=True))


def test_a_row_a_hundred_times_as_long_costs_no_more_than_its_products(isa):
    x = torch.randn(4, 300, 768)
    y = x + torch.randn(4, 300, 768)
    x[:, 0] *= 100
    y[:, 0] *= 100
    got, (cross, own, sums) = hsic(KINDS["kernel"], x, y, 300), truth(x, y, 300)
    exact = debias(cross[0], [side[0] for side in own], sums)
    got, exact = (part[0] / torch.outer(part[1], part[2]).sqrt() for part in (got, exact))
    assert (got - exact).abs().max() <= 5e-6  # as torch's products take them, sums of rows cost 1e-5 to 4e-5


@EITHER
@pytest.mark.parametrize("length", [30.0, 1000.0])
@pytest.mark.parametrize("many", [1, 20])
def test_rows_far_longer_than_the_others_cost_no_digits(isa, many, length, products):
    x = torch.randn(3, 300, 200) + 5.0
    y = x + torch.randn(3, 300, 200)
    rows = torch.randperm(300)[:many]
    x[:, rows] *= length
    y[:, rows] = x[:, rows] + length * torch.randn(3, many, 200)
    got, (cross, own, sums) = hsic(products, x, y, 300), truth(x, y, 300)
    exact = debias(cross[0], [side[0] for side in own], sums)
    got, exact = (part[0] / torch.outer(part[1], part[2]).sqrt() for part in (got, exact))
    assert (got - exact).abs().max() <= ERROR


@EITHER
@pytest.mark.parametrize("rows", [4, 7, 64, 203])
def test_constant_columns_leave_nothing_whatever_the_constant(isa, rows, products):
    scales = torch.tensor([1e-3, 0.1, 3.0, 1e4])[:, None, None]
    x = (scales * torch.randn(4, 1, 150)).repeat(1, rows, 1)
    assert all(not part.any() for part in products(x, None, rows))


@EITHER
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_poisoned_row_spoils_its_layer_in_its_batch_only(isa, poison, products):
    x = features(5, 90, 20, torch.randn(90, 3))
    x[1, 35, 2] = poison  # of the second batch of three
    cross, own, _ = products(x, None, 30)
    spoilt = torch.zeros(3, 5, dtype=torch.bool)
    spoilt[1, 1] = True
    assert torch.equal(own.isnan(), spoilt)
    assert torch.equal(cross.isnan(), spoilt[:, :, None] | spoilt[:, None])


@EITHER
def test_two_valued_features_add_up_no_rounding(isa, products):
    signs = torch.randn(1024, 1).sign() * torch.where(torch.arange(1024)[:, None] % 64 == 0, 8.0, 1.0)
    flipped = torch.where(torch.rand(1024, 1) < 0.3, -signs, signs)  # few sizes of products
    x = torch.stack([signs, flipped])
    got, (cross, own, sums) = hsic(products, x, x, 1024), truth(x, x, 1024)
    exact = debias(cross[0], [side[0] for side in own], sums)
    assert ((got[0] - exact[0]).abs() / torch.outer(exact[1], exact[2]).sqrt()).max() <= ERROR


def test_threads_and_other_layers_change_nothing(isa):
    x = features(7, 1200, 300, torch.randn(1200, 3))  # long enough for threads to meet
    operator, threads = KINDS["kernel"], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = operator(x, None, 300)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, operator(x, None, 300), strict=True))
    finally:
        torch.set_num_threads(threads)
    cross, own, sums = operator(x[2:3], x[4:6], 300)
    assert torch.equal(cross[:, 0], one[0][:, 2, 4:6])
    assert torch.equal(own, one[1][:, [2, 4, 5]]) and torch.equal(sums, one[2][[2, 4, 5]])
    assert torch.equal(one[0], one[0].mT) and torch.equal(one[0].diagonal(dim1=1, dim2=2), one[1])


def test_opcheck():
    x, y = torch.randn(2, 20, 6), torch.randn(3, 20, 5)
    for other in (None, y):
        torch.library.opcheck(torch.ops.inflection_fast.cka_batches, (x, other, 8))


def test_torchs_products_take_the_memory_that_is_said_of_devices_without_the_kernel():
    x = torch.randn(4, 3000, 80)
    for sides in ([x], [x[:2], x[2:]]):
        need = bytes_needed([side.to("meta") for side in sides], "minibatch", 300)
        peak = extra_bytes(lambda sides=sides: matrix.cka_batches(sides[0], (*sides, None)[1], 300))
        assert 0.5 * need < peak <= need


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_takes_the_memory_that_is_said_for_any_number_of_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for layers, tile in ((1, 50), (6, 50), (6, 600), (3, 3000)):
            x = torch.randn(layers, 3000, 10)
            need = bytes_needed([x], "minibatch", tile)
            peak = extra_bytes(lambda x=x, tile=tile: cka_matrix(x, method="minibatch", tile=tile))
            assert 0.8 * need < peak <= need
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("call, words", [
    (lambda op: op(torch.randn(2, 20, 6).double(), None, 8), "x: dtype must be float32"),
    (lambda op: op(torch.randn(2, 20, 6), torch.randn(2, 19, 6), 8), "features .L, N, D. of as many rows"),
    (lambda op: op(torch.randn(20, 6), None, 8), "features .L, N, D. of as many rows"),
    (lambda op: op(torch.randn(2, 20, 6), None, 0), "a tile above 0"),
])  # fmt: skip
def test_what_the_kernel_cannot_read_is_refused(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(KINDS["kernel"])
