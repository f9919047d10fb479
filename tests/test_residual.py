"""The residual quantity by hand: its sums through `values` against float64."""

import pytest
import torch
from helpers.by_hand import sums_of, values_of

from inflection_fast.quantities.quantity import BlockForward
from inflection_fast.quantities.residual import Residual


def forward(layer, output, input=None, tokens=None, micro_batch=0):
    return BlockForward(layer, input, output, tokens, None, micro_batch)


def test_values_over_two_micro_batches_equal_those_of_all_tokens():
    torch.manual_seed(0)
    quantity, x = Residual(), torch.randn(6, 9, 32) * 2 + 0.1
    y = x + 0.3 * torch.randn_like(x).pow(3)
    y[4, 2, 7] = 30_000.0
    tokens = torch.rand(6, 9) > 0.3
    tokens[4, 2] = True
    sums = sums_of(quantity, 3)
    for part in (slice(0, 2), slice(2, 6)):
        quantity.on_block(sums, forward(1, y[part], x[part], tokens[part]))
        quantity.on_block(sums, forward(2, y[part]))
    found = values_of(quantity, sums)
    a, b = x[tokens].double(), y[tokens].double()
    close = dict(rel=1e-12)
    assert found.residual_rms[1] == pytest.approx(b.square().mean().sqrt().item(), **close)
    assert found.residual_max[1] == 30_000.0
    centred = b - b.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean() ** 2
    assert found.residual_kurtosis[1] == pytest.approx(kurtosis.item(), rel=1e-9)
    assert found.massive_activations[1] == 1
    assert found.block_ratio[1] == pytest.approx(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item(), **close)
    cosine = torch.cosine_similarity(a, b, dim=-1).mean().item()
    assert found.block_cosine[1] == pytest.approx(cosine, **close)
    every = y.double()
    assert found.residual_rms[2] == pytest.approx(every.square().mean().sqrt().item(), **close)
    assert found.block_ratio[2] != found.block_ratio[2] and found.residual_rms[0] != found.residual_rms[0]


def test_normal_numbers_have_a_kurtosis_of_three_whatever_their_mean():
    torch.manual_seed(0)
    quantity, sums = Residual(), sums_of(Residual(), 2)
    y = torch.randn(50, 40, 64)
    quantity.on_block(sums, forward(0, y))
    quantity.on_block(sums, forward(1, y + 100.0))
    found = values_of(quantity, sums)
    assert found.residual_kurtosis[0] == pytest.approx(3, abs=0.05)
    assert found.residual_kurtosis[1] == pytest.approx(found.residual_kurtosis[0], rel=1e-5)


def test_a_block_that_changes_the_width_has_moments_and_no_ratio():
    quantity, sums = Residual(), sums_of(Residual(), 1)
    quantity.on_block(sums, forward(0, torch.randn(2, 3, 8), torch.randn(2, 3, 4)))
    found = values_of(quantity, sums)
    assert found.residual_rms[0] > 0 and found.block_ratio[0] != found.block_ratio[0]


def test_tokens_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match="where the tokens are"):
        tokens = torch.ones(3, 2, dtype=torch.bool)
        Residual().on_block(sums_of(Residual(), 1), forward(0, torch.randn(2, 3, 8), None, tokens))
