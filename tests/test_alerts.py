"""Alerts: each sickness is told once and at once, and healthy runs are quiet."""

import logging
import math

import numpy as np
import pytest

from inflection_fast.alerts import ALERT_KINDS, AlertConfig, AlertWatch, alert_lines, find_alerts, log_alerts
from inflection_fast.timeline import (
    HEAD_SIGNALS,
    LAYER_SIGNALS,
    STEP_SIGNALS,
    AlertRule,
    Column,
    Timeline,
    TimelineWriter,
)

L, H = 6, 4


def healthy(steps=200, seed=0, noise=0.3, every=10):
    """A run whose norms fall tenfold, with lognormal noise that blocks share in part, and heads that sharpen."""
    rng = np.random.default_rng(seed)
    decay = np.linspace(0, -math.log(10), steps)[:, None]
    depth = np.linspace(0, 2, L)
    norms = {
        name: np.exp(decay + depth + noise * (rng.normal(size=(steps, 1)) + rng.normal(size=(steps, L))))
        for name in ("activation_grad", "parameter_grad")
    }
    heads = {
        "entropy": 0.3 + np.linspace(3, 0.2, steps)[:, None, None] * rng.uniform(0.5, 1, (steps, L, H)),
        "max_logit": np.linspace(5, 60, steps)[:, None, None] + rng.normal(size=(steps, L, H)),
    }
    signals = norms | heads | {"loss": 3 * np.exp(0.1 * rng.normal(size=steps))}
    shapes = [(HEAD_SIGNALS, (steps, L, H)), (LAYER_SIGNALS, (steps, L)), (STEP_SIGNALS, (steps,))]
    others = {name: np.full(shape, np.nan) for names, shape in shapes for name in names}
    layers = [f"block.{i}" for i in range(L)]
    return Timeline(steps=np.arange(steps) * every, **(others | signals), layers=layers, meta={})


def told(alerts):
    return [(a.step, a.kind, a.signal, a.layer, a.head) for a in alerts]


# ---- healthy runs ----------------------------------------------------------------------------------------------------


def test_healthy_runs_raise_no_alert():
    for seed in range(5):
        assert find_alerts(healthy(seed=seed)) == []


def test_noise_raises_no_false_alarm_in_900_000_norms():
    rng = np.random.default_rng(0)
    counts = {}
    for name, draw in {
        "normal 0.3": lambda: 0.3 * rng.normal(size=(300, 512)),
        "normal 2": lambda: 2 * rng.normal(size=(300, 512)),
        "student 4": lambda: 0.5 * rng.standard_t(4, size=(300, 512)),
    }.items():
        watch, count = AlertWatch(), 0
        for step, logs in enumerate(np.concatenate([draw(), draw()], axis=1)):
            signals = {"activation_grad": np.exp(logs[:512]), "parameter_grad": np.exp(logs[512:])}
            count += len(watch.push(step, signals))
        counts[name] = count
    assert counts == {"normal 0.3": 0, "normal 2": 0, "student 4": 0}


def test_one_odd_measurement_is_no_alert():
    run = healthy()
    run.activation_grad[100] *= 1e4
    run.parameter_grad[120] = 0
    run.entropy[130, 1] = 0
    assert find_alerts(run) == []


def test_signals_that_were_not_measured_raise_no_alert():
    run = healthy()
    for name in ("entropy", "max_logit", "activation_grad", "parameter_grad", "loss"):
        getattr(run, name)[:] = np.nan
    assert find_alerts(run) == []


# ---- sick runs -------------------------------------------------------------------------------------------------------


def test_a_head_that_collapses_is_told_once_at_the_third_measurement():
    run = healthy()
    run.entropy[50:, 2, 1] = 0.01
    (alert,) = find_alerts(run)
    assert told([alert]) == [(520, "entropy_collapse", "entropy", 2, 1)]
    assert (alert.value, alert.limit) == (0.01, 0.05)
    assert alert.message == "Step 520: attention entropy of block 2 head 1 is 0.01 nats, below 0.05."


def test_heads_that_were_always_low_are_told_only_on_request():
    run = healthy()
    run.entropy[:, 2, 1] = 0.03  # as a head of MiniLM has it that looks at its neighbour
    assert find_alerts(run) == []
    assert told(find_alerts(run, AlertConfig(entropy_from_start=True))) == [(20, "entropy_collapse", "entropy", 2, 1)]
    run.entropy[70, 2, 1] = 0.06
    assert told(find_alerts(run)) == [(730, "entropy_collapse", "entropy", 2, 1)]


def test_an_alert_comes_again_only_after_it_has_cleared():
    run = healthy()
    run.max_logit[40:50, 0, 0] = 2000
    run.max_logit[44:46, 0, 0] = 30  # two measurements without are not yet clear
    run.max_logit[53:56, 0, 0] = 2000
    run.max_logit[58, 0, 0] = 2000
    assert told(find_alerts(run)) == [
        (420, "max_logit", "max_logit", 0, 0),
        (550, "max_logit", "max_logit", 0, 0),
    ]


