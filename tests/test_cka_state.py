"""CkaState: whatever the split, the order of merging and the shift, the value is that of all rows at once."""

import pytest
import torch

from inflection_fast import CkaState, linear_cka
from inflection_fast.ops import memory_bytes, reference

pytestmark = pytest.mark.kernel

ERROR = 1e-6
BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])
SPLITS = {
    "at once": [600],
    "single rows": [1] * 600,
    "one, then the rest": [1, 599],
    "ragged": [255, 1, 0, 300, 3, 41],
    "blocks": [256, 256, 88],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(4)


def features(layers=2, rows=600, dim=20, dim_y=33, offset=0.0, dtype=torch.float32):
    x = torch.randn(layers, rows, dim)
    y = torch.randn(layers, rows, dim_y)
    y[..., : min(dim, dim_y)] += x[..., : min(dim, dim_y)]
    return (x + offset * torch.randn(dim)).to(dtype), (y - offset * torch.randn(dim_y)).to(dtype)


def pushed(x, y, split, state=None):
    state = state or CkaState(x.shape[0], x.shape[-1], y.shape[-1])
    for a, b in zip(x.split(split, 1), y.split(split, 1), strict=True):
        state.push(a, b)
    return state


def error(got, x, y, **options):
    truth = reference.linear_cka(x.double(), y.double(), **options)
    assert got.dtype == torch.float32 and got.shape == truth.shape
    assert torch.equal(got.isnan(), truth.isnan())
    return (got - truth).nan_to_num().abs().max().item()


@BOTH
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_split_at_every_offset_gives_the_value_of_all_rows(isa, split, offset, debiased):
    x, y = features(offset=offset)
    state = pushed(x, y, split)
    assert error(state.value(debiased=debiased), x, y, debiased=debiased) <= ERROR
    assert torch.allclose(state.value(debiased=debiased), linear_cka(x, y, debiased=debiased), rtol=0, atol=ERROR)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_rows(isa, dtype, debiased, cka_limit):
    x, y = features(dtype=dtype, offset=10.0)
    assert error(pushed(x, y, [7, 500, 93]).value(debiased=debiased), x, y, debiased=debiased) <= cka_limit(dtype)


@BOTH
def test_rows_that_leave_the_shift_behind(debiased):
    x, y = features()
    drift = torch.linspace(0, 300, 600)[:, None]
    x, y = x + drift, y - drift * torch.linspace(-1, 1, 33)
    assert error(pushed(x, y, [20] * 30).value(debiased=debiased), x, y, debiased=debiased) <= ERROR


def test_tokens_of_one_text_make_a_mean_over_batches_wrong_and_leave_ours_exact():
    topic_x, topic_y = torch.randn(2, 1, 30, 1, 20)
    x, y = (t.expand(1, 30, 20, 20).reshape(1, 600, 20) + torch.randn(1, 600, 20) for t in (topic_x, topic_y))
    batches = torch.stack([linear_cka(a, b) for a, b in zip(x.split(40, 1), y.split(40, 1), strict=True)]).mean(0)
    assert (batches - reference.linear_cka(x.double(), y.double())).abs() > 0.1
    assert error(pushed(x, y, 40).value(), x, y) <= ERROR


@BOTH
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)], ids=str)
def test_merging_in_any_order_whatever_the_shifts(order, offset, debiased):
    x, y = features(offset=offset)
    cuts = [250, 1, 9, 340]
    parts = [pushed(a, b, a.shape[1]) for a, b in zip(x.split(cuts, 1), y.split(cuts, 1), strict=True)]
    assert not torch.equal(parts[0].shift, parts[1].shift)
    total, before = CkaState(2, 20, 33), parts[2].gram.clone()
    for i in order:
        total.merge(parts[i])
    total.merge(CkaState(2, 20, 33))
    assert error(total.value(debiased=debiased), x, y, debiased=debiased) <= ERROR
    assert torch.equal(parts[2].gram, before)
    total.push(x[:, :1], y[:, :1])
    assert total.gram[:, 0].tolist() == [601, 601]


