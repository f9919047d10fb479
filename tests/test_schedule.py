"""When to measure, which rows, and configurations that make no sense."""

import dataclasses

import pytest
import torch

from inflection_fast.measure import MonitorConfig
from inflection_fast.measure.schedule import ProbeBudget, RowSampler, is_due

CPU = torch.device("cpu")


def test_steps_are_due_from_zero_on():
    assert [step for step in range(13) if is_due(step, 5)] == [0, 5, 10]
    assert all(is_due(step, 1) for step in range(5))


@pytest.mark.parametrize("length, rows", [(64, 63), (100, 64), (1000, 7), (5, 2)])
def test_one_position_is_drawn_out_of_every_stratum(length, rows):
    sampler = RowSampler(rows, 0, CPU)
    seen = set()
    for step in range(200 if length < 200 else 20):
        sampler.begin(step)
        strata = sampler.draw(length)
        ends = strata.weights.cumsum(0)
        assert strata.rows.shape == strata.weights.shape == (rows,) and ends[-1] == length
        assert ((strata.rows < ends) & (strata.rows >= ends - strata.weights)).all()
        assert strata.weights.max() - strata.weights.min() <= 1
        seen |= set(strata.rows.tolist())
    assert length > 200 or seen == set(range(length))


def test_every_position_is_taken_where_there_are_no_more_than_rows():
    for sampler, length in (
        (RowSampler(None, 0, CPU), 10_000),
        (RowSampler(64, 0, CPU), 64),
        (RowSampler(64, 0, CPU), 3),
    ):
        assert sampler.draw(length).rows is None


def test_draws_depend_on_seed_and_step_alone():
    def rows(seed, step, sampler=None):
        sampler = sampler or RowSampler(8, seed, CPU)
        sampler.begin(step)
        return sampler.draw(500).rows.tolist(), sampler.draw(500).rows.tolist()

    used = RowSampler(8, 3, CPU)
    rows(3, 1, used)
    assert rows(3, 7) == rows(3, 7, used)  # whatever was drawn before: a resumed run samples the same rows
    assert len({str(rows(seed, step)) for seed in range(3) for step in range(3)}) == 9
    first, second = rows(0, 0)
    assert first != second  # micro-batches have draws of their own


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("every", 0, ValueError),
        ("every", 2.0, TypeError),
        ("every", True, TypeError),
        ("rows", 1, ValueError),
        ("rows", "all", TypeError),
        ("signals", (), ValueError),
        ("signals", ("entropy",), ValueError),
        ("signals", ("attention", "attention"), ValueError),
        ("signals", "attention", TypeError),
        ("blocks", "layer", TypeError),
        ("blocks", (), ValueError),
        ("blocks", (1,), TypeError),
        ("probe_every", 15, ValueError),
        ("probe_every", 0, ValueError),
        ("cka_rank", 0, ValueError),
        ("cka_debiased", 1, TypeError),
        ("cka_pooling", "max", ValueError),
        ("cka_rows", 3, ValueError),
        ("cka_reference", "zero", ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**32, ValueError),
        ("seed", None, TypeError),
    ],
)
def test_nonsense_is_refused_by_name_and_value(field, value, error):
    with pytest.raises(error, match=rf"^{field}: expected .*got .*"):
        MonitorConfig(**{field: value})


def test_configurations_are_frozen_and_take_lists():
    config = MonitorConfig(signals=["attention"], blocks=["a", "b"], probe_every=30)
    assert config.quantities == config.signals == ("attention",) and config.blocks == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.every = 3


# ---- the probe's share of the time -----------------------------------------------------------------------------------


def steps_with_a_run(budget, steps, probe_ms, step_ms):
    found = {}
    for step in range(budget.first_step, steps):
        if due := budget.due(step):
            found[step] = sorted(due)
            budget.run(step, due, probe_ms, step_ms)
    return found


def budget_of(every, share, first_step=0):
    return ProbeBudget(every, share, first_step, joined=False, patience_s=0.0)


def test_a_probe_without_a_bound_is_run_as_its_quantities_say():
    found = steps_with_a_run(budget_of({"a": 2, "b": 6}, None), 13, 1e9, 1.0)
    assert found == {0: ["a", "b"], 2: ["a"], 4: ["a"], 6: ["a", "b"], 8: ["a"], 10: ["a"], 12: ["a", "b"]}
    assert list(steps_with_a_run(budget_of({"a": 2}, None, first_step=5), 10, 1.0, 1.0)) == [6, 8]


def test_the_first_second_is_free_and_then_a_run_takes_its_share_of_the_steps_to_the_next():
    every = {"a": 10, "b": 50}
    # Three runs of 400 ms are more than a second; then 400 ms are 1 % of 40 steps of 1000 ms, and 50 is the next of 10.
    found = steps_with_a_run(budget_of(every, 0.01), 200, 400.0, 1000.0)
    assert found == {0: ["a", "b"], 10: ["a"], 20: ["a"], 60: ["a", "b"], 100: ["a", "b"], 140: ["a"], 180: ["a", "b"]}
    assert sum(400.0 for step in found if step >= 20) <= 0.01 * 1000.0 * 200


@pytest.mark.parametrize("cadences", [{"a": 7}, {"a": 6, "b": 10}, {"a": 2**62}, {"a": 3, "b": 2**62}])
def test_the_next_run_is_at_the_next_multiple_of_a_cadence_however_far(cadences):
    for at in (0, 6, 2 * 3 * 5 * 7):
        one = ProbeBudget(cadences, None, at, joined=False, patience_s=0.0)
        nearest = at + one.run(at, cadences, 1.0, 1.0)
        assert nearest > at and any(nearest % every == 0 for every in cadences.values())
        assert all(at // every == (nearest - 1) // every for every in cadences.values())


def test_ranks_decide_by_what_all_of_them_took():
    one, other = (ProbeBudget({"a": 1}, 0.1, 0, joined=True, patience_s=10.0) for _ in range(2))
    for budget in (one, other):
        assert budget.due(0) == {"a"} and budget.run(0, {"a"}, 5000.0, 1.0) is None  # its own times do not count
        assert budget.decide(2000.0, 1000.0) == 20
        assert not budget.due(19) and budget.due(20)
        budget.run(20, {"a"}, 1.0, 1.0)
        assert budget.decide(None, None) == 1  # a rank is lost: nobody knows
        assert budget.due(21)


def test_a_decision_that_does_not_come_is_waited_for_a_while_only():
    budget = ProbeBudget({"a": 1}, 0.1, 0, joined=True, patience_s=0.01)
    budget.run(0, budget.due(0), 1.0, 1.0)
    assert budget.due(1) == {"a"}
