"""When the probe is run, and what it may be given as."""

import copy

import numpy as np
import pytest
import torch
from helpers.monitored import train
from helpers.probes import CKA, measured_after_moving, moved
from helpers.tiny_models import model_and_batch, one_thread  # noqa: F401

from inflection_fast import Quantity, ops
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


class Seen(Quantity):
    name, data = "seen", "probe"

    def __init__(self):
        self.events = []

    def on_probe(self, sums, probe):
        self.events.append(probe)

    def values(self, sums):
        return {}


@pytest.mark.parametrize(("compare_ms", "rows"), [(9.0, 29), (35.0, 8), (900.0, 5)])
def test_the_budget_thins_out_rows_until_comparing_takes_what_the_forwards_take(compare_ms, rows, monkeypatch):
    monkeypatch.setattr(schedule, "FREE_MS", 0.0)
    monkeypatch.setattr(probing, "FEWEST_ROWS", 4)

    def end(clock):
        clock.last_ms, clock.after_ms = 1e6 + compare_ms * 1e5, compare_ms * 1e5

    monkeypatch.setattr(schedule.ProbeClock, "end", end)
    model, batch = model_and_batch("bert")
    own, all_rows = Seen(), Seen()
    monkeypatch.setattr(schedule.ProbeBudget, "due", lambda self, step: frozenset(self.every))
    config = MonitorConfig(every=1, quantities=("delta_cka", own), seed=3)
    timeline = train(model, batch, 2, config, probe=[batch]).timeline
    model, batch = model_and_batch("bert")
    whole = MonitorConfig(every=1, quantities=("delta_cka", all_rows), seed=3, probe_share=None)
    exact = train(model, batch, 2, whole, probe=[batch]).timeline
    assert timeline.probe_rows.tolist() == [29, rows] and exact.probe_rows.tolist() == [29, 29]
    thinned, of_all = own.events[1], all_rows.events[1]
    thinning = {29: 1, 8: 4, 5: 7}[rows]
    for found, expected in (("features",) * 2, ("reference",) * 2, ("sequences",) * 2):
        for one, other in zip(getattr(thinned, found), getattr(of_all, expected), strict=True):
            torch.testing.assert_close(one, other[::thinning], rtol=0, atol=0)
    x, y = torch.stack(thinned.reference), torch.stack(thinned.features)
    np.testing.assert_allclose(timeline.delta_cka[1], ops.delta_cka(x, y).numpy(), atol=1e-6)


def test_the_budget_spreads_runs_of_the_probe_out(monkeypatch):
    monkeypatch.setattr(schedule, "FREE_MS", 0.0)
    times = iter(range(10**6))
    for module in (probing, schedule):
        monkeypatch.setattr(module, "perf_counter", lambda: next(times) * 1e-3)  # a millisecond between two looks
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
