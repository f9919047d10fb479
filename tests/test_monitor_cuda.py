"""What only a CUDA device can show of a monitor: that nothing waits, and that the values are those of the CPU."""

import copy
import warnings

import numpy as np
import pytest
import torch
from helpers.packets import ALL as SIGNALS
from helpers.plain_flash import flash, packed_llama  # noqa: F401
from helpers.tiny_models import loss_of, model_and_batch
from torch._dynamo.utils import counters

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.ops import build_info
from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS, Timeline

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (torch.cuda.is_available() and build_info()["cuda"]), reason="no CUDA device or library"),
]
STEPS = 4
ALL = MonitorConfig(every=1, rows=5, signals=SIGNALS)
TRAINING = MonitorConfig(every=1, rows=5, signals=SIGNALS[:3])


def on(device, model, batch):
    return copy.deepcopy(model).to(device), {name: value.to(device) for name, value in batch.items()}


def train(model, batch, config, out=None, *, probe=None, between=lambda step: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Monitor(model, config, out, probe=probe) as monitor:
        for step in range(STEPS):
            between(step)
            loss = loss_of(model(**batch))
            loss.backward()
            monitor.step(loss)
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    return monitor.timeline


@pytest.fixture
def forbidden():
    """A function that makes every wait for the device an error from step 2 on; the first steps may prepare things."""

    def from_step(step):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")

    yield from_step
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [5, None])
def test_a_measured_step_never_waits_for_the_device(forbidden, rows):
    model, batch = on("cuda", *model_and_batch("hand-written"))
    config = MonitorConfig(every=1, rows=rows, signals=SIGNALS[:3])
    timeline = train(model, batch, config, between=forbidden)
    assert timeline.steps.tolist() == list(range(STEPS)) and np.isfinite(timeline.activation_grad).all()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "packed"])
@pytest.mark.parametrize("probe", [False, True])
def test_a_measured_step_waits_no_more_often_than_its_model(name, probe, flash):
    """Transformers look at their masks themselves, and a probe is a forward more."""
    model, batch = on("cuda", *(packed_llama(flash) if name == "packed" else model_and_batch(name)))

    def waits(config, **options):
        counts = []

        def count(step):
            counts.append(len(caught))
            torch.cuda.set_sync_debug_mode("warn")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, batch, config, between=count, **options)
        return sum("synchroniz" in str(one.message) for one in caught[counts[-2] : counts[-1]])

    alone = waits(MonitorConfig(every=10**6, signals=SIGNALS[:3]))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        model(**batch)
        torch.cuda.set_sync_debug_mode("default")
    forward = sum("synchroniz" in str(one.message) for one in caught)
    options = {"probe": [batch]} if probe else {}
    assert waits(ALL if probe else TRAINING, **options) <= alone + probe * forward


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "packed", "t5", "encoder", "hand-written"])
def test_values_are_those_of_the_cpu(name, tmp_path, flash):
    model, batch = packed_llama(flash) if name == "packed" else model_and_batch(name)
    expected = train(*on("cpu", model, batch), ALL, probe=[batch])
    there, there_batch = on("cuda", model, batch)
    train(there, there_batch, ALL, tmp_path, probe=[batch])
    found = Timeline.load(tmp_path)
    assert found.steps.tolist() == expected.steps.tolist()
    for signal in (*HEAD_SIGNALS, *LAYER_SIGNALS, "loss"):
        actual, wanted = getattr(found, signal), getattr(expected, signal)
        np.testing.assert_allclose(actual, wanted, rtol=2e-3, atol=1e-5, err_msg=signal)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_captured_graph_is_measured_by_a_flag_that_the_device_reads(name):
    """CUDA graphs are replayed whole: what is measured at every second step must not depend on what the host saw."""
    model, batch = on("cuda", *model_and_batch(name))
    model.config.problem_type, model.config.use_cache = "single_label_classification", False
    config = MonitorConfig(every=2, rows=5, signals=SIGNALS[:3])
    expected = captured_steps(copy.deepcopy(model), batch, config)[0]
    torch._dynamo.reset()
    counters.clear()
    found, waits = captured_steps(copy.deepcopy(model), batch, config, mode="reduce-overhead", fullgraph=True)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert found.steps.tolist() == [0, 2, 4, 6, 8] and np.isfinite(found.activation_grad).all()
    for signal in ("entropy", "max_logit", "collision", "activation_grad", "parameter_grad", "loss"):
        actual, wanted = getattr(found, signal), getattr(expected, signal)
        np.testing.assert_allclose(actual, wanted, rtol=5e-3, atol=1e-5, err_msg=signal)
    never = MonitorConfig(every=10**6, signals=SIGNALS[:3])
    torch._dynamo.reset()
    alone = captured_steps(model, batch, never, mode="reduce-overhead", fullgraph=True)[1]
    assert waits[-4:] == alone[-4:]  # two steps that are measured and two that are not, when all is captured


def captured_steps(model, batch, config, **compiling):
    """The timeline of ten steps, and how often the host waited for the device in each."""
    called = torch.compile(model, **compiling) if compiling else model
    optimizer, waits = torch.optim.SGD(model.parameters(), lr=0.05), []
    with Monitor(called, config) as monitor:
        for _ in range(10):
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                called(**batch).loss.backward()
                monitor.step()
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(one.message) for one in caught))
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline, waits


def test_a_packet_that_is_still_copied_is_not_overwritten():
    """The device is kept busy, so that every copy is late: the next step must not write before it."""
    model, batch = on("cuda", *model_and_batch("hand-written"))
    calm = train(copy.deepcopy(model), batch, TRAINING)
    busy = train(model, batch, TRAINING, between=lambda step: torch.cuda._sleep(200_000_000))
    for signal in ("entropy", "max_logit", "activation_grad", "parameter_grad", "loss"):
        np.testing.assert_allclose(getattr(busy, signal), getattr(calm, signal), rtol=1e-4, err_msg=signal)


def test_a_gradient_scaler_is_divided_out_on_the_device_and_its_skipped_steps_are_marked():
    model, batch = on("cuda", *model_and_batch("bert"))
    expected = train(copy.deepcopy(model), batch, TRAINING)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1e-12), torch.amp.GradScaler("cuda", 2.0**40)
    stepped = []
    with Monitor(model, TRAINING) as monitor:
        for _ in range(30):
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(model(**batch))
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            monitor.step(loss, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            stepped.append(scaler.get_scale() >= scale)
    skipped = ~np.array(stepped)
    assert skipped[0] and not skipped[-1] and monitor.timeline.skipped.tolist() == skipped.tolist()
    for signal in ("activation_grad", "parameter_grad"):
        np.testing.assert_allclose(getattr(monitor.timeline, signal)[-1], getattr(expected, signal)[0], rtol=0.03)


def test_memory_of_a_monitor_is_its_packet_and_little_else():
    model, batch = on("cuda", *model_and_batch("llama"))
    train(copy.deepcopy(model), batch, TRAINING)  # what libraries allocate once
    loss_of(model(**batch)).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with Monitor(model, TRAINING) as monitor:
        for _ in range(3):
            model.zero_grad(set_to_none=False)
            loss_of(model(**batch)).backward()
            monitor.step()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before <= 2**15  # blocks of 512 bytes, some twenty of them
