"""Which rows CKA compares: tokens or pooled sequences without their padding, and a reproducible part of them."""

import pytest
import torch

from inflection_fast.ops import RowSample, feature_rows


@pytest.fixture
def padded():
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    output = torch.randn(4, 4, 3)
    output[~tokens] = torch.nan  # must not be read
    return output, tokens


def test_tokens_without_padding_and_whose_they_are(padded):
    rows, sequences = feature_rows(*padded)
    assert torch.equal(rows, torch.cat([padded[0][0, :3], padded[0][1, 1:], padded[0][3, 1:2]]))
    assert sequences.tolist() == [0, 0, 0, 1, 1, 1, 3]


@pytest.mark.parametrize("pooling, pool", [
    ("mean", lambda rows: rows.mean(0)), ("first", lambda rows: rows[0]), ("last", lambda rows: rows[-1]),
])  # fmt: skip
def test_one_row_of_each_sequence_that_has_tokens(padded, pooling, pool):
    rows, sequences = feature_rows(*padded, pooling)
    assert sequences.tolist() == [0, 1, 3]
    exact = torch.stack([pool(padded[0][s][padded[1][s]]) for s in sequences])
    torch.testing.assert_close(rows, exact)


def test_without_a_mask_every_position_counts():
    output = torch.randn(2, 3, 5)
    rows, sequences = feature_rows(output)
    assert torch.equal(rows, output.flatten(0, 1)) and sequences.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(feature_rows(output, None, "last")[0], output[:, -1])


@pytest.mark.parametrize("call, kind, words", [
    (lambda: feature_rows(torch.zeros(2, 3)), ValueError, r"output: expected \[B, T, D\], got shape \[2, 3\]"),
    (lambda: feature_rows(torch.zeros(2, 3, 4), torch.ones(2, 3)), TypeError, "tokens: expected dtype bool"),
    (lambda: feature_rows(torch.zeros(2, 3, 4), torch.ones(2, 4).bool()), ValueError, r"tokens: expected shape \[2, 3"),
    (lambda: feature_rows(torch.zeros(2, 3, 4), None, "max"), ValueError, "pooling: expected one of"),
    (lambda: RowSample(0, 1), ValueError, "budget: expected at least 1, got 0"),
])  # fmt: skip
def test_what_does_not_fit_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def kept(sample, counts):
    taken, out = 0, []
    for batch, count in enumerate(counts):
        keep = sample.keep(batch, count, taken)
        out.append(list(range(count)) if keep is None else keep.tolist())
        taken += len(out[-1])
    return out


@pytest.mark.parametrize("counts, total", [([10, 10, 10], 21), ([1, 40, 3], 14), ([50, 50, 50], 21), ([2, 2, 2], 6)])
def test_the_budget_is_shared_among_the_batches_and_never_exceeded(counts, total):
    found = kept(RowSample(21, len(counts)), counts)
    assert sum(map(len, found)) == total
    for rows, count in zip(found, counts, strict=True):
        assert rows == sorted(set(rows)) and all(0 <= row < count for row in rows)


def test_the_same_rows_every_time_and_others_for_another_seed():
    counts = [30, 30]
    first, again, other = (kept(RowSample(20, 2, seed), counts) for seed in (3, 3, 4))
    assert first == again != other
    sample = RowSample(20, 2, 3)
    assert kept(sample, counts) == kept(sample, counts) == first
