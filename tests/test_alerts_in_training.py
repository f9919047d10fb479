"""Alerts while a model trains: logged, handed over, and never in the way."""

import copy
import logging

import torch
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401

from inflection_fast import AlertConfig, Timeline, find_alerts
from inflection_fast.measure import Monitor, MonitorConfig

EVERY_STEP = MonitorConfig(every=1, rows=None)


def train(model, batch, factors, **options):
    """One step for each factor of the loss."""
    with Monitor(model, EVERY_STEP, **options) as monitor:
        for factor in factors:
            (factor * loss_of(model(**batch))).backward()
            monitor.step()
            model.zero_grad()
    return monitor


SICK = [1.0] * 12 + [1e3] * 3 + [float("nan")]


def test_a_sick_training_is_told_in_log_and_callback_as_its_timeline_tells_it(caplog):
    model, batch = model_and_batch("bert")
    heard = []
    with caplog.at_level(logging.WARNING):
        monitor = train(model, batch, SICK, on_alert=heard.append)
    alerts = [alert for group in heard for alert in group]
    assert list(map(str, alerts)) == list(map(str, find_alerts(monitor.timeline)))  # NaN is not equal to itself
    assert [(alert.step, alert.kind) for alert in alerts][:: len(monitor.blocks)] == [
        (14, "exploding_gradient"),
        (14, "exploding_gradient"),
        (15, "not_finite"),
        (15, "not_finite"),
    ]
    assert len(caplog.messages) == 4 and caplog.messages[0].startswith("Step 14: activation_grad of block ")


def test_healthy_training_is_quiet_and_alerts_can_be_switched_off(caplog):
    model, batch = model_and_batch("bert")
    heard = []
    with caplog.at_level(logging.WARNING):
        train(copy.deepcopy(model), batch, [1.0] * 15, on_alert=heard.append)
        train(model, batch, SICK, on_alert=heard.append, alerts=None)
    assert heard == [] and caplog.messages == []


def test_signals_that_no_step_measures_raise_no_alert(caplog):
    model, batch = model_and_batch("bert")
    with caplog.at_level(logging.WARNING), Monitor(model, EVERY_STEP) as monitor:
        for step in range(4):
            output = model(**batch)
            (loss_of(output) if step < 2 else output["logits"].sum()).backward()
            monitor.step(loss=None if step < 2 else loss_of(output))
    assert caplog.messages == []


def test_a_callback_that_raises_costs_neither_training_nor_timeline(caplog):
    model, batch = model_and_batch("bert")

    def raises(alerts):
        raise ConnectionError("no network")

    with caplog.at_level(logging.WARNING):
        monitor = train(model, batch, SICK, on_alert=raises)
    assert len(monitor.timeline.steps) == len(SICK)
    assert [record.getMessage() for record in caplog.records].count(
        "on_alert raised an exception; training continues"
    ) == 2


def test_a_resumed_run_does_not_tell_again_what_was_told(tmp_path):
    model, batch = model_and_batch("bert")
    heard = []
    config = AlertConfig(max_logit=1e-3)
    train(copy.deepcopy(model), batch, [1.0] * 6, out=tmp_path, alerts=config, on_alert=heard.append)
    assert {alert.step for group in heard for alert in group} == {2}
    before = len(heard)
    train(model, batch, [1.0] * 6, out=tmp_path, start_step=6, alerts=config, on_alert=heard.append)
    assert len(heard) == before
    assert Timeline.load(tmp_path).steps.tolist() == list(range(12))


def test_alerts_leave_no_trace_in_the_model():
    model, batch = model_and_batch("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, batch, SICK)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
