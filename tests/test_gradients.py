"""Gradient norms against autograd in float64: accumulation, frozen layers, checkpointing, clipping."""

from functools import partial

import pytest
import torch
from helpers.tiny_models import (  # noqa: F401
    CASES,
    HandWritten,
    in_float64,
    loss_of,
    model_and_batch,
    one_thread,
    output_gradients,
    plain_text,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from inflection_fast.blocks import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig

GRADIENTS = MonitorConfig(every=1, signals=("activation_grad", "parameter_grad"), frozen_share=1.0)


def measured(model, batch, config=GRADIENTS):
    with Monitor(model, config) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
    return monitor.timeline


def norms(tensors):
    return torch.stack([tensor.norm() for tensor in tensors])


def parameter_truth(model, batch):
    """l2 norm of the gradient over each block's trainable parameters, in float64."""
    model, batch = in_float64(model, batch)
    loss_of(model(**batch)).backward()
    return torch.stack(
        [
            torch.cat([p.grad.flatten() for p in block.module.parameters() if p.grad is not None]).norm()
            if any(p.requires_grad for p in block.module.parameters())
            else torch.tensor(torch.nan, dtype=torch.float64)
            for block in find_blocks(model)
        ]
    )


def check(actual, expected, rtol=1e-4):
    assert expected.isnan().any() or expected.max() / expected.min() > 1.01
    torch.testing.assert_close(torch.from_numpy(actual[0]), expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_gradient_norms_are_those_of_autograd(name):
    model, batch = model_and_batch(name, CASES[name].implementations[0])
    timeline = measured(model, batch)
    model.zero_grad()
    check(timeline.activation_grad, norms(output_gradients(model, batch, find_blocks(model))))
    check(timeline.parameter_grad, parameter_truth(model, batch))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "encoder", "hand-written"])
def test_blocks_below_frozen_parameters_have_gradients_too(name):
    model, batch = model_and_batch(name)
    blocks = find_blocks(model)
    top = {p for p in blocks[-1].module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in top)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with Monitor(model, GRADIENTS) as monitor:
        loss_of(model(**batch)).backward()
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert all((parameter.grad is None) == (parameter not in top) for parameter in model.parameters())
        monitor.step()
    timeline = monitor.timeline
    check(timeline.activation_grad, norms(output_gradients(model, batch, blocks)))
    model.zero_grad()
    check(timeline.parameter_grad, parameter_truth(model, batch))
    assert torch.from_numpy(timeline.parameter_grad[0]).isnan().tolist() == [True] * (len(blocks) - 1) + [False]


def test_frozen_blocks_that_change_their_input_in_place():
    class InPlace(HandWritten):
        def forward(self, input_ids, labels=None):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x).mul_(1.0)
            return {"loss": self.head(x).square().mean()}

    torch.manual_seed(0)
    model, batch = InPlace(), plain_text()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0].add_(0.0),))  # runs before the monitor's hook
        block.forward = lambda x, original=block.forward: original(x.mul_(1.0))  # and this one after it
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    assert (measured(model, batch).activation_grad > 0).all()


def test_off_the_schedule_frozen_blocks_cost_no_backward():
    model, batch = model_and_batch("bert")
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    outputs = []
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    with Monitor(model, MonitorConfig(every=2, signals=("activation_grad",))) as monitor:
        for _ in range(2):
            loss_of(model(**batch)).backward()
            monitor.step()
    assert [output.requires_grad for output in outputs] == [True, False]


