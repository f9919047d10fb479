"""What is measured is the same in every mode of training: compiled, mixed precision, clipped, tied, quantised."""

import copy
import logging

import numpy as np
import pytest
import torch
from helpers.tiny_models import HandWritten, loss_of, model_and_batch, one_thread  # noqa: F401
from helpers.training_modes import EVERYTHING, VALUES, assert_same, measured
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig

# ---- compiled --------------------------------------------------------------------------------------------------------


class Counted:
    """A backend that runs the graphs as they are and counts graphs and runs."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


def compile_whole(model, **settings):
    return torch.compile(model, **settings)


def compile_in_place(model, **settings):
    model.compile(**settings)
    return model


def compile_block(model, **settings):
    model.blocks[1].compile(**settings)
    return model


def test_monitors_that_end_in_any_order_leave_compiled_code_compiled():
    torch._dynamo.reset()
    backend = Counted()
    doubled = torch.compile(lambda x: 2 * x, backend=backend)
    first, second = (Monitor(model_and_batch("hand-written")[0], MonitorConfig(every=1)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.close()
    doubled(torch.ones(2))
    assert backend.runs == 0  # the second still measures
    second.close()
    doubled(torch.ones(2))
    assert backend.runs == 1


@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_block])
def test_a_compiled_model_is_measured_on_schedule_and_compiled_off_it(compiled, early):
    torch._dynamo.reset()
    model, batch = model_and_batch("hand-written")
    expected = measured(model, batch)
    backend = Counted()
    called = compiled(model, backend=backend, fullgraph=True) if early else model
    if early:
        loss_of(called(**batch)).backward()  # hooks that come after a first compiled call would never fire
        model.zero_grad()
    with Monitor(called if early else model, MonitorConfig(every=2, rows=None)) as monitor:
        called = called if early else compiled(model, backend=backend, fullgraph=True)
        runs = []
        for _ in range(6):
            loss_of(called(**batch)).backward()
            runs.append(backend.runs)
            monitor.step()
            model.zero_grad()
    assert monitor.timeline.steps.tolist() == [0, 2, 4]
    for row in range(3):
        for name in VALUES:
            actual = getattr(monitor.timeline, name)[row]
            np.testing.assert_allclose(actual, getattr(expected, name)[0], rtol=1e-6, err_msg=name)
    assert backend.graphs == 1  # no break, and no new graph for what is attached in between
    assert np.diff(runs).tolist() == [1, 0, 1, 0, 1]


def test_a_model_compiled_away_from_the_monitor_is_measured():
    """The monitor never sees the compiled object, and cannot refuse it."""
    torch._dynamo.reset()
    model, batch = model_and_batch("hand-written")
    expected = measured(model, batch)
    with Monitor(model, EVERYTHING) as monitor:
        loss_of(torch.compile(model, backend="eager")(**batch)).backward()
        monitor.step()
    assert_same(monitor.timeline, expected)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failing_operator_is_an_error_at_first_and_a_warning_later(monkeypatch, caplog):
    from inflection_fast.measure import attention as taps

    model, batch = model_and_batch("hand-written")
    stats_of, failing = taps.stats_of, []

    def picky(call, rows):
        if failing:
            raise torch.OutOfMemoryError("no memory for the statistics")
        return stats_of(call, rows)

    monkeypatch.setattr(taps, "stats_of", picky)
    failing.append(True)
    with Monitor(model, EVERYTHING) as monitor, pytest.raises(RuntimeError, match="no memory"):
        model(**batch)
    failing.clear()
    expected = measured(model, batch)
    with Monitor(model, EVERYTHING) as monitor, caplog.at_level(logging.WARNING):
        for step in range(4):
            failing[:] = [True] if step in (1, 2) else []
            model.zero_grad()
            loss_of(model(**batch)).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            monitor.step()
    assert len(caplog.records) == 1 and "measured step 1 failed" in caplog.text and "no memory" in caplog.text
    for name in VALUES:
        values = getattr(monitor.timeline, name)
        assert np.isnan(values[1:3]).all() == (monitor.timeline.columns[name].quantity == "attention"), name
        np.testing.assert_allclose(values[[0, 3]], np.repeat(getattr(expected, name), 2, 0), rtol=1e-6)


def test_a_hook_of_the_user_that_raises_stops_only_what_it_would_stop():
    model, batch = model_and_batch("hand-written")
    expected = measured(model, batch)
    angry = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with Monitor(model, EVERYTHING) as monitor:
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        angry.remove()
        loss_of(model(**batch)).backward()
        monitor.step()
    assert_same(monitor.timeline, expected)


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_by_the_monitor_is_that_of_torch(max_norm, every):
    model, batch = model_and_batch("bert")
    with Monitor(model, MonitorConfig(every=every, rows=None)) as monitor:
        for _ in range(2):
            model.zero_grad()
            loss_of(model(**batch)).backward()
            before = [p.grad.clone() for p in model.parameters()]
            norm = monitor.clip_grad_norm_(max_norm)
            ours = [p.grad.clone() for p in model.parameters()]
            for parameter, gradient in zip(model.parameters(), before, strict=True):
                parameter.grad.copy_(gradient)
            expected = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
            for gradient, parameter in zip(ours, model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0)
            monitor.step()


def test_clipping_on_a_measured_step_sums_the_blocks_once(monkeypatch):
    from inflection_fast import ops

    model, batch = model_and_batch("bert")
    summed = []
    original = ops.sum_of_squares
    monkeypatch.setattr(
        ops, "sum_of_squares", lambda tensors, groups: summed.extend(tensors) or original(tensors, groups)
    )
    with Monitor(model, EVERYTHING) as monitor:
        loss_of(model(**batch)).backward()
        monitor.clip_grad_norm_(1.0)
        monitor.step()
    assert sorted(t.data_ptr() for t in summed) == sorted(p.grad.data_ptr() for p in model.parameters())


def test_clipping_unscaled_gradients_under_a_scaler():
    model, batch = model_and_batch("bert")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=512.0)
    with Monitor(model, EVERYTHING) as monitor:
        scaler.scale(loss_of(model(**batch))).backward()
        scaler.unscale_(optimizer)
        expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.testing.assert_close(monitor.clip_grad_norm_(1e-3, scaler=scaler), expected, rtol=1e-5, atol=0)
        monitor.step(scaler=scaler)
    np.testing.assert_allclose(monitor.timeline.parameter_grad, measured_alone(), rtol=1e-5)


def measured_alone():
    return measured(*model_and_batch("bert")).parameter_grad


def test_parameters_that_blocks_share_are_clipped_once():
    model, batch = model_and_batch("hand-written")
    model.blocks[2].mlp = model.blocks[0].mlp
    with Monitor(model, EVERYTHING) as monitor:
        loss_of(model(**batch)).backward()
        expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.testing.assert_close(monitor.clip_grad_norm_(1.0), expected, rtol=1e-5, atol=0)
        monitor.step()


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_a_head_tied_to_the_embedding_changes_no_block():
    model, batch = model_and_batch("hand-written")
    tied, _ = model_and_batch("hand-written")
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
    tied.head.weight = tied.embed.weight
    with torch.no_grad():
        tied.embed.weight.copy_(model.embed.weight)
    assert_same(measured(tied, batch), measured(model, batch))


def test_a_peft_model_has_the_values_of_its_base_and_the_norms_of_its_adapters():
    peft = pytest.importorskip("peft")
    model, batch = model_and_batch("bert")
    expected = measured(copy.deepcopy(model), batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2)).train()
    with Monitor(adapted, EVERYTHING) as monitor:
        loss_of(adapted(**batch)).backward()
        lora = [[p.grad.flatten() for p in block.module.parameters() if p.requires_grad] for block in monitor.blocks]
        monitor.step()
    assert all(len(gradients) == 4 for gradients in lora)
    for name in ("entropy", "max_logit", "collision", "sink", "activation_grad", "loss"):  # fresh adapters add nothing
        np.testing.assert_allclose(getattr(monitor.timeline, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    norms = [torch.cat(gradients).norm().item() for gradients in lora]
    np.testing.assert_allclose(monitor.timeline.parameter_grad[0], norms, rtol=1e-5)


class Int8Linear(nn.Module):
    """A quantised weight in buffers, dequantised on the fly, and LoRA beside it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.a = nn.Parameter(torch.randn(2, linear.in_features) / 4)
        self.b = nn.Parameter(torch.randn(linear.out_features, 2) / 4)

    def forward(self, x):
        return x @ (self.quantised.float() * self.scale).T + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("bare", [False, True], ids=["lora", "no parameters in block 0"])
