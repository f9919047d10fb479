"""A compiled model is one graph, measured or not, and its values are those of the model as it is written."""

import contextlib
import copy
import logging
import os
from functools import partial

import numpy as np
import pytest
import torch
from helpers.tiny_models import model_and_batch, one_thread  # noqa: F401
from torch._dynamo.utils import counters

from inflection_fast.measure import Monitor, MonitorConfig

# Half a minute of C++ on two quiet cores: by INFLECTION_SLOW=1, as in a release.
slow = pytest.mark.skipif(not os.environ.get("INFLECTION_SLOW"), reason="compiles C++; INFLECTION_SLOW=1 runs it")
QUANTITIES = ("attention", "activation_grad", "parameter_grad", "output")
VALUES = ("entropy", "entropy_se", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "loss",
          "output_entropy")  # fmt: skip
CONFIG = MonitorConfig(every=1, rows=5, quantities=QUANTITIES)


@pytest.fixture(autouse=True)
def from_the_start():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(called, batch, config=CONFIG, steps=3, micro_batches=2, cast=False, before_step=None, compiled=None):
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
    with Monitor(called, config) as monitor:
        called = called if compiled is None else compiled(called)
        for step in range(steps):
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext():
                    loss = called(**batch).loss
                loss.backward()
            if before_step is not None:
                before_step(step)
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline


def case(kind, blocks=1):
    model, batch = model_and_batch(kind)
    del (model.bert.encoder.layer if kind == "bert" else model.model.layers)[blocks:]  # a second per compiled block
    model.config.num_hidden_layers = blocks
    model.config.problem_type = "single_label_classification"  # or its first forward sets it, and is compiled anew
    return model, batch


def compile_whole(model, **settings):
    return torch.compile(model, **settings)


def compile_in_place(model, **settings):
    model.compile(**settings)
    return model