@pytest.mark.parametrize("forwards_first", [False, True])
def test_micro_batches_are_one_batch(forwards_first):
    model, batch = model_and_batch("bert")
    expected = output_gradients(model, batch, find_blocks(model)), parameter_truth(model, batch)
    with Monitor(model, GRADIENTS) as monitor:
        losses = []
        for i in range(len(batch["labels"])):
            losses.append(loss_of(model(**{k: v[i : i + 1] for k, v in batch.items()})) / len(batch["labels"]))
            if not forwards_first:
                losses.pop().backward()
        if forwards_first:
            sum(losses).backward()
        monitor.step()
    check(monitor.timeline.activation_grad, norms(expected[0]))
    check(monitor.timeline.parameter_grad, expected[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "hand-written"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_activation_checkpointing_changes_nothing(name, reentrant, micro_batches):
    model, batch = model_and_batch(name)
    parts = [{k: v[i::micro_batches] for k, v in batch.items()} for i in range(micro_batches)]
    everything = MonitorConfig(every=1, rows=5)

    def run():
        model.zero_grad()
        calls = []
        handle = find_blocks(model)[0].module.register_forward_pre_hook(lambda *_: calls.append(1))
        with Monitor(model, everything) as monitor:
            for part in parts:
                loss_of(model(**part)).backward()
            monitor.step()
        handle.remove()
        return monitor.timeline, len(calls)

    expected, calls = run()
    if name == "llama":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    else:
        model.checkpoint = partial(checkpoint, use_reentrant=reentrant)
    actual, more_calls = run()
    assert name == "llama" or more_calls > calls  # the blocks' own hooks ran again inside backward
    for signal in ("entropy", "activation_grad", "parameter_grad"):
        torch.testing.assert_close(getattr(actual, signal), getattr(expected, signal), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_frozen_blocks(reentrant):
    model, batch = model_and_batch("bert")
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    expected = norms(output_gradients(model, batch, find_blocks(model)))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(measured(model, batch).activation_grad, expected)


def test_hand_written_checkpointing_over_frozen_blocks():
    model, batch = model_and_batch("hand-written")
    expected = norms(output_gradients(model, batch, find_blocks(model)))
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.checkpoint = partial(checkpoint, use_reentrant=False)
    check(measured(model, batch).activation_grad, expected)


def test_clipping_and_clearing_before_the_step_change_nothing():
    model, batch = model_and_batch("bert")
    expected = parameter_truth(model, batch)
    with Monitor(model, GRADIENTS) as monitor:
        loss_of(model(**batch)).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
        model.zero_grad()
        monitor.step()
    check(monitor.timeline.parameter_grad, expected)


def test_a_graph_that_is_used_twice_counts_once():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch).activation_grad
    with Monitor(model, GRADIENTS) as monitor:
        loss = loss_of(model(**batch))
        loss.backward(retain_graph=True)
        loss.backward()
        monitor.step()
    torch.testing.assert_close(monitor.timeline.activation_grad, expected, rtol=1e-6, atol=0)


def test_a_graph_that_outlives_its_step_writes_no_more():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch)
    with Monitor(model, GRADIENTS) as monitor:
        loss = loss_of(model(**batch))
        loss.backward(retain_graph=True)
        monitor.step()
        model.zero_grad()
        loss_of(model(**batch)).backward()
        (1e3 * loss).backward()
        monitor.step()
    for signal in ("activation_grad", "parameter_grad"):
        values = getattr(monitor.timeline, signal)
        torch.testing.assert_close(values[1], getattr(expected, signal)[0], rtol=1e-5, atol=0)


def test_a_loss_from_something_else_than_the_outputs():
    model, batch = model_and_batch("bert")
    hidden = []
    model.bert.encoder.layer[2].register_forward_hook(lambda module, args, output: hidden.append(output))
    with Monitor(model, GRADIENTS) as monitor:
        model(**batch)
        hidden[0].square().mean().backward()
        monitor.step()
    assert (monitor.timeline.activation_grad > 0).all() and (monitor.timeline.parameter_grad > 0).all()


def test_the_callback_runs_after_those_queued_during_backward():
    """As DistributedDataParallel does, which writes the reduced gradients in a callback of its own."""
    model, batch = model_and_batch("bert")
    parameters = [p for block in find_blocks(model) for p in block.module.parameters()]

    def reduce():
        for parameter in parameters:
            parameter.grad.fill_(1.0)

    def queue(gradient):
        torch.autograd.Variable._execution_engine.queue_callback(reduce)

    with Monitor(model, GRADIENTS) as monitor:
        model.bert.embeddings.word_embeddings.weight.register_hook(queue)  # among the last to run
        loss_of(model(**batch)).backward()
        monitor.step()
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in find_blocks(model)]
    torch.testing.assert_close(
        torch.from_numpy(monitor.timeline.parameter_grad[0]), torch.tensor(sizes).double().sqrt()
    )


def test_norms_are_without_the_loss_scale():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch)
    for scale in (1024.0, torch.tensor(1024.0)):
        model.zero_grad()
        with Monitor(model, GRADIENTS) as monitor:
            (loss_of(model(**batch)) * scale).backward()
            monitor.step(loss_scale=scale)
        for signal in ("activation_grad", "parameter_grad"):
            torch.testing.assert_close(getattr(monitor.timeline, signal), getattr(expected, signal), rtol=1e-5, atol=0)
