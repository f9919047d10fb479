"""Gradients below the lowest block that trains, of some sequences alone: unbiased, and invisible to the training."""

import gc
import itertools
import logging
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from helpers.tiny_models import (  # noqa: F401
    HandWritten,
    bert,
    gpt2,
    loss_of,
    model_and_batch,
    one_thread,
    output_gradients,
    plain_text,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from inflection_fast import Monitor, MonitorConfig, find_blocks
from inflection_fast.measure.frozen import FrozenBlocks

SHARE = 0.7  # two of three sequences
SUBSETS = list(itertools.combinations(range(3), 2))
CASES = {"bert": bert, "bert with dropout": lambda: bert(0.2), "gpt2 with dropout": lambda: gpt2(0.2), "llama": None}


def shallow(name, trains=1):
    """A model of which the head and the uppermost blocks train, and a batch of three sequences."""
    torch.manual_seed(0)
    model, batch = model_and_batch(name.split()[0])
    if CASES.get(name) is not None:
        torch.manual_seed(0)
        model = CASES[name]().train()
    return only_top(model, trains), batch


def only_top(model, trains=1):
    blocks = find_blocks(model)
    for block in blocks[: len(blocks) - trains]:
        block.module.requires_grad_(False)
    for name, module in model.named_modules():
        if "embed" in name.lower() or name in ("transformer.wte", "transformer.wpe"):
            module.requires_grad_(False)
    return model


def config(share=SHARE):
    return MonitorConfig(every=1, quantities=("activation_grad",), frozen_share=share)


def measured(model, batch, share=SHARE, steps=1):
    with Monitor(model, config(share)) as monitor:
        for _ in range(steps):
            torch.manual_seed(3)  # of dropout
            loss_of(model(**batch)).backward()
            monitor.step()
    model.zero_grad()
    return monitor.timeline


@pytest.fixture
def choose(monkeypatch):
    def these(*sequences):
        monkeypatch.setattr(FrozenBlocks, "_choose", lambda self, batch: list(sequences))

    return these


@pytest.mark.parametrize("trains", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_squares_and_their_variance_are_unbiased(name, trains, choose):
    """Over all samples of two out of three sequences, estimates average to what they estimate."""
    model, batch = shallow(name, trains)
    exact = measured(model, batch, 1.0)
    assert (exact.activation_grad_se == 0).all()
    found = []
    for subset in SUBSETS:
        choose(*subset)
        timeline = measured(model, batch)
        found.append((timeline.activation_grad[0] ** 2, timeline.activation_grad_se[0]))
    squares, errors = map(np.stack, zip(*found, strict=True))  # [samples, L]
    np.testing.assert_allclose(squares.mean(0), exact.activation_grad[0] ** 2, rtol=1e-5)
    variances = (2 * errors * np.sqrt(squares)) ** 2
    np.testing.assert_allclose(variances.mean(0), squares.var(0), rtol=1e-4)
    below = 3 - max(trains, 1)
    assert (variances.mean(0)[:below] > 0).all() and (errors[:, below:] == 0).all()
    if "dropout" not in name:
        truth = torch.stack([g.square().sum() for g in output_gradients(model, batch, find_blocks(model))])
        np.testing.assert_allclose(squares.mean(0), truth.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["plain", "autocast", "checkpointing", "accumulation"])
def test_the_training_is_the_same_to_the_bit(name, mode):
    trained = []
    for monitored in (False, True):
        model, batch = shallow(name)
        if mode == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        monitor = Monitor(model, config())
        losses, timeline = [], None
        torch.manual_seed(5)
        with monitor if monitored else torch.enable_grad():
            for _ in range(3):
                for _ in range(2 if mode == "accumulation" else 1):
                    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                        losses.append(loss_of(model(**batch)))
                    losses[-1].backward()
                if monitored:
                    monitor.step()
                optimizer.step()
                optimizer.zero_grad()
        if monitored:
            timeline = monitor.timeline
            assert np.isfinite(timeline.activation_grad).all()
            # Transformers' checkpointing makes the training itself walk back to the embeddings.
            assert ((timeline.activation_grad_se[:, :2] > 0) == (mode != "checkpointing")).all()
        state = [value.clone() for value in model.state_dict().values()]
        trained.append((torch.stack(losses).detach(), torch.get_rng_state(), state))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


def test_estimates_under_autocast_are_those_of_autocast(choose):
    model, batch = shallow("llama")
    with torch.autocast("cpu", torch.bfloat16):
        exact = measured(model, batch, 1.0).activation_grad[0] ** 2
        found = []
        for subset in SUBSETS:
            choose(*subset)
            found.append(measured(model, batch).activation_grad[0] ** 2)
    np.testing.assert_allclose(np.mean(found, 0), exact, rtol=0.02)


def test_the_choice_is_of_the_share_of_the_seed_and_of_the_step():
    chosen = []
    for seed in (0, 0, 1):
        frozen = FrozenBlocks(nn.Identity(), find_blocks(bert()), 0.25, seed, None, None)
        for step in (0, 1):
            frozen.begin(step)
            chosen.append(frozen._choose(64))
    assert all(len(set(one)) == 16 for one in chosen) and chosen[:2] == chosen[2:4]
    assert len({tuple(one) for one in (*chosen[:2], *chosen[4:])}) == 4
    assert len(frozen._choose(3)) == 1  # at least one


def test_one_sequence_has_no_standard_error(choose):
    choose(1)
    timeline = measured(*shallow("bert"))
    assert np.isfinite(timeline.activation_grad).all()
    assert np.isnan(timeline.activation_grad_se[0]).tolist() == [True, True, False]


def test_frozen_blocks_run_without_a_graph():
    model, batch = shallow("bert")
    graphs = []
    inside = model.bert.encoder.layer[1].output.dense
    inside.register_forward_hook(lambda module, args, output: graphs.append((len(output), output.requires_grad)))
    measured(model, batch), measured(model, batch, 1.0)
    assert graphs == [(3, False), (2, True), (3, True)]


# ---- where sequences cannot be taken alone ---------------------------------------------------------------------------


class Normed(HandWritten):
    def __init__(self):
        super().__init__()
        self.blocks[0].norm = nn.BatchNorm1d(16)


@pytest.mark.parametrize("trains", [0, 1])
def test_nothing_of_a_model_is_kept_once_it_is_let_go(trains):
    def left():
        model, batch = shallow("bert", trains)
        measured(model, batch, steps=2)
        return [weakref.ref(module) for module in model.modules()]

    modules = left()
    gc.collect()
    assert not [module() for module in modules if module() is not None]


def of_one(batch):
    return {name: value[:1] for name, value in batch.items()}


@pytest.mark.parametrize("name", ["one sequence", "batch norm", "encoder and decoder", "an own quantity"])
def test_what_is_known_beforehand_is_exact(name):
    if name == "one sequence":
        model, batch = shallow("llama")
        batch = of_one(batch)
    elif name == "encoder and decoder":
        model, batch = shallow("t5")
    else:
        torch.manual_seed(0)
        model, batch = (Normed() if name == "batch norm" else HandWritten()), plain_text()
        for block in model.blocks[:-1]:
            block.requires_grad_(False)
        model.embed.requires_grad_(False)
    expected = measured(model, batch, 1.0).activation_grad
    if name == "an own quantity":
        seen = []

        class Own(type(config().instances()[0])):
            take_samples = False

            def on_output_gradient(self, sums, event):
                seen.append((len(event.gradient), event.sequences))
                super().on_output_gradient(sums, event)

        with Monitor(model, MonitorConfig(every=1, quantities=(Own(),), frozen_share=SHARE)) as monitor:
            loss_of(model(**batch)).backward()
            monitor.step()
        assert {sequences for _, sequences in seen} == {None}
        found = monitor.timeline
    else:
        found = measured(model, batch)
    np.testing.assert_allclose(found.activation_grad, expected, rtol=1e-6)
    assert (found.activation_grad_se == 0).all()


class Random(nn.Module):
    def forward(self, x):
        return x * (1 + 0.1 * torch.rand_like(x))


@pytest.mark.parametrize("name", ["changed between", "used elsewhere", "other randomness"])
def test_what_shows_only_while_it_runs_costs_one_step_and_is_told(name, caplog):
    torch.manual_seed(0)
    model, batch = HandWritten(), plain_text()
    for block in model.blocks[:-1]:
        block.requires_grad_(False)
    model.embed.requires_grad_(False)
    if name == "changed between":
        model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    elif name == "used elsewhere":
        model.blocks[0].register_forward_hook(lambda module, args, output: model.seen.append(output))
        model.seen = []
        model.head = Elsewhere(model)
    else:
        model.blocks[1].mixer = nn.Sequential(model.blocks[1].mixer, Random())
    with caplog.at_level(logging.WARNING, "inflection_fast"):
        found = measured(model, batch, steps=3)
    if hasattr(model, "seen"):
        model.seen.clear()
    exact = measured(model, batch, 1.0)
    np.testing.assert_allclose(found.activation_grad[1:], exact.activation_grad.repeat(2, 0), rtol=1e-6)
    assert np.isnan(found.activation_grad[0, 0]) and np.isfinite(found.activation_grad[0, -1])
    told = [message for message in caplog.messages if "cannot be sampled" in message]
    assert len(told) == 1


class Elsewhere(nn.Module):
    """A head that also looks at the output of the first block."""

    def __init__(self, model):
        super().__init__()
        self.head, self.seen = model.head, model.seen

    def forward(self, x):
        return self.head(x + self.seen[-1])


def test_hand_written_checkpoints_are_recomputed_as_they_ran(choose):
    model, batch = HandWritten().train(), plain_text()
    for block in model.blocks[:-1]:
        block.requires_grad_(False)
    model.embed.requires_grad_(False)
    exact = measured(model, batch, 1.0).activation_grad[0] ** 2
    model.checkpoint = partial(checkpoint, use_reentrant=False)
    found = []
    for subset in SUBSETS:
        choose(*subset)
        found.append(measured(model, batch).activation_grad[0] ** 2)
    np.testing.assert_allclose(np.mean(found, 0), exact, rtol=1e-5)
