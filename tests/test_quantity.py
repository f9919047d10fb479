"""Quantities of a user's own: called as they are told, summed right, and none can harm the training or another."""

import logging
import threading

import numpy as np
import pytest
import torch
from helpers.quantity_of_a_user import BY_LAYER, OutputRms, column, train
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401

from inflection_fast import Accumulator, AlertConfig, AlertRule, Monitor, MonitorConfig, Quantity
from inflection_fast.measure import parameters


class Everything(Quantity):
    """Counts how often each tap is called."""

    name = "everything"
    axes = {"tap": ("block", "submodule", "output", "gradient", "parameter", "backward", "before", "after")}
    accumulators = {"calls": Accumulator(("tap",), held="part"), "steps": Accumulator(("tap",), held="part")}
    columns = {"calls": column(axes=("tap",), count=None)}

    def submodules(self, block):
        return {"query": block.module.attention.self.query}

    def on_block(self, sums, block):
        assert block.input.shape == block.output.shape and not block.output.requires_grad
        sums["calls"][0] += 1

    def on_submodule(self, sums, seen):
        assert seen.name == "query" and seen.output.shape[:2] == seen.tokens.shape
        sums["calls"][1] += 1

    def on_model_output(self, sums, output):
        assert output.logits.shape[0] == output.labels.shape[0] and output.loss.dim() == 0
        sums["calls"][2] += 1

    def on_output_gradient(self, sums, seen):
        sums["calls"][3] += 1

    def on_parameter_gradient(self, sums, seen):
        assert seen.gradient.shape == seen.parameter.shape
        sums["calls"][4] += 1

    def on_backward_end(self, sums, parameters):
        assert len(set(map(id, parameters.parameters))) == len(parameters.layers) == len(parameters.names)
        sums["steps"][5] += 1

    def before_update(self, sums, update):
        assert not update.optimizers
        self.before = [parameter.detach().clone() for parameter in update.parameters.parameters]
        sums["steps"][6] += 1

    def after_update(self, sums, update):
        assert len(update.optimizers) == 1
        moved = [not torch.equal(a, b) for a, b in zip(self.before, update.parameters.parameters, strict=True)]
        sums["steps"][7] += sum(moved) / len(moved)

    def values(self, sums):
        return {"calls": sums["calls"] + sums["steps"]}


