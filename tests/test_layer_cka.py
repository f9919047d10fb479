"""CKA of all pairs of layers, while a model trains and against the truth."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import in_float64, loss_of, model_and_batch, one_thread  # noqa: F401

from inflection_fast import Monitor, MonitorConfig
from inflection_fast.ops import reference
from inflection_fast.quantities.layer_cka import LayerCka


def states(model, batch):
    model, batch = in_float64(model.eval(), batch)
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True).hidden_states[1:]
    return [state[batch["attention_mask"].bool()] for state in found]


def test_both_matrices_equal_the_truth():
    model, batch = model_and_batch("bert")
    probe = [{name: value for name, value in batch.items() if name != "labels"}]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    start = states(model, batch)
    with Monitor(model.train(), MonitorConfig(every=1, quantities=(LayerCka(every=1),)), probe=probe) as monitor:
        for _ in range(2):
            now = states(model, batch)
            loss_of(model.train()(**batch)).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
        timeline = monitor.timeline
    truth = np.array([[float(reference.linear_cka(a, b)) for b in now] for a in now])
    np.testing.assert_allclose(timeline.layer_cka[1], truth, atol=3e-4)
    moved = np.array([[1 - float(reference.linear_cka(a, b)) for b in start] for a in now])
    np.testing.assert_allclose(timeline.layer_delta_cka[1], moved, atol=3e-4)
    assert np.abs(moved - moved.T).max() > 1e-3  # which side is which shows
    assert timeline.columns["layer_cka"].axes == ("layer", "other_layer")


def test_without_a_reference_no_state_is_kept(tmp_path):
    model, batch = model_and_batch("bert")
    probe = [{name: value for name, value in batch.items() if name != "labels"}]
    now = states(model, batch)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(model.training))
    config = MonitorConfig(every=1, quantities=(LayerCka(every=1),), cka_reference=None)
    with Monitor(model.train(), config, tmp_path, probe=probe) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
        timeline = monitor.timeline
    assert runs == [True, False]  # a training step, and one run of the probe
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.arrows"]
    truth = np.array([[float(reference.linear_cka(a, b)) for b in now] for a in now])
    np.testing.assert_allclose(timeline.layer_cka[0], truth, atol=3e-4)
    assert np.isnan(timeline.layer_delta_cka).all()
    with pytest.raises(ValueError, match="delta_cka: compares with a reference"):
        Monitor(model, MonitorConfig(quantities=("delta_cka",), cka_reference=None), probe=probe)


def test_layers_of_other_stacks_have_no_value():
    model, batch = model_and_batch("t5")
    probe = [
        {name: value for name, value in batch.items() if name != "labels"} | {"decoder_input_ids": batch["labels"]}
    ]
    with Monitor(model, MonitorConfig(every=1, quantities=("layer_cka",)), probe=probe) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
        values = monitor.timeline.layer_cka[0]
    assert np.isfinite(values[:2, :2]).all() and np.isfinite(values[2:, 2:]).all()
    assert np.isnan(values[:2, 2:]).all() and np.isnan(values[2:, :2]).all()


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="at least 1"):
        LayerCka(every=0)
    with pytest.raises(TypeError, match="expected an integer"):
        LayerCka(every=True)
