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
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx as inductor
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

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
    """Compile a tapped model and go back through it; returns the number of its blocks."""
    model, batch = case(kind)
    model.to(device)
    blocks = find_blocks(model)
    taps = TracedTaps(model, blocks, GraphSlots(len(blocks), 4, 5, torch.device(device)))
    with taps.attached(attention=taps.sees_attention, gradients=True):
        called = torch.compile(model, fullgraph=True, backend=backend)
        called(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
    return len(blocks)


def written(graph):
    """Numbers of the inputs that an operator of the graph writes to."""
    inputs = graph.graph.find_nodes(op="placeholder")
    found = OrderedSet()
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and value in inputs:
                    found.add(inputs.index(value))
    return found


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_taps_write_to_a_tensor_of_fixed_address_and_nothing_is_copied_around_them(kind):
    """Else CUDA graphs are not captured ("mutated inputs"), or every replay writes somewhere else."""
    found = []

    def keep(graph, inputs, *, static_input_idxs=(), **options):
        with V.set_fake_mode(detect_fake_mode([node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")])):
            inductor._recursive_post_grad_passes(graph)  # what is left before code is written
        found.append((graph, list(static_input_idxs)))
        return make_boxed_func(graph.forward)

    layers = traced(kind, lambda graph, inputs: inductor.compile_fx(graph, inputs, inner_compile=keep))
    for tap, (graph, static) in zip(("tap_attention", "tap_gradient"), found, strict=True):
        nodes = graph.graph.find_nodes(op="call_function", target=getattr(torch.ops.inflection_fast, tap).default)
        assert len(nodes) == layers
        (slots,) = changed = written(graph)
        assert check_for_mutation_ignore_cuda_graph_managed_tensor(graph, OrderedSet(), changed, static) is None
        others = set(graph.graph.find_nodes(op="placeholder")[slots].users) - set(nodes)
        # Onto itself, which inductor leaves out when it writes code.
        assert all(one.target is torch.ops.aten.copy_.default and one.args[0] is one.args[1] for one in others)


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