def assert_close(actual, expected, rtol):
    assert actual.steps.tolist() == expected.steps.tolist()
    for name in VALUES:
        truth = getattr(expected, name)
        np.testing.assert_allclose(getattr(actual, name), truth, rtol=rtol, atol=1e-9, err_msg=name)
    assert np.isfinite(expected.entropy).all() and (expected.entropy_se > 0).any()
    assert np.isfinite(expected.activation_grad).all()


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind, compiled", [("bert", compile_in_place), ("llama", compile_whole)])
def test_values_are_those_of_the_model_as_it_is_written(kind, compiled):
    model, batch = case(kind, blocks=2)
    expected = train(copy.deepcopy(model), batch)
    actual = train(compiled(model, fullgraph=True, backend="aot_eager"), batch)
    assert_close(actual, expected, rtol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize("every", [7, 100])  # at 1 see above
def test_one_graph_at_any_cadence(every):
    model, batch = case("bert")
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    timeline = train(called, batch, MonitorConfig(every=every, quantities=QUANTITIES), steps=9, micro_batches=1)
    assert timeline.steps.tolist() == list(range(0, 9, every))
    assert np.isfinite(timeline.entropy).all() and np.isfinite(timeline.activation_grad).all()
    assert graphs() == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_checkpointing_and_autocast_inside_the_graph(backend):
    model, batch = case("llama")
    model.config.use_cache = False  # or it warns, which breaks the graph
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = train(copy.deepcopy(model), batch, steps=1, cast=True)
    called = torch.compile(model, fullgraph=True, backend=backend)
    actual = train(called, batch, steps=1, cast=True)
    assert_close(actual, expected, rtol=0.05)  # inductor rounds to bfloat16 in other places
    assert graphs() == 1


def test_a_model_that_has_run_compiled_is_compiled_once_more_and_measured():
    model, batch = case("bert")
    expected = train(copy.deepcopy(model), batch)
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    called(**batch).loss.backward()
    model.zero_grad()
    assert_close(train(called, batch), expected, rtol=1e-5)
    assert graphs() == 2


@pytest.mark.parametrize("how", [compile_in_place, compile_whole])
def test_a_model_compiled_after_entering_is_measured_in_its_graph_from_then_on_and_that_is_said(how, caplog):
    model, batch = case("bert")
    expected = train(copy.deepcopy(model), batch)
    with caplog.at_level(logging.WARNING):
        actual = train(model, batch, compiled=lambda model: how(model, fullgraph=True, backend="aot_eager"))
    assert_close(actual, expected, rtol=1e-5)
    assert graphs() == 1  # the first step ran as it is written
    (said,) = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert "compiled after the monitor was entered: from here on it is measured in its graph" in said


def test_models_of_one_class_do_not_share_graphs_with_and_without_taps():
    model, batch = case("bert")
    expected = train(copy.deepcopy(model), batch)
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    other, ran = compiled(copy.deepcopy(model)), []

    def run_other(called):
        ran.append(other(**batch).loss)  # is compiled first, after the monitor was entered
        return called

    def run_between(step):
        ran.append(other(**batch).loss)
        ran[-1].backward()

    with torch._dynamo.config.patch(error_on_recompile=False):
        actual = train(compiled(model), batch, compiled=run_other, before_step=run_between)
    assert_close(actual, expected, rtol=1e-5)
    assert len(ran) == 4 and graphs() == 2


def test_a_graph_captured_without_taps_is_named_at_the_first_measured_step(monkeypatch):
    model, batch = case("bert")
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    called(**batch)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    with pytest.raises(RuntimeError, match="captured without the taps"):
        train(called, batch, MonitorConfig(every=1, quantities=("activation_grad",)))


def test_eager_measuring_is_a_choice():
    model, batch = case("bert")
    expected = train(copy.deepcopy(model), batch)
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = MonitorConfig(every=1, rows=5, quantities=QUANTITIES, compiled="eager")
    assert_close(train(called, batch, eager), expected, rtol=0.0)
    assert counters["stats"]["unique_graphs"] == 0  # every step was measured, and ran as it is written
    with pytest.raises(ValueError, match="compiled: expected one of"):
        MonitorConfig(compiled="always")


def test_what_no_graph_has_taps_for_is_measured_on_steps_that_run_as_written(caplog):
    model, batch = case("bert")
    config = MonitorConfig(every={"attention": 1, "residual": 3}, rows=5, quantities=("attention", "residual"))
    expected = train(copy.deepcopy(model), batch, config, steps=4)
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    with caplog.at_level(logging.WARNING):
        actual = train(called, batch, config, steps=4)
    assert "where ['residual'] are due, measured steps of the compiled model run uncompiled" in caplog.text
    for name in ("entropy", "max_logit", "residual_rms"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    assert np.isfinite(actual.residual_rms[[0, 3]]).all() and np.isnan(actual.residual_rms[[1, 2]]).all()
    assert graphs() == 1


def test_evaluations_and_forwards_that_do_not_go_back_are_in_no_value():
    model, batch = case("bert")
    expected = train(copy.deepcopy(model), batch)
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    other = {name: value[:2] for name, value in batch.items()}

    def evaluate(step):
        with torch.no_grad():
            model(**other)  # as it is written: the compiled one would have a graph of its own
        if step == 1:
            called(**batch)

    assert_close(train(called, batch, before_step=evaluate), expected, rtol=1e-5)


def test_a_copy_of_a_measured_model_is_not_measured_and_a_closed_monitor_leaves_nothing():
    model, batch = case("bert")
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    copies = []
    expected = train(copy.deepcopy(model), batch)

    def average(step):
        copies.append(copy.deepcopy(model))
        copies[-1](**batch).loss.backward()

    assert_close(train(called, batch, before_step=average), expected, rtol=1e-5)
    interface = __import__(type(model).__module__, fromlist=["x"]).ALL_ATTENTION_FUNCTIONS
    assert "get_interface" not in vars(interface)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
