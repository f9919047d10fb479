"""activation_moments: against float64, and by what sums over rows must do."""

import pytest
import torch

from inflection_fast import activation_moments
from inflection_fast.ops import MOMENT_SUMS, reference

pytestmark = [pytest.mark.kernel, pytest.mark.emulated, pytest.mark.sanitized]

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (1, 1), (3, 5), (2, 7, 33), (3, 70, 256), (2, 2, 3, 129), (9000, 5)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(shape, dtype=torch.float32, other=None):
    x = torch.randn(shape) + 0.3
    return (x + 0.5 * torch.randn(shape) + torch.randn(shape[-1])).to(dtype), x.to(other or dtype)


def check(output, input=None, mask=None):
    ours = activation_moments(output, input, mask=mask)
    truth = reference.activation_moments(output, input, mask=mask)
    assert ours.sums.dtype == torch.float64 and ours.largest.dtype == torch.float32
    # Relative to what is added up: sums of odd powers cancel.
    y = output.double()[torch.ones(output.shape[:-1], dtype=torch.bool) & (True if mask is None else mask)]
    scale = dict.fromkeys(MOMENT_SUMS, 0.0) | {"first": y.abs().sum().item(), "third": y.abs().pow(3).sum().item()}
    scale["cosine"] = float(y.shape[0]) if y.ndim > 1 else 1.0
    for name, a, b in zip(MOMENT_SUMS, ours.sums.tolist(), truth.sums.tolist(), strict=True):
        assert (a != a and b != b) or a == b or abs(a - b) <= 1e-12 * max(abs(b), scale[name]), (name, a, b)
    assert torch.equal(ours.largest.isnan(), truth.largest.isnan())
    assert ours.largest.isnan() or ours.largest == truth.largest
    return dict(zip(MOMENT_SUMS, ours.sums.tolist(), strict=True)), ours.largest.item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_equal_the_truth(isa, dtype, shape):
    output, input = pair(shape, dtype)
    sums, _ = check(output, input)
    assert sums["ratio"] > 0 and sums["fourth"] > sums["second"] * 0.1
    check(output)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_and_output_may_differ_in_dtype(isa, dtype, other):
    check(*pair((2, 9, 67), dtype, other))


def test_layouts_of_all_kinds(isa):
    y, x = pair((6, 20, 32))
    check(y.transpose(0, 1), x.transpose(0, 1))
    check(y.mT, x.mT)
    check(y[::2, 1::3, ::5], x[::2, 1::3, ::5])
    check(y[:, :1].expand(6, 9, 32), x[:, :9])
    check(y.flatten()[3 : 3 + 600].view(20, 30), x.flatten()[1:601].view(20, 30))
    check(y.half().flatten()[3 : 3 + 600].view(20, 30), x.flatten()[1:601].view(20, 30))


@pytest.mark.parametrize("mask", [(4, 30), (1, 30), (4, 1), (30,), (1,)], ids=str)
def test_rows_that_do_not_count_leave_no_trace(isa, mask):
    y, x = pair((4, 30, 40))
    mask = torch.rand(mask) > 0.4
    hidden = ~mask.expand(4, 30)
    clean = check(y, x, mask)
    y[hidden], x[hidden] = NAN, INF
    assert check(y, x, mask) == clean
    assert clean[0]["rows"] == (~hidden).sum() and clean[0]["elements"] == 40 * clean[0]["rows"]


def test_no_rows_at_all(isa):
    for y in (torch.zeros(0, 5), torch.zeros(3, 0), torch.ones(2, 3)):
        mask = torch.zeros(y.shape[0], dtype=torch.bool) if y.numel() else None
        ours = activation_moments(y, y, mask=mask)
        assert not ours.sums[1:].any() and ours.largest == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e25, 1e37], ids=str)
def test_norms_are_right_wherever_float32_holds_the_numbers(isa, scale):
    y, x = ((t / t.abs().max()) * scale for t in pair((5, 300)))
    sums, largest = check(y, x)
    assert 0 < sums["second"] < INF and 0 < sums["fourth"] < INF and largest == torch.tensor(scale)
    assert 0.1 < sums["ratio"] / 5 < 10 and 0.5 < sums["cosine"] / 5 < 1


def planted(dim, values, median=0.1):
    y = torch.full((dim,), median) * torch.where(torch.arange(dim) % 2 == 0, 1.0, -1.0)
    y[torch.randperm(dim)[: len(values)]] = torch.tensor(values)
    return y


@pytest.mark.parametrize("dim", [7, 64, 1001, 4096])
def test_massive_activations_are_those_of_the_definition(isa, dim):
    rows = torch.stack([
        planted(dim, [150.0, -101.0, 99.9]),  # two: the third is not above 100
        planted(dim, [150.0, -500.0], median=0.2),  # one: 1000 medians are 200
        planted(dim, [99.0], median=0.001),  # below 100, though 99,000 medians
        planted(dim, [100.0], median=0.001),  # 100 is not above 100
        planted(dim, [1e30, -INF], median=0.0),
        torch.full((dim,), 1e9),  # large, but so is the median
    ])  # fmt: skip
    sums, _ = check(rows)
    assert sums["massive"] == 2 + 1 + 0 + 0 + 2 + 0
    for row, expected in zip(rows, (2, 1, 0, 0, 2, 0), strict=True):
        assert activation_moments(row[None]).sums[6] == expected


