"""Sigma reparametrisation: spectral norms, gradients, removal, merging, resuming."""

import copy

import helpers.tiny_models as tiny
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast.act import sigma_reparametrisation


def linears(model, layer):
    return {n: m for n, m in model.named_modules() if f"layers.{layer}." in n and type(m) is nn.Linear}


def test_weights_have_the_spectral_norm_gamma():
    model, batch = tiny.model_and_batch("llama")
    other = {name: m.weight.detach().clone() for name, m in linears(model, 0).items()}
    before = {name: m.weight.detach().clone() for name, m in linears(model, 1).items()}
    handle = sigma_reparametrisation(model, [1])
    for _ in range(20):
        handle.step()
    for name, module in linears(model, 1).items():
        norm = torch.linalg.matrix_norm(module.weight.double(), ord=2)
        torch.testing.assert_close(norm.float(), torch.ones(()), rtol=1e-4, atol=0)
        scale = torch.linalg.matrix_norm(before[name].double(), ord=2)
        torch.testing.assert_close(module.weight.double(), before[name].double() / scale, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(m.weight, other[name]) for name, m in linears(model, 0).items())
    assert len(handle.parameters) == 7 and torch.isfinite(model(**batch).loss)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    weight = block[0].weight.detach().clone().requires_grad_(True)
    x, target = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    from inflection_fast.act.sigma import _Sigma

    sigma = _Sigma(weight.detach(), False)
    gamma = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    truth = ((x @ (gamma * weight / torch.linalg.matrix_norm(weight, ord=2)).T - target) ** 2).sum()
    ours = ((x @ sigma(weight).T - target) ** 2).sum()
    expected = torch.autograd.grad(truth, [weight, gamma])
    got = torch.autograd.grad(ours, [weight, sigma.gamma])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def test_removal_is_exact_and_merging_keeps_the_outputs(tmp_path):
    model, batch = tiny.model_and_batch("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with sigma_reparametrisation(model, keep=True):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        handle = sigma_reparametrisation(model, [0, 2])
        changed = model(**batch).logits
        handle.merge()
        torch.testing.assert_close(model(**batch).logits, changed)
        assert list(model.state_dict()) == list(before)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(**batch).logits, changed)


def train(model, handle, batch, optimizer, steps):
    for _ in range(steps):
        tiny.loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(checkpointing):
    model, batch = tiny.model_and_batch("llama")
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = sigma_reparametrisation(model, [1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, handle, batch, optimizer, 2)
    saved, place = copy.deepcopy(model.state_dict()), handle.state_dict()
    train(model, handle, batch, optimizer, 2)
    again, _ = tiny.model_and_batch("llama")
    resumed = sigma_reparametrisation(again, [1])
    again.load_state_dict(saved)
    resumed.load_state_dict(place)
    train(again, resumed, batch, torch.optim.SGD(again.parameters(), lr=0.1), 2)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_bad_input_is_refused():
    model = tiny.llama()
    with pytest.raises(ValueError, match="iterations: expected an integer >= 1, got 0"):
        sigma_reparametrisation(model, iterations=0)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        sigma_reparametrisation(tiny.gpt2())
    with sigma_reparametrisation(model, 1), pytest.raises(ValueError, match=r"applied already to blocks \[1\]"):
        sigma_reparametrisation(model)
    linear = model.model.layers[0].mlp.up_proj
    nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match="up_proj is parametrised already"):
        sigma_reparametrisation(model, 0)
