"""The life of a monitor: steps, the file, resuming, faults, and models that it refuses."""

import copy
import errno
import logging
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers.monitored import EVERY_STEP, train
from helpers.tiny_models import HandWritten, bert, gpt2, loss_of, model_and_batch, one_thread  # noqa: F401
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig, measure_overhead
from inflection_fast.timeline import HEAD_SIGNALS, Timeline, TimelineWriter
from inflection_fast.timeline.arrow import END_OF_STREAM

BATCH_SIGNALS = tuple(name for name in HEAD_SIGNALS if not name.startswith("probe_"))


def assert_same(left, right, **tolerances):
    for signal in (*HEAD_SIGNALS, "steps", "activation_grad", "parameter_grad", "loss"):
        np.testing.assert_allclose(getattr(left, signal), getattr(right, signal), err_msg=signal, **tolerances)


def test_a_run_leaves_a_timeline_that_loads(tmp_path):
    model, batch = model_and_batch("bert")
    monitor = train(model, batch, 5, MonitorConfig(every=2, rows=5), tmp_path / "run")
    timeline = Timeline.load(tmp_path / "run")
    assert timeline.steps.tolist() == [0, 2, 4] and timeline.entropy.shape == (3, 3, 4)
    assert_same(timeline, monitor.timeline, rtol=0)
    assert timeline.layers == [block.name for block in monitor.blocks] == [f"bert.encoder.layer.{i}" for i in range(3)]
    for signal in (*BATCH_SIGNALS, "activation_grad", "parameter_grad", "loss", "measure_ms"):
        assert np.isfinite(getattr(timeline, signal)).all(), signal
    assert np.isnan(timeline.delta_cka).all()  # no probe was given
    assert (timeline.measure_ms > 0).all() and len(set(timeline.loss)) == 3
    assert timeline.meta["model"] == {
        "class": "BertForSequenceClassification",
        "model_type": "bert",
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    assert timeline.meta["config"]["every"] == 2 and "torch" in timeline.meta["versions"]


def test_a_resumed_run_goes_on_where_the_other_stopped(tmp_path):
    def fresh():
        model, batch = model_and_batch("bert")
        return model, batch

    whole = train(*fresh(), 6, out=tmp_path / "whole").timeline
    model, batch = fresh()
    train(model, batch, 4, out=tmp_path / "parts")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, batch, 1, out=tmp_path / "parts", start_step=4)  # lost: the checkpoint was taken at step 4
    model.load_state_dict(state)
    monitor = train(model, batch, 2, out=tmp_path / "parts", start_step=4)
    assert_same(monitor.timeline, whole, rtol=1e-6)  # the sampled rows are the same too
    assert_same(Timeline.load(tmp_path / "parts"), whole, rtol=1e-6)