def test_exploding_gradients_are_told_against_the_history_of_their_block():
    run = healthy()
    run.activation_grad[120:, 3] *= 300
    alerts = find_alerts(run)
    assert told(alerts) == [(1220, "exploding_gradient", "activation_grad", 3, None)]
    assert alerts[0].value > 3 * alerts[0].limit > 0


def test_dead_gradients_are_told_small_or_exactly_zero():
    run = healthy()
    run.parameter_grad[120:, 3] *= 1e-5
    run.activation_grad[150:, 1] = 0
    assert told(find_alerts(run)) == [
        (1220, "dead_gradient", "parameter_grad", 3, None),
        (1520, "dead_gradient", "activation_grad", 1, None),
    ]


def test_gradients_that_are_zero_from_the_start_are_dead():
    run = healthy(steps=5)
    run.activation_grad[:, 0] = 0
    assert told(find_alerts(run)) == [(20, "dead_gradient", "activation_grad", 0, None)]


def test_gradients_are_not_judged_before_there_is_a_history():
    run = healthy(noise=0.01)
    run.activation_grad[5:] *= 1e3  # a warm-up, as far as one can tell
    run.parameter_grad[:] = np.nan
    assert find_alerts(run) == []


def test_numbers_that_are_lost_are_told_at_once():
    run = healthy()
    run.loss[60:] = np.nan
    run.activation_grad[61:, 2] = np.inf
    run.entropy[62:, 1, 1] = np.nan
    assert told(find_alerts(run)) == [
        (600, "not_finite", "loss", None, None),
        (610, "not_finite", "activation_grad", 2, None),
        (620, "not_finite", "entropy", 1, 1),
    ]
    assert find_alerts(run)[0].message == "Step 600: loss of the step is nan."


def test_a_lost_rank_is_told_at_once_and_again_after_a_resumed_run_had_all():
    run = healthy(every=10)
    run.missing_ranks[:] = 0
    run.missing_ranks[60:70] = run.missing_ranks[90:] = 7
    alerts = find_alerts(run)
    assert told(alerts) == [(step, "rank_lost", "missing_ranks", None, None) for step in (600, 900)]
    assert alerts[0].message == "Step 600: the values of the step are those of one rank alone, 7 missing."


def test_gradients_of_a_step_that_a_scaler_skips_are_not_judged():
    run = healthy()
    run.skipped[:] = 0
    run.skipped[120:126] = 1
    run.activation_grad[120:126] = np.inf
    run.parameter_grad[120:126] *= 1e9
    assert find_alerts(run) == []
    run.skipped[:] = 0
    assert {alert.kind for alert in find_alerts(run)} == {"exploding_gradient", "not_finite"}


def test_a_noisy_block_needs_more_than_a_quiet_one():
    quiet, noisy = healthy(noise=0.1), healthy(noise=1.5)
    for run in (quiet, noisy):
        run.activation_grad[120:123, 3] = 30 * np.median(run.activation_grad[70:120, 3])
    assert told(find_alerts(quiet)) == [(1220, "exploding_gradient", "activation_grad", 3, None)]
    assert find_alerts(noisy) == []


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_every_kind_can_be_switched_off_or_asked_for_alone():
    run = healthy()
    run.entropy[50:, 2, 1] = 0.01
    run.max_logit[50:, 2, 1] = 2000
    run.activation_grad[120:, 3] *= 300
    run.parameter_grad[120:, 3] = 0
    run.loss[150:] = np.nan
    run.missing_ranks[150:] = 7
    assert {a.kind for a in find_alerts(run)} == set(ALERT_KINDS)
    for kind in ALERT_KINDS:
        assert {a.kind for a in find_alerts(run, kinds=[kind])} == {kind}
    off = AlertConfig(entropy=None, max_logit=None, exploding=None, dead=None, not_finite=False, rank_lost=False)
    assert find_alerts(run, off) == []
    with pytest.raises(ValueError, match=r"kinds: expected some of .*, got \['entropy'\]"):
        find_alerts(run, kinds=["entropy"])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("entropy", "low", TypeError),
        ("max_logit", -1.0, ValueError),
        ("max_logit", math.nan, ValueError),
        ("exploding", 1.0, ValueError),
        ("dead", 1.5, ValueError),
        ("deviations", None, TypeError),
        ("measurements", 0, ValueError),
        ("measurements", 1.5, TypeError),
        ("history_least", 51, ValueError),
        ("not_finite", 1, TypeError),
        ("rank_lost", None, TypeError),
        ("entropy_from_start", None, TypeError),
    ],
)
def test_nonsense_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=f"{field}: expected"):
        AlertConfig(**{field: value})


# ---- telling ---------------------------------------------------------------------------------------------------------


