import numpy as np
import pytest

pytest.importorskip("datasets")

from inflection_fast.decide import Plan
from inflection_fast.run.plans import baseline_plan


def planned(blocks=3):
    model = {"layers": [f"encoder.{i}" for i in range(blocks)], "model_type": "bert"}
    return Plan((0,), "One block.", {0: "It is first."}, np.zeros(blocks), {}, {"method": "top", "k": 1}, model)


@pytest.mark.parametrize("name", ["last", "first", "random", "all"])
@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 2)])
def test_baselines_take_as_many_layers_without_looking(name, chosen):
    plan, draws = baseline_plan(planned(), name, len(chosen), {chosen}, seed=1)
    wanted = {"last": range(3)[-len(chosen) :], "first": range(len(chosen)), "all": range(3)}
    if name == "random":
        assert len(plan.layers) == len(chosen) and plan.layers != chosen
        again, count = baseline_plan(planned(), name, len(chosen), {chosen}, seed=1)
        assert (again.layers, count) == (plan.layers, draws)
    else:
        assert (plan.layers, draws) == (tuple(wanted[name]), 1)
    assert plan.config["method"] == name and set(plan.reasons) == set(plan.layers)


def test_random_layers_are_drawn_until_they_are_those_of_no_other_stage():
    others = {(0, 1), (1, 2)}
    found = [baseline_plan(planned(), "random", 2, others, seed) for seed in range(20)]
    assert {plan.layers for plan, _ in found} == {(0, 2)}
    assert {1, 2} < {draws for _, draws in found}
    for plan, draws in found:  # the last of the draws is the one that is taken
        assert plan.layers == baseline_plan(planned(), "random", 2, set(), plan.config["seed"])[0].layers
        seed = plan.config["seed"] - draws + 1
        before = [baseline_plan(planned(), "random", 2, set(), seed + i)[0].layers for i in range(draws - 1)]
        assert set(before) <= others
    everything = {(0, 1), (1, 2), (0, 2)}
    assert all(baseline_plan(planned(), "random", 2, everything, seed)[1] == 1 for seed in range(5))