def test_the_folder_of_another_run_is_refused_before_anything_is_attached(tmp_path):
    model, batch = model_and_batch("bert")
    train(model, batch, 1, out=tmp_path)
    with pytest.raises(ValueError, match=r"exists already.*start_step of a Monitor"):
        train(model, batch, 1, out=tmp_path)
    with pytest.raises(ValueError, match="cannot be continued"):
        train(gpt2(), batch, 1, out=tmp_path, start_step=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_timeline_that_is_there_is_deleted_or_left_alone_where_that_is_asked_for(tmp_path):
    (model, batch), out = model_and_batch("bert"), tmp_path / "run"
    for how, folder, steps in (("error", out, 3), ("new", tmp_path / "run-2", 2), ("overwrite", out, 1)):
        monitor = train(model, batch, steps, out=out, probe=[batch], if_exists=how)
        assert monitor.folder == folder and len(Timeline.load(folder).steps) == steps
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-2"}
    train(model, batch, 1, out=out, probe=[batch], if_exists="overwrite", start_step=1)  # goes on all the same
    assert len(Timeline.load(out).steps) == 2
    with pytest.raises(ValueError, match="if_exists: expected one of error, overwrite, new, got 'append'"):
        Monitor(model, if_exists="append")


@pytest.mark.parametrize("signals", [("attention",), ("activation_grad",), ("parameter_grad",), ("delta_cka",)])
def test_only_the_signals_asked_for_are_measured(signals):
    model, batch = model_and_batch("hand-written")
    timeline = train(model, batch, 1, MonitorConfig(every=1, signals=signals), probe=[batch]).timeline
    measured = {"attention": ("entropy",)}.get(signals[0], signals)
    for signal in ("entropy", "activation_grad", "parameter_grad", "delta_cka"):
        assert np.isfinite(getattr(timeline, signal)).all() == (signal in measured)


def test_blocks_may_be_named():
    model, batch = model_and_batch("bert")
    config = MonitorConfig(every=1, blocks=("bert.encoder.layer.2", "bert.encoder.layer.0"))
    named = train(model, batch, 1, config).timeline
    everything = train(*model_and_batch("bert"), 1, MonitorConfig(every=1)).timeline
    for signal in ("entropy", "activation_grad", "parameter_grad"):
        np.testing.assert_allclose(getattr(named, signal)[:, ::-1], getattr(everything, signal)[:, ::2], rtol=1e-5)


def test_the_loss_is_the_one_given_or_the_one_the_model_returned():
    model, batch = model_and_batch("bert")
    with Monitor(model, EVERY_STEP) as monitor:
        for loss in (None, 1.5, torch.tensor(2.5, requires_grad=True), float("nan")):
            returned = [loss_of(model(**batch)) for _ in range(2)]
            sum(returned).backward()
            monitor.step(loss)
    expected = [returned[0].item(), 1.5, 2.5, np.nan]
    np.testing.assert_allclose(monitor.timeline.loss, expected, rtol=1e-6)


def test_a_nan_loss_is_recorded_as_it_is():
    model, batch = model_and_batch("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] = torch.nan
    timeline = train(model, batch, 2).timeline
    assert np.isnan(timeline.loss).all() and np.isnan(timeline.activation_grad).all()
    assert np.isfinite(timeline.entropy[0, :2]).all()  # blocks before the NaN
    assert np.isnan(timeline.entropy[0, 2]).all()


def test_a_full_disk_costs_the_file_and_not_the_training(tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    write = TimelineWriter._write

    def failing(self, message):
        if self._last in (1, 2) and message != END_OF_STREAM:
            raise full
        write(self, message)

    monkeypatch.setattr(TimelineWriter, "_write", failing)
    with caplog.at_level(logging.WARNING):
        monitor = train(*model_and_batch("bert"), 3, out=tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("inflection_fast")]
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and str(tmp_path) in warnings[0]
    assert monitor.timeline.steps.tolist() == [0, 1, 2]
    assert Timeline.load(tmp_path).steps.tolist() == [0]  # a file without its end, but whole as far as it goes


def test_a_disk_that_takes_no_file_at_all_costs_memory_up_to_a_bound(tmp_path, monkeypatch, caplog):
    from inflection_fast.measure import recorder

    monkeypatch.setattr(recorder, "KEPT_BYTES", 20_000)
    (tmp_path / "file").write_text("in the place of the folder")
    model, batch = model_and_batch("hand-written")  # opens its file in the first measured step
    steps = 30
    with caplog.at_level(logging.WARNING):
        monitor = train(model, batch, steps, MonitorConfig(every=1, signals=("attention",)), tmp_path / "file" / "run")
    kept = monitor.timeline.steps.tolist()
    assert 2 < len(kept) < steps and kept == list(range(steps - len(kept), steps))
    assert monitor.dropped == steps - len(kept)
    assert "measuring goes on in memory" in caplog.messages[0] and "too many rows" in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_what_was_measured_before_training_raised_is_kept(tmp_path):
    model, batch = model_and_batch("bert")
    with pytest.raises(RuntimeError, match="out of memory"):
        with Monitor(model, EVERY_STEP, tmp_path) as monitor:
            loss_of(model(**batch)).backward()
            monitor.step()
            raise RuntimeError("out of memory")
    assert Timeline.load(tmp_path).steps.tolist() == [0] and not Timeline.load(tmp_path).truncated
    monitor.close()
    assert monitor.timeline.steps.tolist() == [0]


def test_heads_that_no_attribute_tells_are_counted_in_the_first_call(tmp_path):
    model, batch = model_and_batch("hand-written")
    with Monitor(model, EVERY_STEP, tmp_path) as monitor:
        with pytest.raises(RuntimeError, match="nothing was measured"):
            monitor.timeline  # noqa: B018
        loss_of(model(**batch)).backward()
        monitor.step()
    assert Timeline.load(tmp_path).heads == 4


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_steps_outside_the_context_are_refused():
    monitor = Monitor(bert(), EVERY_STEP)
    with pytest.raises(RuntimeError, match="outside the context"):
        monitor.step()
    with pytest.raises(RuntimeError, match="nothing was measured"):
        monitor.timeline  # noqa: B018
    with monitor:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        monitor.__enter__()


def test_a_step_that_went_by_unseen_is_an_error_at_first_and_a_warning_later(caplog):
    model, batch = model_and_batch("bert")
    with Monitor(model, EVERY_STEP) as monitor:
        with pytest.raises(RuntimeError, match="no training forward of the monitored model"):
            monitor.step()
    with Monitor(model, EVERY_STEP) as monitor:
        model(**batch)
        with pytest.raises(RuntimeError, match="no backward pass"):
            monitor.step()
    with Monitor(model, EVERY_STEP) as monitor, caplog.at_level(logging.WARNING):
        loss_of(model(**batch)).backward()
        for _ in range(3):
            monitor.step()
    assert [record.getMessage().split(";")[0][:24] for record in caplog.records] == ["measured step 1 saw no tr"[:24]]
    assert np.isnan(monitor.timeline.entropy[1:]).all() and np.isnan(monitor.timeline.activation_grad[1:]).all()


def test_blocks_without_a_gradient_are_named_once(caplog):
    model, batch = model_and_batch("bert")
    model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: output.detach())
    with caplog.at_level(logging.WARNING):
        timeline = train(model, batch, 2).timeline
    assert [r.getMessage() for r in caplog.records] == [
        "no gradient reached the outputs of ['bert.encoder.layer.0', 'bert.encoder.layer.1']; "
        "their activation_grad is NaN"
    ]
    assert np.isnan(timeline.activation_grad[0]).tolist() == [True, True, False]


def test_models_that_cannot_be_measured_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        Monitor(nn.DataParallel(HandWritten()))
    with pytest.raises(ValueError, match="no stack of blocks with attention"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a MonitorConfig, got dict"):
        Monitor(bert(), {"every": 3})
    with pytest.raises(ValueError, match="start_step: expected a step >= 0, got -1"):
        Monitor(bert(), start_step=-1)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_overhead_leaves_the_model_as_it_was():
    model, batch = model_and_batch("bert")
    (2 * loss_of(model(**batch))).backward()  # not what the stopwatch computes
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    overhead = measure_overhead(model, batch, MonitorConfig(every=10), pairs=3)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert overhead.off_ms > 0 and overhead.on_ms > 0 and overhead.noise >= 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "ms a step" in str(overhead)
    with pytest.raises(ValueError, match="pairs: expected at least 3, got 2"):
        measure_overhead(model, batch, pairs=2)


def test_overhead_is_spread_over_the_steps_between(monkeypatch):
    from inflection_fast.measure import cost

    ms = {"unmonitored": [10.0] * 3, "measured": [15.0] * 3, "unmonitored, again": [10.0] * 3}
    monkeypatch.setattr(cost, "race", lambda arms, **options: ms)
    monkeypatch.setattr(cost.Steps, "watched", lambda steps, config: nullcontext((steps, steps)))
    assert measure_overhead(bert(), {}, MonitorConfig(every=1), pairs=3).ratio == pytest.approx(1.5)
    spread = measure_overhead(bert(), {}, MonitorConfig(every=10), pairs=3)
    assert (spread.ratio, spread.on_ms, spread.off_ms) == (pytest.approx(1.05), 15.0, 10.0)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickled"])
def test_a_copy_of_a_measured_model_trains_unmeasured(copied):
    model, batch = model_and_batch("bert")
    alone, _ = model_and_batch("bert")
    expected = train(alone, batch, 1).timeline
    with Monitor(model, EVERY_STEP) as monitor:
        average = copied(model)
        loss = loss_of(model(**batch))
        loss.backward()
        loss_of(average(**batch)).backward()
        monitor.step(loss)
    assert_same(monitor.timeline, expected, rtol=1e-6)
    again = loss_of(average(**batch))  # when nothing is measured any more
    again.backward()
    assert torch.equal(again, loss)


def test_steps_off_the_schedule_install_nothing_and_call_no_operator():
    model, batch = model_and_batch("bert")
    with Monitor(model, MonitorConfig(every=3)) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            monitor.step()
        assert not [event.key for event in profile.key_averages() if event.key.startswith("aten::")]


def test_a_measured_step_makes_no_tensor_as_large_as_the_scores():
    model, batch = model_and_batch("gpt2")
    long = {name: value.repeat(1, 5)[:, :60] for name, value in batch.items()}
    queries, found = long["input_ids"].shape[1], []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(one, torch.Tensor) and one.dim() >= 2 and one.shape[-2:] == (queries, queries):
                    found.append(func)
            return result

    def scores(config):
        found.clear()
        with Monitor(model, config) as monitor, Largest():
            loss_of(model(**long)).backward()
            monitor.step()
        return len(found)

    alone = scores(MonitorConfig(every=1, signals=("parameter_grad",)))
    assert alone > 0 and scores(MonitorConfig(every=1)) == alone