def test_massive_at_exactly_a_thousand_medians(isa):
    y = torch.full((1, 9), 0.125)
    y[0, 4], y[0, 5] = 125.0, torch.nextafter(torch.tensor(125.0), torch.tensor(0.0))
    assert check(y)[0]["massive"] == 1


def test_massive_activations_of_random_rows(isa):
    y = torch.randn(200, 65).exp() * 10 ** torch.linspace(-3, 4, 200)[:, None] * torch.randn(200, 65).mul(4).exp()
    sums, _ = check(y)
    assert 20 < sums["massive"] < 4000
    check(y.bfloat16())


def test_rows_of_zeros_have_neither_ratio_nor_cosine(isa):
    y, x = pair((4, 16))
    x[0], y[1] = 0.0, 0.0
    sums, _ = check(y, x)
    assert (sums["rows"], sums["ratio_rows"], sums["cosine_rows"]) == (4, 3, 2)
    assert sums["ratio"] < INF and abs(sums["cosine"]) <= 2


def test_poison_shows(isa):
    y, x = pair((5, 40))
    bad = y.clone()
    bad[2, 7] = NAN
    sums, largest = check(bad, x)
    assert largest != largest and all(sums[k] != sums[k] for k in ("first", "fourth", "massive", "ratio", "cosine"))
    assert sums["input"] == sums["input"]
    bad[2, 7] = -INF
    sums, largest = check(bad, x)
    assert largest == INF and sums["second"] == INF and sums["first"] == -INF
    x[1, 1] = NAN
    sums, largest = check(y, x)
    assert largest == y.abs().max() and sums["ratio"] != sums["ratio"] and sums["second"] == sums["second"]


def test_a_block_that_does_nothing_and_one_that_turns_round(isa):
    _, x = pair((30, 64))
    sums, _ = check(x, x)
    assert sums["ratio"] == 0 and abs(sums["cosine"] - 30) < 1e-12
    sums, _ = check(-x, x)
    assert abs(sums["ratio"] - 60) < 1e-12 and abs(sums["cosine"] + 30) < 1e-12


def test_sums_of_parts_add_up(isa):
    y, x = pair((100, 48))
    whole, parts = (
        activation_moments(y, x),
        [activation_moments(*part) for part in zip(y.split(7), x.split(7), strict=True)],
    )
    torch.testing.assert_close(whole.sums, sum(part.sums for part in parts), rtol=1e-12, atol=1e-12)
    assert whole.largest == max(part.largest for part in parts)


def test_threads_change_no_bit(isa):
    y, x = pair((20_000, 33))
    threads = torch.get_num_threads()
    once = activation_moments(y, x)
    try:
        torch.set_num_threads(3)
        again = activation_moments(y, x)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_inputs_that_require_grad_are_read_as_values():
    y, x = (t.requires_grad_() for t in pair((3, 8)))
    assert not any(t.requires_grad for t in activation_moments(y, x))


def test_compiled_in_one_graph_gives_the_same_numbers():
    compiled = torch.compile(lambda y, x: activation_moments(y, x).sums, fullgraph=True, backend="aot_eager")
    for rows in (5, 11):
        y, x = pair((rows, 24))
        assert torch.equal(compiled(y, x), activation_moments(y, x).sums)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])], ids=["all", "masked"])
def test_opcheck(mask):
    y, x = pair((2, 3, 8), torch.bfloat16)
    torch.library.opcheck(torch.ops.inflection_fast.activation_moments, (y, x, mask))
    torch.library.opcheck(torch.ops.inflection_fast.activation_moments, (y, None, mask))


Y = torch.zeros(2, 5, 8)
BAD = {
    "output: expected a tensor": (TypeError, ([1.0],), {}),
    "output: expected dtype": (TypeError, (Y.double(),), {}),
    "output: expected \\[..., features\\]": (ValueError, (torch.tensor(1.0),), {}),
    "input: expected dtype": (TypeError, (Y, Y.long()), {}),
    "input: expected the shape of output": (ValueError, (Y, Y[:1]), {}),
    "input: is on meta": (ValueError, (Y, Y.to("meta")), {}),
    "mask: expected dtype bool": (TypeError, (Y,), {"mask": torch.ones(2, 5)}),
    "mask: shape \\[2\\] does not broadcast": (ValueError, (Y,), {"mask": torch.ones(2, dtype=torch.bool)}),
    "mask: shape \\[1, 2, 5\\] does not": (ValueError, (Y,), {"mask": torch.ones(1, 2, 5, dtype=torch.bool)}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_name_of_the_argument(message):
    error, arguments, options = BAD[message]
    with pytest.raises(error, match=message):
        activation_moments(*arguments, **options)