def test_quantised_base_weights_are_measured_through(bare):
    model, batch = model_and_batch("hand-written")
    model.requires_grad_(False)
    for block in model.blocks:
        block.mixer.qkv, block.mixer.out = Int8Linear(block.mixer.qkv), Int8Linear(block.mixer.out)
    outputs = []
    handles = [block.register_forward_hook(lambda m, a, out: outputs.append(out)) for block in model.blocks]
    loss = loss_of(model(**batch))
    for handle in handles:
        handle.remove()
    activation = [g.norm().item() for g in torch.autograd.grad(loss, outputs)]
    loss_of(model(**batch)).backward()
    lora = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.blocks]
    parameter = [torch.cat([g.flatten() for g in gradients]).norm().item() for gradients in lora]
    model.zero_grad()
    if bare:
        model.blocks[0].requires_grad_(False)
        parameter[0] = np.nan
    timeline = measured(model, batch)
    np.testing.assert_allclose(timeline.activation_grad[0], activation, rtol=1e-5)
    np.testing.assert_allclose(timeline.parameter_grad[0], parameter, rtol=1e-5)
    assert np.isfinite(timeline.entropy).all()


def test_dropout_is_measured_as_it_falls():
    model, batch = model_and_batch("encoder")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    torch.manual_seed(3)
    first = measured(model, batch)
    torch.manual_seed(3)
    assert_same(measured(model, batch), first)
    torch.manual_seed(4)
    assert not np.allclose(measured(model, batch).activation_grad, first.activation_grad, rtol=1e-3)
