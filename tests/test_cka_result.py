"""The standard error of CKA: the jackknife over sequences is what leaving them out one by one gives."""

import math

import pytest
import torch
from cases import extra_bytes

from inflection_fast import CkaResult, CkaState, cka_jackknife, linear_cka
from inflection_fast.ops import checks, reference
from inflection_fast.ops.cka.jackknife import bytes_needed

BOTH = pytest.mark.parametrize("debiased", [True, False], ids=["debiased", "biased"])
LENGTHS = [7, 1, 30, 12, 12, 5, 18, 2, 25, 9, 40, 3]  # of the sequences


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def texts(layers=2, dim=9, dim_y=13, offset=0.0, lengths=LENGTHS):
    """Rows of a sequence share a topic. Features of both sides, and which sequence a row is of."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    topics = torch.randn(layers, len(lengths), dim)[:, ids]
    x = topics + torch.randn(layers, len(ids), dim)
    y = torch.nn.functional.pad(x, (0, dim_y - dim)) + torch.randn(layers, len(ids), dim_y)
    return x + offset * torch.randn(dim), y - offset * torch.randn(dim_y), ids


def exact_error(x, y, units, **options):
    """From the definition: the value again without each unit, float64."""
    names = units.unique()
    without = torch.stack(
        [reference.linear_cka(x[:, units != u].double(), y[:, units != u].double(), **options) for u in names]
    )
    m = len(names)
    return ((m - 1) / m * (without - without.mean(0)).square().sum(0)).sqrt()


@BOTH
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_each_sequence_left_out_in_turn(offset, debiased):
    x, y, ids = texts(offset=offset)
    got = cka_jackknife(x, y, ids, debiased=debiased)
    torch.testing.assert_close(got.value, linear_cka(x, y, debiased=debiased))
    truth = exact_error(x, y, ids, debiased=debiased)
    assert truth.min() > 0.01
    torch.testing.assert_close(got.standard_error.double(), truth, rtol=1e-4, atol=0)


@BOTH
def test_rows_of_a_sequence_may_stand_anywhere_under_any_number(debiased):
    x, y, ids = texts()
    order = torch.randperm(len(ids))
    a = cka_jackknife(x, y, ids, debiased=debiased).standard_error
    b = cka_jackknife(x[:, order], y[:, order], 1000 - 7 * ids[order], debiased=debiased).standard_error
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_more_sequences_than_are_multiplied_at_a_time(monkeypatch):
    x, y, ids = texts()
    whole = cka_jackknife(x, y, ids).standard_error
    monkeypatch.setattr("inflection_fast.ops.cka.jackknife.PADDED_ROWS", 20)
    torch.testing.assert_close(cka_jackknife(x, y, ids).standard_error, whole)


def test_one_row_a_sequence_is_the_jackknife_over_rows():
    x, y, _ = texts()
    ids = torch.arange(x.shape[1])
    torch.testing.assert_close(
        cka_jackknife(x, y, ids).standard_error.double(), exact_error(x, y, ids), rtol=1e-4, atol=0
    )
    tokens, sequences = cka_jackknife(x, y, ids).standard_error, cka_jackknife(x, y, texts()[2]).standard_error
    assert (sequences > 1.3 * tokens).all()  # which is why tokens are the wrong unit


@BOTH
def test_in_a_basis_which_stays_that_of_all_rows(debiased):
    x, y, ids = texts(dim=12, dim_y=12)
    got = cka_jackknife(x, y, ids, rank=4, debiased=debiased)
    pooled = torch.cat([x, y], 1).double()
    pooled = pooled - pooled.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(pooled.mT @ pooled)
    u, v = x.double() @ vectors[..., -4:], y.double() @ vectors[..., -4:]
    torch.testing.assert_close(
        got.standard_error.double(), exact_error(u, v, ids, debiased=debiased), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(got.variance_kept, values[:, -4:].sum(1) / values.sum(1), rtol=1e-6, atol=0)
    assert got.rank == 4


@BOTH
@pytest.mark.parametrize("split", [[164], [64, 1, 0, 99], [1] * 164], ids=["at once", "ragged", "single rows"])
def test_groups_of_a_stream_left_out_in_turn(split, debiased):
    x, y, ids = texts(offset=100.0)
    state = CkaState(2, 9, 13, groups=5)
    for a, b, s in zip(x.split(split, 1), y.split(split, 1), ids.split(split), strict=True):
        state.push(a, b, sequences=s)
    got = state.result(debiased=debiased)
    torch.testing.assert_close(got.value, linear_cka(x, y, debiased=debiased), rtol=0, atol=1e-6)
    truth = exact_error(x, y, ids % 5, debiased=debiased)
    torch.testing.assert_close(got.standard_error.double(), truth, rtol=1e-4, atol=0)
    assert got.units == 5 and got.sequences == len(LENGTHS) and got.rows.tolist() == [164, 164]


def test_pushes_take_turns_where_no_sequences_are_named():
    x, y, _ = texts()
    state = CkaState(2, 9, 13, groups=3)
    for a, b in zip(x.split(30, 1), y.split(30, 1), strict=True):
        state.push(a, b)
    got = state.result()
    truth = exact_error(x, y, torch.arange(x.shape[1]) // 30 % 3)
    torch.testing.assert_close(got.standard_error.double(), truth, rtol=1e-4, atol=0)
    assert got.units == 3 and got.sequences.isnan()


def test_groups_in_a_basis_of_all_rows():
    x, y, ids = texts(dim=12, dim_y=12)
    state = CkaState(2, 12, groups=4)
    state.push(x, y, sequences=ids)
    got = state.result(rank=3, debiased=False)
    torch.testing.assert_close(got.value, linear_cka(x, y, rank=3, debiased=False), rtol=0, atol=1e-6)
    whole = cka_jackknife(x, y, ids % 4, rank=3, debiased=False)
    torch.testing.assert_close(got.standard_error, whole.standard_error, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.variance_kept, whole.variance_kept, rtol=1e-6, atol=0)


def test_masked_rows_begin_no_sequence_and_are_not_read():
    x, y, ids = texts()
    mask = torch.rand(len(ids)) < 0.7
    mask[ids == 4] = False
    x[:, ~mask] = torch.nan
    state = CkaState(2, 9, 13, groups=5)
    for part in torch.arange(len(ids)).split(11):
        state.push(x[:, part], y[:, part], mask[part], ids[part])
    got = state.result()
    assert got.sequences == len(ids[mask].unique()) < len(LENGTHS)
    truth = exact_error(x[:, mask], y[:, mask], ids[mask] % 5)
    torch.testing.assert_close(got.standard_error.double(), truth, rtol=1e-4, atol=0)


def test_groups_merge_whatever_the_shifts():
    x, y, ids = texts(offset=50.0)
    parts = [slice(0, 62), slice(62, 164)]  # between two sequences
    states = [CkaState(2, 9, 13, groups=5) for _ in parts]
    for state, part in zip(states, parts, strict=True):
        state.push(x[:, part], y[:, part], sequences=ids[part])
    states[0].merge(states[1])
    got = states[0].result()
    torch.testing.assert_close(got.standard_error.double(), exact_error(x, y, ids % 5), rtol=1e-4, atol=0)
    assert got.sequences == len(LENGTHS)
    with pytest.raises(ValueError, match="other: expected 5 groups, got None"):
        states[0].merge(CkaState(2, 9, 13))


def test_the_error_covers_what_other_sequences_would_have_given():
    # 200 draws of 24 sequences: the spread of the values is what the jackknife of one draw estimates.
    values, errors = [], []
    for _ in range(200):
        x, y, ids = texts(layers=1, dim=4, dim_y=4, lengths=[6] * 24)
        got = cka_jackknife(x, y, ids)
        values.append(got.value)
        errors.append(got.standard_error)
    spread, typical = torch.cat(values).std(), torch.cat(errors).square().mean().sqrt()
    assert 0.8 < typical / spread < 1.25


def test_a_missing_value_says_why():
    x, y, ids = texts(layers=5)
    x[1], y[2], x[3, 7, 2] = 3.0, -1.0, torch.nan
    y[4, 100, 0] = torch.inf
    state = CkaState(5, 9, 13)
    state.push(x, y)
    for got in (state.result(), state.result(debiased=False), cka_jackknife(x, y, ids)):
        assert got.value.isnan().tolist() == [False, True, True, True, True]
        assert sorted(got.reasons) == [1, 2, 3, 4]
        assert got.reasons[1].startswith("x is constant") and got.reasons[2].startswith("y is constant")
        assert got.reasons[3] == "x has NaN or infinite features"
        assert got.reasons[4] == "y has NaN or infinite features"
    few = CkaState(5, 9, 13)
    few.push(x[:, :3], y[:, :3])
    assert set(few.result().reasons.values()) == {"too few rows"}


def test_a_result_reads_well():
    x, y, ids = texts(layers=3, dim=12, dim_y=12)
    y[1] = 1.0
    told = repr(cka_jackknife(x, y, ids, rank=3)).splitlines()
    assert told[0] == "CkaResult(debiased CKA of 164 rows, 12 sequences, 12 left out in turn, rank 3)"
    assert "+-" in told[1] and "% of the variance" in told[1] and "y is constant" in told[2]
    state = CkaState(3, 12)
    state.push(x, y)
    got = state.result(debiased=False)
    assert repr(got).splitlines()[0] == "CkaResult(biased CKA of 164 rows, full space)"
    assert isinstance(got, CkaResult) and got.standard_error.isnan().all() and got.units == 0
    torch.testing.assert_close(got.delta, 1 - got.value, equal_nan=True)
    assert math.isclose(got.variance_kept.sum(), 3)


@pytest.mark.parametrize("call, kind, words", [
    (lambda x, y, s: cka_jackknife(x, y, s[:-1]), ValueError, r"sequences: expected shape \[164\], got \[163\]"),
    (lambda x, y, s: cka_jackknife(x, y, s.float()), TypeError, "sequences: expected dtype torch.int64"),
    (lambda x, y, s: cka_jackknife(x, y, s, rank=3), ValueError, "rank: a shared basis needs both sides of the same"),
    (lambda x, y, s: cka_jackknife(x[:, :3], y[:, :3], s[:3]), ValueError, "x: debiased CKA needs at least 4 rows"),
    (lambda x, y, s: CkaState(2, 9, 13).push(x, y, sequences=s), ValueError, "sequences: only for a state with groups"),
    (lambda x, y, s: CkaState(2, 9, groups=1), ValueError, "groups: expected at least 2, got 1"),
    (lambda x, y, s: CkaState(9, 10**4, groups=500), ValueError, r"take 7202\d+ bytes"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call(*texts())


def test_groups_take_the_memory_that_was_said():
    state = CkaState(2, 30, groups=4)
    held = state.gram.nbytes + state.shift.nbytes
    assert held == CkaState.bytes_needed(2, 30, groups=4)
    assert CkaState.bytes_needed(12, 768) < 150e6


def test_a_jackknife_that_would_not_fit_is_refused(monkeypatch):
    x, y, ids = texts()
    need = bytes_needed(164, 13, 40, None)
    monkeypatch.setattr(checks, "memory_bytes", lambda device: need)
    cka_jackknife(x, y, ids)
    monkeypatch.setattr(checks, "memory_bytes", lambda device: need - 1)
    with pytest.raises(ValueError, match=f"sequences: 164 rows, 40 of one, take {need} bytes, cpu has {need - 1}"):
        cka_jackknife(x, y, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 30])
@pytest.mark.parametrize("length", [1, 64, 2000])
def test_a_jackknife_takes_the_memory_that_it_says(length, rank, dtype):
    x, y = torch.randn(2, 1, 4000, 100).to(dtype)
    ids = torch.arange(4000) // length
    spent = extra_bytes(lambda: cka_jackknife(x, y, ids, rank=rank))
    need = bytes_needed(4000, 100, length, rank)
    assert 0.4 * need < spent <= need + 1e6  # beside numbers of the sequences


def test_one_pair_without_a_dimension_of_layers():
    x, y, ids = texts(dim=12, dim_y=12)
    whole, one = cka_jackknife(x, y, ids, rank=4), cka_jackknife(x[0], y[0], ids, rank=4)
    torch.testing.assert_close(one.standard_error, whole.standard_error[:1])
    assert one.value.shape == (1,)
