"""The update quantity against the difference of copies in float64, for every kind of optimizer."""

import copy

import pytest
import torch
from helpers.by_hand import HandParameters, measured, stack_of_linears, sums_of, values_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from inflection_fast.quantities import quantity as q
from inflection_fast.quantities.update import Update

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd, decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, maximize=True),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3, dampening=0.2),
    "sgd, nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.3, foreach=False),
    "adam, amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.02), amsgrad=True, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, fused=True, maximize=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.5}, {"params": p[1:], "weight_decay": 0.0}], lr=0.01, weight_decay=0.1
    ),
}


def step_measured(quantity, model, blocks, optimizer, between=lambda: None):
    """One step of training: the columns, and the truth."""
    model(torch.randn(5, 6, dtype=next(model.parameters()).dtype)).float().square().sum().backward()
    sums, update = sums_of(quantity, len(blocks)), q.Update(HandParameters(blocks), ())
    with torch.no_grad():
        quantity.before_update(sums, update)
    before = copy.deepcopy(model)
    optimizer.step()
    between()
    optimizer.zero_grad()
    with torch.no_grad():
        quantity.after_update(sums, update)
    norms, changes = [], []
    for old, new in zip(before, model, strict=True):
        pairs = [
            (a.double(), b.double()) for a, b in zip(old.parameters(), new.parameters(), strict=True) if b.requires_grad
        ]
        norms.append(sum([a.square().sum() for a, _ in pairs], torch.zeros(()).double()))
        changes.append(sum([(b - a).square().sum() for a, b in pairs], torch.zeros(()).double()))
    return values_of(quantity, sums), torch.stack(norms).sqrt(), (torch.stack(changes) / torch.stack(norms)).sqrt()


def prepared(model, blocks, **options):
    quantity = Update(**options)
    quantity.prepare(measured(model, blocks))
    return quantity


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ratios_equal_the_difference_of_copies(name):
    model, blocks = stack_of_linears()
    model.double()
    optimizer, quantity = OPTIMIZERS[name](list(model.parameters())), prepared(model, blocks)
    for _ in range(3):
        found, norms, ratios = step_measured(quantity, model, blocks, optimizer)
        torch.testing.assert_close(torch.tensor(found.weight_norm), norms, rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.tensor(found.update_ratio), ratios, rtol=1e-6, atol=0)
        assert (ratios > 1e-4).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "adafactor"])
def test_in_float32_and_with_a_scheduler_behind_the_step(name):
    model, blocks = stack_of_linears()
    optimizer, quantity = OPTIMIZERS[name](list(model.parameters())), prepared(model, blocks)
    for _ in range(2):
        found, _, ratios = step_measured(
            quantity, model, blocks, optimizer, lambda: optimizer.param_groups[0].update(lr=1e-9)
        )
        optimizer.param_groups[0]["lr"] = 0.02
        torch.testing.assert_close(torch.tensor(found.update_ratio), ratios, rtol=1e-4, atol=0)


def test_updates_that_16_bit_weights_round_away_are_not_there():
    model, blocks = stack_of_linears()
    model.bfloat16()
    optimizer, quantity = torch.optim.AdamW(model.parameters(), lr=1e-6), prepared(model, blocks)
    found, _, ratios = step_measured(quantity, model, blocks, optimizer)
    torch.testing.assert_close(torch.tensor(found.update_ratio), ratios, rtol=1e-6, atol=0)
    assert (ratios < 1e-6).all()


def test_weights_beyond_the_bound_are_thinned_out_and_estimated():
    model, blocks = stack_of_linears(width=64)
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    quantity = prepared(model, blocks, copy_bytes=1000)
    copied = []
    model(torch.randn(5, 64).bfloat16()).float().square().sum().backward()
    sums, update = sums_of(quantity, 2), q.Update(HandParameters(blocks), ())
    quantity.before_update(sums, update)
    changes = quantity._changes
    handle = register_optimizer_step_pre_hook(lambda *_: copied.append(sum(c.nbytes for c in changes._copies.values())))
    before = copy.deepcopy(model)
    optimizer.step()
    handle.remove()
    quantity.after_update(sums, update)
    squares = [
        (a.double() - b.double()).square().sum() for a, b in zip(before.parameters(), model.parameters(), strict=True)
    ]
    truth = torch.stack([squares[0] + squares[1], squares[2] + squares[3]])
    assert 0 < copied[0] < 1100
    torch.testing.assert_close(sums["changes"], truth, rtol=0.5, atol=0)


def test_frozen_blocks_skipped_steps_and_hooks_that_go():
    from torch.optim.optimizer import _global_optimizer_post_hooks as post
    from torch.optim.optimizer import _global_optimizer_pre_hooks as pre

    model, blocks = stack_of_linears(3)
    model[1].requires_grad_(False)
    optimizer, quantity = torch.optim.Adam(model.parameters(), lr=0.01), prepared(model, blocks)
    found, _, ratios = step_measured(quantity, model, blocks, optimizer)
    assert found.weight_norm[1] != found.weight_norm[1] and found.update_ratio[1] != found.update_ratio[1]
    torch.testing.assert_close(torch.tensor(found.update_ratio)[[0, 2]], ratios[[0, 2]], rtol=1e-4, atol=0)
    assert not post and not pre
    sums, update = sums_of(quantity, 3), q.Update(HandParameters(blocks), ())
    quantity.before_update(sums, update)
    assert post and pre
    quantity.after_update(sums, update)  # nothing has stepped
    found = values_of(quantity, sums)
    assert found.weight_norm[0] > 0 and found.update_ratio[0] != found.update_ratio[0] and not post and not pre


@pytest.mark.parametrize("bad, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bound_that_is_none_is_refused(bad, error):
    with pytest.raises(error, match="copy_bytes"):
        Update(copy_bytes=bad)
