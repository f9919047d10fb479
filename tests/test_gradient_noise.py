"""Gradient noise: by its formula, unbiased over many steps, and silent with one piece."""

import logging

import pytest
import torch
from helpers.by_hand import HandParameters, measured, stack_of_linears, sums_of, values_of

from inflection_fast.quantities import quantity as q
from inflection_fast.quantities.gradient_noise import GradientNoise


def run_step(quantity, blocks, pieces, batch=5):
    """`pieces` are lists of gradients, one per parameter; returns the sums of the step."""
    total = sums_of(quantity, len(blocks))
    parameters = HandParameters(blocks)
    for p in parameters.parameters:
        p.grad = torch.zeros_like(p)
    for index, gradients in enumerate(pieces):
        sums = sums_of(quantity, len(blocks))  # a piece has accumulators of its own
        quantity.on_model_output(sums, q.ModelOutput({"x": torch.zeros(batch, 6)}, None, None, None, None, None, index))
        for layer, p, g in zip(parameters.layers, parameters.parameters, gradients, strict=True):
            quantity.on_parameter_gradient(sums, q.ParameterGradient(layer, "w", p, g, index))
            p.grad += g
        for name, value in sums.items():
            total[name] += value
    quantity.on_backward_end(total, parameters)
    return total


def prepared(model, blocks):
    quantity = GradientNoise()
    quantity.prepare(measured(model, blocks))
    return quantity


def test_estimates_are_unbiased_over_steps():
    model, blocks = stack_of_linears()
    quantity, n, b = prepared(model, blocks), 4, 5
    truth = [torch.randn_like(p, dtype=torch.float64) for p in model.parameters()]
    noise = [0.5, 0.5, 2.0, 2.0]  # standard deviation of one sequence's gradient, of each parameter
    found = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        pieces = [
            [
                (g + s / b**0.5 * torch.randn(g.shape, generator=generator, dtype=torch.float64)) / n  # loss / n
                for g, s in zip(truth, noise, strict=True)
            ]
            for _ in range(n)
        ]
        pieces = [[g.float() for g in piece] for piece in pieces]
        found.append(values_of(quantity, run_step(quantity, blocks, pieces, b)))
    signal = torch.tensor([found_.gradient_signal for found_ in found]).mean(0)
    variance = torch.tensor([found_.gradient_variance for found_ in found]).mean(0)
    of_blocks = [sum(g.square().sum().item() for g in truth[i : i + 2]) for i in (0, 2)]
    sizes = [sum(g.numel() for g in truth[i : i + 2]) for i in (0, 2)]
    assert signal.tolist() == pytest.approx(of_blocks, rel=0.05)
    assert variance.tolist() == pytest.approx([0.25 * sizes[0], 4 * sizes[1]], rel=0.05)


def test_one_step_by_its_formula():
    model, blocks = stack_of_linears()
    quantity, n, b = prepared(model, blocks), 3, 5
    pieces = [[torch.randn_like(p) for p in model.parameters()] for _ in range(n)]
    found = values_of(quantity, run_step(quantity, blocks, pieces, b))
    for layer in range(2):
        flat = torch.stack(
            [torch.cat([g.flatten() for g in piece[2 * layer : 2 * layer + 2]]) for piece in pieces]
        ).double()
        x = flat * n
        big, small = x.mean(0).square().sum().item(), x.square().sum(1).mean().item()
        small_batch, big_batch = b, n * b  # McCandlish et al., appendix A.1
        signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        variance = (small - big) / (1 / small_batch - 1 / big_batch)
        assert found.gradient_signal[layer] == pytest.approx(signal, rel=1e-5)
        assert found.gradient_variance[layer] == pytest.approx(variance, rel=1e-5)
        assert found.gradient_snr[layer] == pytest.approx(signal / variance, rel=1e-5)
    total = found.gradient_variance.sum() / found.gradient_signal.sum()
    assert found.noise_scale == pytest.approx(total)


def test_equal_pieces_have_no_noise():
    model, blocks = stack_of_linears()
    quantity = prepared(model, blocks)
    piece = [torch.randn_like(p) for p in model.parameters()]
    found = values_of(quantity, run_step(quantity, blocks, [piece] * 4))
    assert abs(found.gradient_variance / found.gradient_signal).max() < 1e-5


def test_one_piece_has_no_values_and_says_why_once(caplog):
    model, blocks = stack_of_linears()
    quantity = prepared(model, blocks)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sums = run_step(quantity, blocks, [[torch.randn_like(p) for p in model.parameters()]])
            assert vars(values_of(quantity, sums)) == {}
    assert [r.message for r in caplog.records if "at least two micro-batches" in r.message] == [
        caplog.records[0].message
    ]