@BOTH
def test_states_that_share_a_shift_add_by_their_gram(debiased):
    x, y = features(offset=50.0)
    first = pushed(x[:, :100], y[:, :100], 100)
    second, third = (pushed(x[:, a:b], y[:, a:b], 77, first.like()) for a, b in ((100, 400), (400, 600)))
    assert second.shift is first.shift is third.shift
    total = CkaState(2, 20, 33, shift=first.shift)
    total.gram += first.gram + second.gram + third.gram
    assert error(total.value(debiased=debiased), x, y, debiased=debiased) <= ERROR
    first.merge(second)
    first.merge(third)
    assert torch.allclose(first.value(debiased=debiased), total.value(debiased=debiased), rtol=0, atol=1e-7)


@pytest.mark.emulated
@pytest.mark.parametrize("per_layer", [True, False], ids=["[L, N]", "[N]"])
def test_masked_rows_are_not_read(isa, per_layer):
    x, y = features()
    mask = torch.rand(2, 600) < 0.6 if per_layer else (torch.rand(600) < 0.6)
    mask[..., :5] = False
    if per_layer:
        mask[1, :300] = False  # the first batch shows layer 1 nothing: its shift comes from the second
    keep = mask.expand(2, 600)
    exact = torch.stack([reference.linear_cka(x[i, keep[i]].double(), y[i, keep[i]].double()) for i in (0, 1)])
    x[~keep], y[~keep] = torch.nan, torch.inf
    state = CkaState(2, 20, 33)
    for start in (0, 300):
        rows = slice(start, start + 300)
        state.push(x[:, rows], y[:, rows], mask[..., rows])
    assert state.gram[:, 0].tolist() == keep.sum(1).tolist()
    assert (state.value() - exact).abs().max() <= ERROR


@pytest.mark.parametrize("rank", [1, 6, 20])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_basis_of_any_rank_is_chosen_afterwards(rank, offset):
    x, y = features(dim_y=20, offset=offset)
    x, y = x * torch.linspace(3, 0.3, 20), y * torch.linspace(3, 0.3, 20)
    got = pushed(x, y, [17, 583]).value(rank=rank, debiased=False)
    assert error(got, x, y, rank=rank, debiased=False) <= ERROR


@pytest.mark.emulated
@BOTH
def test_broken_and_constant_layers_are_nan_alone(debiased):
    x, y = features(layers=5, dim_y=20)
    x[1, 500, 3], y[2], x[3, :] = torch.nan, 7.3, x[3, 0]
    state = pushed(x, y, [1, 299, 300])
    assert state.value(debiased=debiased).isnan().tolist() == [False, True, True, True, False]
    if not debiased:
        assert state.value(rank=3, debiased=False).isnan().tolist() == [False, True, True, True, False]
    other = pushed(*features(layers=5, dim_y=20), 600)
    other.merge(state)
    assert other.value(debiased=debiased).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_too_few_rows_have_no_value(rows):
    x, y = features(rows=rows)
    state = pushed(x, y, [rows])
    assert state.value().isnan().all()
    assert state.value(debiased=False).isnan().all() == (rows < 2)


def test_a_push_keeps_no_graph_and_threads_change_no_bit():
    x, y = features(rows=400, dim=130)
    threads, grams = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state = pushed(x.requires_grad_(), y, [100, 300])
            assert not state.gram.requires_grad and not state.value().requires_grad
            grams.append(state.gram)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grams[0], grams[1]) and torch.equal(grams[0], grams[2])


STATE = {"layers": 2, "dim": 4}


@pytest.mark.parametrize("change, kind, words", [
    ({"layers": 0}, ValueError, "layers: expected at least 1, got 0"),
    ({"dim": 1.5}, TypeError, "dim: expected an int, got float"),
    ({"dim_y": 0}, ValueError, "dim_y: expected at least 1, got 0"),
    ({"dim": 10**7}, ValueError, r"dim: 2 layers of 10000000 and 10000000 take 3200001\d+ bytes"),
    ({"shift": [0.0]}, TypeError, "shift: expected a tensor, got list"),
    ({"shift": torch.zeros(2, 7)}, ValueError, r"shift: expected float32 \[2, 8\], got torch.float32 \[2, 7\]"),
    ({"shift": torch.zeros(2, 8, requires_grad=True)}, ValueError, "shift: expected a tensor that does not require"),
    ({"shift": torch.zeros(8, 2).mT}, ValueError, "shift: expected a contiguous tensor"),
])  # fmt: skip
def test_a_state_of_no_sense_is_refused(change, kind, words):
    with pytest.raises(kind, match=words):
        CkaState(**{**STATE, **change})


