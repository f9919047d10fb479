"""Mixed precision: bfloat16 and float16 autocast, gradient scalers, steps that they skip."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401
from helpers.training_modes import EVERYTHING, VALUES, assert_same, measured

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor
from inflection_fast.measure.micro_batch import tensors_of


def test_under_autocast_the_values_are_those_of_float32_but_for_rounding():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch)
    with Monitor(model, EVERYTHING) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model(**batch))
        loss.backward()
        monitor.step()
    assert_same(monitor.timeline, expected, rtol=0.15)
    assert not np.allclose(monitor.timeline.activation_grad, expected.activation_grad, rtol=1e-5)  # it was on


def scaled_run(overflow_at=None):
    model, batch = model_and_batch("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    weights = []
    with Monitor(model, EVERYTHING) as monitor:
        for step in range(4):
            loss = loss_of(model(**batch))
            scaler.scale(loss).backward()
            if step == overflow_at:
                model.bert.embeddings.word_embeddings.weight.grad[0, 0] = torch.inf  # in no block
            monitor.step(loss, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            weights.append(model.classifier.weight.detach().clone())
    return monitor.timeline, weights


def test_a_gradient_scaler_is_divided_out_and_its_skipped_steps_are_marked():
    model, batch = model_and_batch("bert")
    timeline, _ = scaled_run()
    expected = measured(model, batch)
    for name in ("activation_grad", "parameter_grad"):
        np.testing.assert_allclose(getattr(timeline, name)[0], getattr(expected, name)[0], rtol=1e-5)
        np.testing.assert_allclose(getattr(timeline, name)[3], getattr(timeline, name)[0], rtol=0.1)  # scale 2048
    assert timeline.skipped.tolist() == [0, 0, 0, 0]
    timeline, weights = scaled_run(overflow_at=2)
    assert timeline.skipped.tolist() == [0, 0, 1, 0] and torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[1], weights[0])
    assert np.isnan(expected.skipped).all()  # nobody said whether there is a scaler


def test_a_loss_scale_and_a_scaler_are_both_divided_out():
    model, batch = model_and_batch("bert")
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    with Monitor(model, EVERYTHING) as monitor:
        loss = loss_of(model(**batch))
        scaler.scale(3 * loss).backward()
        monitor.step(loss, loss_scale=3.0, scaler=scaler)
    assert_same(monitor.timeline, measured(*model_and_batch("bert")), rtol=1e-5)


class Float16Run:
    """Training in float16 autocast under a scaler, and what plain hooks see of every step."""

    def __init__(self, name, init_scale, steps):
        model, batch = model_and_batch(name)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-12), torch.amp.GradScaler("cpu", init_scale)
        self.truth, self.stepped = {"activation_grad": [], "parameter_grad": []}, []
        blocks, outputs = [block.module for block in find_blocks(model)], {}
        for layer, block in enumerate(blocks):
            block.register_forward_hook(lambda m, a, out, layer=layer: outputs.update({layer: next(tensors_of(out))}))
        with Monitor(model, EVERYTHING) as monitor:
            for _ in range(steps):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(model(**batch))
                for output in outputs.values():
                    output.retain_grad()
                scale = scaler.get_scale()
                scaler.scale(loss).backward()
                gradients = {
                    "activation_grad": [[outputs[layer].grad] for layer in range(len(blocks))],
                    "parameter_grad": [[p.grad for p in block.parameters()] for block in blocks],
                }
                for signal, of_blocks in gradients.items():
                    self.truth[signal].append([norm_of(tensors) / scale for tensors in of_blocks])
                monitor.step(loss, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                self.stepped.append(scaler.get_scale() >= scale)
        self.timeline = monitor.timeline


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double().norm().item()


@pytest.mark.parametrize("name", ["bert", "llama", "hand-written"])
def test_float16_autocast_under_a_scaler_is_measured_within_the_error_of_float16(name):
    run = Float16Run(name, 2.0**10, 2)
    assert run.stepped == [True, True] and run.timeline.skipped.tolist() == [0, 0]
    for signal, norms in run.truth.items():
        np.testing.assert_allclose(getattr(run.timeline, signal), norms, rtol=1e-5, err_msg=signal)
    expected = measured(*model_and_batch(name))
    for signal in VALUES:
        actual = getattr(run.timeline, signal)[0]
        np.testing.assert_allclose(actual, getattr(expected, signal)[0], rtol=0.02, err_msg=signal)
        assert not np.allclose(actual, getattr(expected, signal)[0], rtol=1e-6), signal  # it was on


@pytest.mark.parametrize("name", ["bert", "hand-written"])
def test_steps_that_overflow_in_float16_are_marked_and_the_others_are_right(name):
    run = Float16Run(name, 2.0**24, 14)  # halved after every step whose gradients overflow
    skipped = ~np.array(run.stepped)
    assert skipped[0] and not skipped[-1] and run.timeline.skipped.tolist() == skipped.tolist()
    for signal, norms in run.truth.items():
        norms = np.array(norms)
        assert np.isfinite(norms[~skipped]).all()
        np.testing.assert_allclose(getattr(run.timeline, signal), norms, rtol=1e-5, err_msg=signal)
    assert not np.isfinite(np.array(run.truth["activation_grad"])[0]).all()
    expected = measured(*model_and_batch(name))
    for signal in ("entropy", "max_logit", "collision", "sink", "loss"):  # the forward pass does not overflow
        every = np.broadcast_to(getattr(expected, signal), getattr(run.timeline, signal).shape)
        np.testing.assert_allclose(getattr(run.timeline, signal), every, rtol=0.02, err_msg=signal)
