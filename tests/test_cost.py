"""A race runs its arms interleaved, and its costs are ratios within rounds beside noise."""

import numpy as np
import pytest
from helpers.tiny_models import model_and_batch, one_thread  # noqa: F401

from inflection_fast.measure import MonitorConfig
from inflection_fast.measure.cost import AGAIN, UNMONITORED, Steps, costs, race

CONFIG = MonitorConfig(rows=4, quantities=("attention", "activation_grad", "parameter_grad"))


def test_every_round_runs_every_arm_once_in_an_order_of_its_own():
    calls = []
    times = race({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=60, rounds=40)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 42 and all(sorted(one) == ["a", "b", "c"] for one in rounds)  # two to warm up
    assert len(set(rounds)) == 6
    assert {name: len(values) for name, values in times.items()} == {"a": 40, "b": 40, "c": 40}
    assert len(race({"a": lambda: None}, seconds=0.0)["a"]) == 5  # as many as it takes for a median


def test_costs_are_those_of_rounds_and_do_not_see_drift():
    drift, generator = np.linspace(1, 3, 41), np.random.default_rng(0)
    noise = lambda: 1 + 1e-3 * generator.standard_normal(41)  # noqa: E731
    times = {UNMONITORED: 100 * drift * noise(), AGAIN: 100 * drift * noise(), "measured": 104 * drift * noise()}
    found = {cost.label: cost for cost in costs({name: list(values) for name, values in times.items()})}
    assert found["measured"].added == pytest.approx(0.04, abs=1e-3)
    assert abs(found[AGAIN].added) < 1e-3 and 0 < found[AGAIN].error < 1e-3
    assert found[UNMONITORED].ms == pytest.approx(200, rel=0.01)
    assert {cost.rounds for cost in found.values()} == {41}


def test_of_the_arms_of_a_monitor_one_is_measured_and_others_find_nothing():
    model, batch = model_and_batch("bert")
    steps = Steps(model, batch)
    hooks = lambda: sum(len(module._forward_hooks) for module in model.modules())  # noqa: E731
    seen = []
    with steps.watched(CONFIG) as (measured, idle):
        assert hooks() == 0
        handle = model.register_forward_pre_hook(lambda module, args: seen.append(hooks()))
        for arm in (idle, measured, measured, idle, steps):
            arm()
        handle.remove()
        assert hooks() == 0
    assert [count > 0 for count in seen] == [False, True, True, False, False]
