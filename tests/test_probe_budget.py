"""When the probe is run, and what it may be given as."""

import copy

import numpy as np
import pytest
import torch
from test_monitor import train
from test_probe import CKA, measured_after_moving, moved
from tiny_models import model_and_batch, one_thread  # noqa: F401

from inflection_fast.measure import Monitor, MonitorConfig, schedule
from inflection_fast.measure import probe as probing


def test_a_probe_may_be_what_a_tokenizer_or_a_loader_gives():
    transformers = pytest.importorskip("transformers")
    model, batch = model_and_batch("bert")
    expected = measured_after_moving(copy.deepcopy(model), [batch, batch])
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]
    loader = torch.utils.data.DataLoader(rows, batch_size=len(rows))
    one = transformers.BatchEncoding(batch)
    for probe in ([one, one], iter([batch, batch]), (part for part in (batch, one))):
        twin = copy.deepcopy(model)
        with Monitor(twin, CKA, probe=probe) as monitor:
            for _ in range(2):
                twin(**batch).loss.backward()
                monitor.step()
                moved(twin)
        np.testing.assert_array_equal(monitor.timeline.delta_cka, expected)
    for probe in (one, loader):
        assert len(Monitor(model, CKA, probe=probe)._probe._batches) == 1
    with pytest.raises(ValueError, match="probe: it returns other batches the second time"):
        Monitor(model, CKA, probe=torch.utils.data.DataLoader(rows, batch_size=1, shuffle=True))


def test_the_budget_spreads_runs_of_the_probe_out(monkeypatch):
    monkeypatch.setattr(schedule, "FREE_MS", 0.0)
    times = iter(range(10**6))
    monkeypatch.setattr(probing, "perf_counter", lambda: next(times) * 1e-3)  # a millisecond between two looks
    model, batch = model_and_batch("bert")
    config = MonitorConfig(every=2, signals=("activation_grad", "delta_cka"), probe_share=0.2)
    timeline = train(model, batch, 20, config, probe=[batch]).timeline
    ran = np.isfinite(timeline.delta_cka).all(1)
    assert np.isfinite(timeline.activation_grad).all() and ran[0]
    np.testing.assert_array_equal(timeline.steps[ran], np.cumsum([0, *timeline.probe_every[ran][:-1]]))
    least = timeline.probe_ms[ran] / (0.2 * timeline.step_ms[ran])
    assert (timeline.probe_every[ran] >= least).all() and (timeline.probe_every[ran] < least + 2).all()
    assert np.isnan(timeline.probe_every[~ran]).all() and ran.sum() >= 2
    for settings in ({"probe_every": 4}, {"probe_share": None}):  # who names a cadence has it
        config = MonitorConfig(every=2, signals=("delta_cka",), **settings)
        timeline = train(*model_and_batch("bert"), 8, config, probe=[batch]).timeline
        assert np.isfinite(timeline.delta_cka).all(1).tolist() == [True] * len(timeline.steps)
        assert (np.diff(timeline.steps) == settings.get("probe_every", 2)).all()