def test_many_places_make_one_line_with_the_worst(caplog):
    run = healthy()
    run.max_logit[50:, 2] = 1500
    run.max_logit[50:, 2, 3] = 9000
    alerts, heard = find_alerts(run), []
    assert len(alerts) == H
    with caplog.at_level(logging.WARNING):
        log_alerts(alerts, heard.append)
    line = "Step 520: largest attention logit of block 2 head 3 is 9000, above 1000; 3 other places likewise."
    assert caplog.messages == alert_lines(alerts) == [line]
    assert heard == [alerts]


def test_a_callback_that_raises_stops_nothing(caplog):
    run = healthy()
    run.loss[60:] = np.inf

    def raises(alerts):
        raise RuntimeError("no network")

    with caplog.at_level(logging.WARNING):
        log_alerts(find_alerts(run), raises)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    log_alerts([], raises)  # nothing to tell, nobody called


def test_memory_does_not_grow_with_the_run():
    watch = AlertWatch(AlertConfig(history=10))
    norms = np.ones(L)
    for step in range(100):
        watch.push(step, {"activation_grad": norms * (1 + step % 3)})
    assert [len(logs) for logs in watch._logs.values()] == [10, 0]


# ---- what nobody measured, and rules by column -----------------------------------------------------------------------


def test_no_number_at_the_very_first_measurement_is_told_where_somebody_measured():
    measured = {"loss": np.ma.array(np.nan, mask=False), "activation_grad": np.ma.array([1.0, np.nan], mask=False)}
    assert told(AlertWatch().push(0, measured)) == [
        (0, "not_finite", "activation_grad", 1, None),
        (0, "not_finite", "loss", None, None),
    ]
    assert AlertWatch().push(0, {name: value.data for name, value in measured.items()}) == []  # perhaps nobody did


def test_layers_that_are_dropped_at_random_raise_no_alert():
    rng, watch = np.random.default_rng(0), AlertWatch()
    for step in range(60):
        gone = rng.random(L) < 0.2
        norms = np.ma.array(np.where(gone, np.nan, np.exp(0.1 * rng.normal(size=L))), mask=gone)
        entropy = np.ma.array(np.where(gone[:, None], np.nan, np.ones((L, H))), mask=np.repeat(gone[:, None], H, 1))
        assert watch.push(step, {"activation_grad": norms, "entropy": entropy}) == []
    norms = np.ma.array(np.full(L, 100.0), mask=False)
    norms[2] = np.ma.masked
    found = [alert for step in range(3) for alert in watch.push(step, {"activation_grad": norms})]
    assert [alert.layer for alert in found] == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("written", [False, True])
def test_a_column_brings_its_rules_along_into_the_file(tmp_path, written):
    rules = (AlertRule("below", 0.5, kind="starved", measurements=1), AlertRule("not_finite"))
    columns = {"share": Column("1", ("layer", "expert"), "load", "Share of tokens.", "router", alerts=rules)}
    values = np.array([[0.6, 0.4], [0.9, np.nan], [1.0, np.inf]])
    settings = {"layers": ["a", "b", "c"], "heads": 1, "meta": {}, "columns": columns, "axes": {"expert": 2}}
    with TimelineWriter(tmp_path if written else None, **settings) as out:
        out.append(0, share=values)
    timeline = Timeline.load(tmp_path) if written else out.timeline
    found = find_alerts(timeline)
    assert [(a.kind, a.layer, a.head) for a in found] == [("starved", 0, 1), ("not_finite", 2, 1)]
    assert found[0].message == "Step 0: share of block 0 expert 1 is 0.4, below 0.5." and found[0].limit == 0.5
    assert find_alerts(timeline, kinds=["starved"]) == found[:1]
    assert find_alerts(timeline, AlertConfig(not_finite=False, rules={"share": AlertRule("above", 0.95)})) == []
    assert len(find_alerts(timeline, AlertConfig(measurements=1, rules={"share": AlertRule("above", 0.95)}))) == 2


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: AlertRule("over", 1.0), ValueError, "test: expected one of"),
        (lambda: AlertRule("above"), ValueError, "limit: a rule 'above' needs one"),
        (lambda: AlertRule("above", 1.0, measurements=0), ValueError, "measurements: expected at least 1, got 0"),
        (lambda: AlertConfig(rules=[1]), TypeError, "rules: expected a mapping from columns to rules"),
        (lambda: AlertConfig(rules={"loss": 3.0}), TypeError, "rules: expected AlertRules for 'loss', got 3.0"),
        (lambda: AlertConfig(rules={"loss": AlertRule("above", "hot")}), ValueError, "a rule names 'hot'; expected a"),
        (lambda: AlertWatch(AlertConfig(rules={"losss": ()})), ValueError, "rules: there are no columns"),
    ],
)
def test_rules_that_cannot_be_are_refused_in_a_sentence(make, error, says):
    with pytest.raises(error, match=says):
        make()
