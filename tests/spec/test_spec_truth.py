"""The truths are tested too: against closed forms, and against each other."""

import math

import pytest
import torch
from truth import cka, hsic_1, logits_stats, qk_stats, zhai_lower_bound


def test_truth_of_a_uniform_row_is_log_n():
    got = logits_stats(torch.full((1, 7), 3.0))
    assert got["entropy"].item() == pytest.approx(math.log(7), abs=1e-14)
    assert got["collision"].item() == pytest.approx(1 / 7, abs=1e-15)
    assert got["lse"].item() == pytest.approx(3 + math.log(7), abs=1e-14)
    assert got["keys"].item() == 7


def test_truth_of_two_scores_is_the_binary_entropy():
    s = 1.7
    p = 1 / (1 + math.exp(-s))
    got = logits_stats(torch.tensor([[s, 0.0]], dtype=torch.float64))
    assert got["entropy"].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-14)
    assert got["sink"].item() == pytest.approx(p, abs=1e-14)


def test_truth_of_a_sink_obeys_the_chain_rule():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 9, 4)
    full, bare = qk_stats(q, k, sinks=torch.tensor([0.4, -1.0])), qk_stats(q, k)
    p = full["sink"]
    binary = -p * p.log() - (1 - p) * (1 - p).log()
    assert torch.allclose(full["entropy"], (1 - p) * bare["entropy"] + binary, atol=1e-12)


def test_truth_of_an_nan_an_infinity_and_no_key():
    x = torch.zeros(4, 3)
    x[0, 1], x[1, 2] = math.nan, math.inf
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False
    got = logits_stats(x, attn_mask=mask)
    assert got["entropy"].isnan().tolist() == [True, True, False, False]
    assert got["entropy"][2] == 0 and got["lse"][2] == -math.inf and got["keys"][2] == 0


def test_truth_of_hsic_is_unbiased_on_every_split_of_a_small_sample():
    # Its expectation for independent rows is zero: exact over all permutations of one side of four samples.
    import itertools

    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    values = [hsic_1(x @ x.T, y[list(p)] @ y[list(p)].T) for p in itertools.permutations(range(4))]
    assert abs(torch.stack(values).mean().item()) < 1e-12
    assert torch.stack(values).abs().max() > 1e-2


def test_truth_of_cka_of_a_rotated_and_scaled_copy_is_one():
    x = torch.randn(20, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    for debiased in (True, False):
        assert cka(x, 3.0 * x @ rotation + 5.0, debiased=debiased).item() == pytest.approx(1.0, abs=1e-12)
    assert cka(x, torch.randn(20, 6)).item() < 0.9


def test_zhai_bound_is_attained_by_one_high_score_among_equals():
    T, sigma = 9, 2.5
    row = torch.full((T,), -sigma / math.sqrt(T * (T - 1)), dtype=torch.float64)
    row[0] = sigma * math.sqrt((T - 1) / T)
    assert row.norm().item() == pytest.approx(sigma)
    assert logits_stats(row[None])["entropy"].item() == pytest.approx(zhai_lower_bound(sigma, T), abs=1e-12)