def test_a_state_takes_the_memory_that_it_says():
    state = CkaState(12, 768)
    held = state.gram.nbytes + state.shift.nbytes
    assert held < 150e6 and held // 12 == pytest.approx(4 * (768 + 768 + 3) ** 2, rel=2e-3)
    assert memory_bytes(torch.device("cpu")) > held


ROWS = torch.zeros(2, 5, 4)


@pytest.mark.parametrize("x, y, mask, kind, words", [
    (ROWS[..., :3], ROWS, None, ValueError, r"x: expected shape \[2, N, 4\], got \[2, 5, 3\]"),
    (ROWS[:1], ROWS[:1], None, ValueError, r"x: expected shape \[2, N, 4\], got \[1, 5, 4\]"),
    (ROWS, ROWS[:, :4], None, ValueError, r"y: expected shape \[2, 5, D\]"),
    (ROWS, ROWS.bfloat16(), None, TypeError, "y: expected dtype torch.float32 as x has"),
    (ROWS.double(), ROWS.double(), None, TypeError, "x: expected dtype"),
    (ROWS, ROWS, torch.ones(4, dtype=torch.bool), ValueError, r"mask: expected shape \[5\] or \[2, 5\], got \[4\]"),
    (ROWS, ROWS, torch.ones(5), TypeError, "mask: expected dtype bool"),
    (ROWS, ROWS, [True] * 5, TypeError, "mask: expected a tensor, got list"),
    (ROWS.to("meta"), ROWS.to("meta"), None, ValueError, "x: is on meta, but the state is on cpu"),
])  # fmt: skip
def test_a_bad_batch_is_named_and_changes_nothing(x, y, mask, kind, words):
    state = CkaState(**STATE)
    with pytest.raises(kind, match=words):
        state.push(x, y, mask)
    assert not state.gram.any()


def test_wrong_merges_and_values_are_named():
    state = CkaState(**STATE)
    with pytest.raises(TypeError, match="other: expected a CkaState, got int"):
        state.merge(3)
    with pytest.raises(ValueError, match=r"other: expected layers, dim and dim_y \(2, 4, 4\), got \(2, 4, 5\)"):
        state.merge(CkaState(2, 4, 5))
    with pytest.raises(ValueError, match="debiased: a streamed value in a basis"):
        state.value(rank=2)
    with pytest.raises(ValueError, match="rank: expected 1 to 4, got 5"):
        state.value(rank=5, debiased=False)
    with pytest.raises(ValueError, match="rank: a shared basis needs both sides of the same width"):
        CkaState(2, 4, 5).value(rank=2, debiased=False)
    with pytest.raises(TypeError, match="debiased: expected a bool"):
        state.value(debiased=None)


def test_earlier_names_are_the_same_methods():
    pairs = ("push", "update"), ("value", "compute"), ("merge", "merge_state"), ("agree", "sync_shift")
    assert all(getattr(CkaState, old) is getattr(CkaState, new) for old, new in pairs)


def test_a_state_that_was_reset_is_like_new():
    state, (x, y) = CkaState(2, 5, groups=2), torch.randn(2, 2, 30, 5)
    state.update(x * 7, y - 3, sequences=torch.arange(30))
    state.reset()
    assert not state.rows.any() and state.compute().isnan().all()
    state.update(x, y, sequences=torch.arange(30) // 3)
    assert state.result().sequences == 10
    assert (state.compute() - linear_cka(x, y)).abs().max() <= ERROR


def test_a_state_goes_on_in_memory_that_it_is_given():
    x, y = features()
    first = pushed(x[:, :200], y[:, :200], [200])
    second = CkaState(2, 20, 33, gram=first.gram)
    second.shift.copy_(first.shift)
    second.update(x[:, 200:], y[:, 200:])
    assert second.gram.data_ptr() == first.gram.data_ptr() and first.rows.tolist() == [600, 600]
    assert error(second.compute(), x, y) <= ERROR
    for options, words in (
        ({"gram": first.gram.float()}, r"gram: expected float64 \[2, 1596\], got torch.float32"),
        ({"gram": first.gram[:, ::2]}, "gram: expected float64"),
        ({"gram": first.gram, "groups": 3}, "gram: only a state without groups"),
    ):
        with pytest.raises(ValueError, match=words):
            CkaState(2, 20, 33, **options)
