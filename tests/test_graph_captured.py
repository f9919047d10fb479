"""What a tapped graph gives CUDA graphs to capture, and what a training may do around it. No GPU is needed."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.tiny_models import model_and_batch, one_thread  # noqa: F401
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from inflection_fast import find_blocks
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.graph import GraphSlots, TracedTaps

CONFIG = MonitorConfig(every=1, rows=5, quantities=("attention", "activation_grad"))


@pytest.fixture(autouse=True)
def from_the_start():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def case(kind):
    model, batch = model_and_batch(kind)
    model.config.problem_type, model.config.use_cache = "single_label_classification", False
    return model, batch


def traced(kind, backend, device="cpu"):
    """Compile a tapped model and go back through it."""
    model, batch = case(kind)
    model.to(device)
    blocks = find_blocks(model)
    taps = TracedTaps(model, blocks, GraphSlots(len(blocks), 4, 5, torch.device(device)))
    with taps.attached(attention=taps.sees_attention, gradients=True):
        called = torch.compile(model, fullgraph=True, backend=backend)
        called(**{name: value.to(device) for name, value in batch.items()}).loss.backward()


def test_all_that_a_tapped_graph_computes_is_on_the_device_of_the_model():
    """A tensor on the host keeps CUDA graphs from capturing. The model is on a device of its own, "meta"."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return make_boxed_func(graph.forward)

    traced("bert", aot_autograd(fw_compiler=keep, bw_compiler=keep), "meta")
    for tap, graph in zip(("tap_attention", "tap_gradient"), found, strict=True):
        assert tap in graph.code
        values = [node.meta.get("val") for node in graph.graph.nodes]
        assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}


def test_backward_passes_may_follow_several_forwards():
    model, batch = case("llama")

    def train(called):
        with Monitor(called, CONFIG) as monitor:
            for _ in range(2):
                losses = [called(**batch).loss for _ in range(2)]
                for loss in losses:
                    loss.backward()
                monitor.step()
        return monitor.timeline

    expected = train(copy.deepcopy(model))
    actual = train(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name in ("entropy", "collision", "activation_grad"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-5, err_msg=name)
    assert np.isfinite(actual.activation_grad).all() and not counters["graph_break"]


def test_a_step_keeps_nothing_of_its_batch():
    model, batch = case("bert")
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    with Monitor(called, CONFIG) as monitor:
        fresh = {name: value.clone() for name, value in batch.items()}
        kept = [weakref.ref(value) for value in fresh.values()]
        called(**fresh).loss.backward()
        monitor.step()
        del fresh
        gc.collect()
        assert not any(reference() is not None for reference in kept)