def rms_of(model, batch):
    """Per block, in float64, over the tokens of the mask."""
    found = []
    handles = [
        block.register_forward_hook(
            lambda module, args, output: found.append(output if torch.is_tensor(output) else output[0])
        )
        for block in model.bert.encoder.layer
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    return np.array([output[mask].double().square().mean().sqrt() for output in found])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_quantity_of_ones_own_is_summed_over_micro_batches_and_in_the_forward_alone(checkpointed, micro_batches):
    model, batch = model_and_batch("bert")
    expected = rms_of(model, batch)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    timeline = train(model, batch, MonitorConfig(every=1, quantities=(OutputRms(),)), 1, micro_batches)
    np.testing.assert_allclose(timeline.output_rms[0], expected, rtol=1e-6)
    said = timeline.columns["output_rms"]
    assert (said.quantity, said.unit, said.axes, said.label) == ("output_rms", "1", BY_LAYER, "RMS")
    assert "entropy" not in timeline.columns and np.isnan(timeline.entropy).all() and np.isfinite(timeline.loss).all()


def test_every_tap_is_called_as_often_as_it_is_said():
    model, batch = model_and_batch("bert")
    parameters = sum(1 for layer in model.bert.encoder.layer for _ in layer.parameters())
    timeline = train(model, batch, MonitorConfig(every=2, quantities=(Everything(),)), 4, micro_batches=2)
    assert timeline.steps.tolist() == [0, 2] and timeline.axes["tap"][0] == "block"
    # The last backward pass is the one that counts where a tap is to write.
    expected = [2 * 3, 2 * 3, 2, 2 * 3, 2 * parameters, 2, 1, 1]
    assert timeline.calls.tolist() == [expected, expected]


def test_every_quantity_has_its_own_cadence():
    model, batch = model_and_batch("bert")
    own = OutputRms()
    own.every = 3
    config = MonitorConfig(every=2, quantities=("attention", own))
    timeline = train(model, batch, config, 7)
    assert timeline.steps.tolist() == [0, 2, 3, 4, 6]
    assert np.isfinite(timeline.entropy).all((1, 2)).tolist() == [True, True, False, True, True]
    assert np.isfinite(timeline.output_rms).all(1).tolist() == [True, False, True, False, True]
    timeline = train(
        model, batch, MonitorConfig(every={"attention": 1, "output_rms": 2}, quantities=("attention", own))
    )
    assert np.isfinite(timeline.output_rms).all(1).tolist() == [True, False, True]


def test_the_last_step_as_scalars_for_trackers():
    model, batch = model_and_batch("bert")
    with Monitor(model, MonitorConfig(every=2, quantities=("activation_grad", "delta_cka", OutputRms()))) as monitor:
        assert monitor.scalars() == {}
        for _ in range(4):
            loss_of(model(**batch)).backward()
            monitor.step()
        found, timeline = monitor.scalars(), monitor.timeline
    assert found.keys() >= {"activation_grad", "output_rms", "loss"} and "delta_cka" not in found  # there is no probe
    for name in ("activation_grad", "output_rms", "loss"):
        assert found[name] == pytest.approx(getattr(timeline, name)[-1].mean(), rel=1e-6)


@pytest.mark.parametrize("slow", [False, True])
def test_finished_rows_are_told_by_the_thread_of_the_training_and_once(slow, caplog):
    model, batch = model_and_batch("bert")
    told = []

    def on_row(row):
        told.append((row, threading.current_thread()))
        if row.step == 2:
            raise ArithmeticError("of one's own")

    with Monitor(model, MonitorConfig(every=2, quantities=("activation_grad",)), on_row=on_row) as monitor:
        for step in range(6):
            loss_of(model(**batch)).backward()
            monitor.step()
            if not slow:
                expected = monitor.scalars()  # waits for the row
                assert len(told) == (step + 1) // 2  # which the next step tells
    rows = [row for row, _ in told]
    assert [row.step for row in rows] == [0, 2, 4]
    assert {thread for _, thread in told} == {threading.main_thread()}
    np.testing.assert_array_equal([row.columns["activation_grad"] for row in rows], monitor.timeline.activation_grad)
    assert slow or rows[-1].scalars() == expected
    assert caplog.messages == ['on_row failed for the row of step 2: ArithmeticError("of one\'s own")']


def test_one_instance_serves_several_monitors():
    model, batch = model_and_batch("bert")
    config = MonitorConfig(every=1, quantities=(Everything(),))
    first, second = (train(model, batch, config, 2) for _ in range(2))
    np.testing.assert_array_equal(first.calls, second.calls)


def test_its_rules_raise_alerts_and_a_user_may_change_them():
    model, batch = model_and_batch("bert")
    config, told = MonitorConfig(every=1, quantities=(OutputRms(),)), []
    train(model, batch, config, 1, on_alert=told.extend)
    assert [(a.kind, a.signal, a.layer) for a in told] == [("above", "output_rms", layer) for layer in range(3)]
    assert "output_rms of block 0 is" in told[0].message
    for rules in ((), AlertRule("above", 1e9, measurements=1)):
        told.clear()
        train(model, batch, config, 1, on_alert=told.extend, alerts=AlertConfig(rules={"output_rms": rules}))
        assert not told
    with pytest.raises(ValueError, match=r"rules: there are no columns \['rms'\]; expected some of .*'output_rms'"):
        Monitor(model, config, alerts=AlertConfig(rules={"rms": ()}))


# ---- forwards that are thrown away -----------------------------------------------------------------------------------


def test_a_forward_that_no_backward_pass_follows_does_not_count():
    model, batch = model_and_batch("bert")
    other = batch | {"input_ids": batch["input_ids"].flip(0)}
    quantities_of_both = ("attention", "activation_grad")
    expected = train(model, batch, MonitorConfig(every=1, rows=None, quantities=quantities_of_both), 1)
    for forwards in ("trained", "all"):
        model, _ = model_and_batch("bert")
        config = MonitorConfig(every=1, rows=None, quantities=quantities_of_both, forwards=forwards)
        with Monitor(model, config) as monitor:
            model(**other)  # under autograd, as a rollout or an evaluation by somebody in a hurry
            loss_of(model(**batch)).backward()
            model(**other)
            monitor.step()
        for name in ("entropy", "loss"):
            same = np.allclose(getattr(monitor.timeline, name), getattr(expected, name), rtol=1e-6)
            assert same == (forwards == "trained"), (forwards, name)
        np.testing.assert_allclose(monitor.timeline.activation_grad, expected.activation_grad, rtol=1e-5)


def test_an_optimizer_that_steps_inside_the_backward_pass_is_told_of(caplog):
    model, batch = model_and_batch("bert")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with caplog.at_level(logging.WARNING):
        timeline = train(model, batch, MonitorConfig(every=1))
    assert np.isnan(timeline.parameter_grad).all() and np.isfinite(timeline.activation_grad).all()
    assert len(caplog.messages) == 1 and "no parameter has a gradient when the backward pass ends" in caplog.messages[0]


def test_blocks_may_have_different_numbers_of_heads():
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    config = transformers.SwinConfig(**sizes, depths=[1, 1], num_heads=[1, 2], attn_implementation="eager")
    torch.manual_seed(0)
    model, batch = transformers.SwinModel(config).train(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        truth = model(**batch, output_attentions=True).attentions
    with Monitor(model, MonitorConfig(every=1, rows=None)) as monitor:
        model(**batch).last_hidden_state.square().mean().backward()
        monitor.step()
    timeline = monitor.timeline
    assert timeline.heads == 2 and timeline.entropy.shape == (1, 2, 2)
    assert np.isnan(timeline.entropy[0, 0]).tolist() == [False, True]
    assert np.ma.getmaskarray(timeline.masked("max_logit"))[0].tolist() == [[False, True], [False, False]]
    for layer, probabilities in enumerate(truth):
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1).double().mean((0, 2))
        np.testing.assert_allclose(timeline.entropy[0, layer, : len(entropy)], entropy, rtol=1e-5)


# ---- the probe, the optimizer, the background ------------------------------------------------------------------------


def test_a_quantity_may_listen_to_the_probe():
    class OnProbe(OutputRms):
        name, data, columns = "probe_rms", "probe", {"probe_rms": column("RMS")}

        def values(self, sums):
            return {"probe_rms": super().values(sums)["output_rms"]}

    model, batch = model_and_batch("bert")
    probe = batch | {"input_ids": batch["input_ids"].flip(0)}
    expected = rms_of(model.eval(), probe)
    config = MonitorConfig(every=1, quantities=(OnProbe(), "delta_cka"), probe_every=1)
    timeline = train(model.train(), batch, config, 2, probe=[probe])
    np.testing.assert_allclose(timeline.probe_rms[0], expected, rtol=1e-6)
    assert np.isfinite(timeline.delta_cka).all() and (timeline.probe_rms[0] != timeline.probe_rms[1]).any()


class Largest(Quantity):
    """Largest number of each weight matrix, found in the background."""

    name, every = "largest", 2
    accumulators = {"value": Accumulator(held="part"), "count": Accumulator(held="part")}
    columns = {"largest": column()}

    def wants(self, layer, name, parameter):
        return name == "intermediate.dense.weight"

    def in_background(self, layer, name, weight):
        value, count = np.zeros(3), np.zeros(3)
        value[layer], count[layer] = weight.max(), 1
        return {"value": value, "count": count}

    def values(self, sums):
        return {"largest": sums["value"] / sums["count"]}


@pytest.mark.parametrize("room", [2**28, 1])
def test_slow_work_on_weights_is_in_the_next_measured_step_or_in_a_last_row(room, monkeypatch):
    monkeypatch.setattr(parameters, "COPY_BYTES", room)
    model, batch = model_and_batch("bert")
    weights = [layer.intermediate.dense.weight for layer in model.bert.encoder.layer]
    with Monitor(model, MonitorConfig(every=1, quantities=("activation_grad", Largest()))) as monitor:
        for step in range(5):
            loss_of(model(**batch)).backward()
            monitor.step()
            monitor._background._todo.join()
            if step == 4:
                last = [weight.max().item() for weight in weights]
            with torch.no_grad():
                for weight in weights:
                    weight.add_(1.0)
    timeline = monitor.timeline
    assert timeline.steps.tolist() == [0, 1, 2, 3, 4, 5]  # the last row is for what was copied at step 4
    found = np.isfinite(timeline.largest)
    if room == 1:  # one matrix at a time, in turn
        assert found.sum() == 3 and found.any(0).all() and found[1, 0] and found[3, 1] and found[5, 2]
        assert timeline.largest[5, 2] == pytest.approx(last[2], rel=1e-6)
    else:
        assert found.all(1).tolist() == [False, True, False, True, False, True]
        np.testing.assert_allclose(timeline.largest[5], last, rtol=1e-6)
        np.testing.assert_allclose(timeline.largest[3] - timeline.largest[1], 2.0, rtol=1e-4)
