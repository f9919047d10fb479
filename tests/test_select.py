"""Selection: how often it picks from noise, what it finds, and what it says."""

import math

import numpy as np
import pytest
from helpers.made_timelines import L, timeline

from inflection_fast import SelectConfig, select
from inflection_fast.decide.evidence import correlation_of, evidence_of, over_others, t_quantile
from inflection_fast.timeline import TimelineWriter

FLAT = np.zeros(L)
DIP = np.eye(L)[5]  # at block 5
STEP = np.eye(L)[0]  # at block 0


def noise(rng, steps, correlation=0.0, layers=L):
    """Stationary noise [S, L] of variance 1, correlated from step to step."""
    values = [rng.standard_normal(layers)]
    for _ in range(steps - 1):
        fresh = math.sqrt(1 - correlation**2) * rng.standard_normal(layers)
        values.append(correlation * values[-1] + fresh)
    return np.stack(values)


def pure_noise(rng, steps, correlation=0.0):
    """Layers that differ in nothing but how noisy they are, under a level that all of them share."""
    scale = 0.05 * np.exp(0.5 * rng.standard_normal(L))
    shared = rng.standard_normal((steps, 1))
    return timeline(
        2 + scale * noise(rng, steps, correlation) + 0.1 * shared, scale * noise(rng, steps, correlation) + shared
    )


def planted(rng, steps, *, depth, correlation=0.2):
    """A minimum at block 5 and a cliff at block 0, `depth` times as large as the noise of one step."""
    entropy = 2 + 0.05 * (noise(rng, steps, correlation) - depth * DIP)
    gradient = 0.05 * (noise(rng, steps, correlation) - depth * STEP) + rng.standard_normal((steps, 1))
    return timeline(entropy, gradient)


# ---- how often it is wrong, and right --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SelectConfig(), SelectConfig(cliff="lowest"), SelectConfig("maxima"),
                                    SelectConfig("top", k=3)], ids=["steepest", "lowest", "maxima", "top"])  # fmt: skip
@pytest.mark.parametrize(("steps", "correlation"), [(3, 0.0), (8, 0.0), (20, 0.0), (30, 0.6)])
def test_of_pure_noise_at_most_one_profile_in_twenty_gives_a_pick(config, steps, correlation):
    rng = np.random.default_rng(steps)
    runs = 60
    picked = sum(bool(select(pure_noise(rng, steps, correlation), config).layers) for _ in range(runs))
    assert picked <= 0.05 * runs


def test_without_a_test_noise_is_always_picked():
    assert select(pure_noise(np.random.default_rng(0), 20), SelectConfig(significance=None)).layers


@pytest.mark.parametrize(("steps", "depth", "share"), [(4, 20, 0.9), (10, 10, 0.9), (20, 3, 0.9), (60, 2, 0.95)])
def test_a_planted_minimum_and_cliff_are_both_found(steps, depth, share):
    rng = np.random.default_rng(0)
    runs = 40
    found = sum(select(planted(rng, steps, depth=depth)).layers == (0, 1, 4, 5, 6) for _ in range(runs))
    assert found >= share * runs


def test_more_steps_find_what_fewer_cannot():
    def share(steps):
        rng = np.random.default_rng(1)
        return np.mean([5 in select(planted(rng, steps, depth=2)).layers for _ in range(30)])

    assert share(5) < 0.5 < 0.9 < share(60)


def test_a_slowly_wandering_profile_is_not_taken_for_many_measurements():
    rng = np.random.default_rng(0)
    series = noise(rng, 400, 0.9, layers=1)[:, 0]
    evidence = evidence_of(series, 0.0, level=0.05, comparisons=1, correlation=correlation_of(series[:, None]))
    assert evidence.independent_steps == pytest.approx(400 * 0.1 / 1.9, rel=0.5)
    assert evidence.standard_error > 3 * series.std() / 20


# ---- the arithmetic under it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "tail", "t"),
    [(1, 0.025, 12.7062), (2, 0.005, 9.9248), (3, 0.025, 3.1824), (10, 0.0005, 4.5869), (11, 0.05, 1.7959),
     (120, 0.025, 1.9799)],
)  # fmt: skip
def test_the_quantiles_of_student_are_those_of_the_tables(degrees, tail, t):
    assert t_quantile(tail, degrees) == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("layers", [2, 3, 4, 7, 12])
def test_the_median_of_the_others_leaves_the_layer_itself_out(layers):
    values = np.random.default_rng(0).integers(0, 5, (40, layers)).astype(float)
    others = [np.median(np.delete(values, layer, axis=1), axis=1) for layer in range(layers)]
    np.testing.assert_array_equal(over_others(values), values - np.stack(others, axis=1))


def test_independent_steps_have_the_textbook_standard_error():
    series = np.tile([1.0, 3.0], 10)  # anticorrelated, which is not used to claim more than independence
    evidence = evidence_of(series, 0.0, level=0.05, comparisons=1)
    assert evidence.standard_error == pytest.approx(series.std(ddof=1) / math.sqrt(20))
    assert (evidence.difference, evidence.independent_steps) == (2.0, 20)


def test_a_difference_that_is_the_same_in_every_step_is_beyond_chance():
    found = evidence_of(np.full(16, 0.5), 0.0, level=0.05, comparisons=5)
    assert found.standard_error == 0 and found.standard_errors == np.inf and found.holds
    assert not evidence_of(np.full(16, -0.5), 0.0, level=0.05, comparisons=5).holds


def test_the_recorded_sampling_error_is_the_least_that_is_believed():
    level = np.tile(2 - 0.01 * DIP, (4, 1))
    sure, unsure = (select(timeline(level, np.zeros((4, L)), entropy_se=se)) for se in (0.0, 0.02))
    assert sure.layers == (4, 5, 6) and unsure.layers == ()
    assert unsure.profile["entropy_se"][5] == pytest.approx(0.02 / math.sqrt(4), rel=1e-6)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_reasons_carry_the_numbers():
    plan = select(planted(np.random.default_rng(0), 20, depth=20))
    assert plan.layers == (0, 1, 4, 5, 6)
    assert "nats below the median of the other blocks" in plan.reasons[5]
    assert "standard errors, where the lowest of 12 needs" in plan.reasons[5]
    assert "from block 1 the activation gradient norm falls 2.7 times" in plan.reasons[0]  # exp(20 * 0.05)
    assert plan.reasons[4] == "Block 4 is next to block 5, the entropy minimum."
    assert plan.reasons[1] == "Block 1 is next to block 0, the gradient cliff."
    assert "20 measured steps (0 to 190)" in plan.summary


def test_a_plan_from_few_steps_says_that_they_are_few():
    few, enough = (select(planted(np.random.default_rng(0), steps, depth=20)).summary for steps in (4, 5))
    assert "So few steps" in few and "So few steps" not in enough


def test_two_layers_that_are_equally_low_are_said_to_be():
    rng = np.random.default_rng(0)
    entropy = 2 + 0.05 * (noise(rng, 20) - 20 * (DIP + np.eye(L)[9]))
    plan = select(timeline(entropy, noise(rng, 20)), SelectConfig(window=0))
    (reason,) = plan.reasons.values()
    assert set(plan.layers) <= {5, 9} and "is not significantly different" in reason


def test_a_gradient_that_shrinks_evenly_has_no_cliff():
    rng = np.random.default_rng(0)
    even = 0.5 * np.arange(L) + 0.02 * noise(rng, 20)
    plan = select(timeline(2 + 0.05 * noise(rng, 20), even))
    assert plan.layers == () and "no significant cliff" in plan.summary


def test_a_gradient_that_grows_on_its_way_down_has_no_cliff():
    rng = np.random.default_rng(0)
    growing = -np.cumsum(np.where(np.arange(L) == 5, 0.01, 0.5)) + 0.002 * noise(rng, 20)
    assert select(timeline(2 + 0.05 * noise(rng, 20), growing)).layers == ()


def test_one_measured_step_shows_no_noise_and_gives_no_pick():
    one = timeline(2 - DIP[None], -STEP[None])
    plan = select(one)
    assert plan.layers == () and "one measured step gives no standard error" in plan.summary
    assert plan.found == {"entropy minimum": [], "gradient cliff": []}
    picked = select(one, SelectConfig(significance=None))
    assert picked.layers == (0, 1, 4, 5, 6) and picked.found == {"entropy minimum": [5], "gradient cliff": [0]}


def test_with_one_signal_the_plan_says_which_one_is_missing():
    no_entropy = select(timeline(np.full((5, L), np.nan), np.tile(-STEP, (5, 1))), SelectConfig("top", k=1))
    assert no_entropy.layers == (0,) and "Attention entropy was not measured" in no_entropy.summary
    no_gradient = select(timeline(np.tile(2 - DIP, (5, 1)), np.full((5, L), np.nan)), SelectConfig("top", k=1))
    assert no_gradient.layers == (5,) and "The activation gradient was not measured" in no_gradient.summary


def test_what_is_no_timeline_is_refused():
    with pytest.raises(TypeError, match=r"timeline: expected a Timeline \(Timeline.load reads a file\), got str"):
        select("runs/a")


def test_blocks_without_values_are_named():
    entropy = np.tile(np.where(np.arange(L) == 3, np.nan, 2 - DIP), (5, 1))
    assert "Blocks without values: 3." in select(timeline(entropy, np.tile(-STEP, (5, 1)))).summary


def test_top_says_where_its_edge_is_within_the_noise():
    rng = np.random.default_rng(0)
    plan = select(planted(rng, 20, depth=20), SelectConfig("top", k=4))
    assert {0, 5} <= set(plan.layers) and "are not significantly different" in plan.summary


def test_maxima_count_the_edges_and_take_a_plateau_once():
    profile = np.array([0, 3, 3, 3, 0, 4, 4, 1, 2, 5, 5, 5.0])
    plan = select(timeline(np.tile(9 - profile, (5, 1)), np.zeros((5, L))), SelectConfig("maxima", alpha=1.0))
    assert plan.layers == (1, 5, 9)


# ---- which part of the timeline --------------------------------------------------------------------------------------


def moving():
    """The minimum is at block 2 in the first ten steps and at block 8 in the last ten."""
    early, late = np.tile(2 - np.eye(L)[2], (10, 1)), np.tile(2 - np.eye(L)[8], (10, 1))
    return timeline(np.concatenate([early, late]), np.zeros((20, L)))


@pytest.mark.parametrize(
    ("steps", "layer"),
    [((0, 90), 2), ((100, 190), 8), ([100, 190], 8), (0.5, 8)],
    ids=["first", "last", "list", "share"],
)
def test_steps_chooses_the_part_that_decides(steps, layer):
    assert select(moving(), SelectConfig(window=0, steps=steps)).layers == (layer,)


def test_steps_that_were_not_measured_are_an_error():
    with pytest.raises(ValueError, match="none was measured from 500 to 600, only 20 steps from 0 to 190"):
        select(moving(), SelectConfig(steps=(500, 600)))


def test_heads_are_averaged_or_the_lowest_one_counts():
    out = TimelineWriter(None, layers=["a", "b", "c"], heads=2, meta={})
    for step in range(4):
        errors = [[0.1, 0.3]] * 3
        out.append(step, entropy=[[2, 2], [0.9, 0.9], [0.1, 3.1]], entropy_se=errors, activation_grad=np.ones(3))
    mean, lowest = (
        select(out.timeline, SelectConfig(window=0, heads=heads, significance=0.4)) for heads in ("mean", "min")
    )
    assert mean.layers == (1,) and lowest.layers == (2,)
    assert mean.profile["entropy_se"][2] == pytest.approx(0.2 / 2)  # of the mean over heads, over four steps
    assert lowest.profile["entropy_se"][2] == pytest.approx(0.1 / 2)


# ---- baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "k", "layers"),
    [("first", 3, (0, 1, 2)), ("last", 0.25, (9, 10, 11)), ("all", None, tuple(range(12)))],
)
def test_baselines_take_as_many_as_asked_and_say_so(method, k, layers):
    plan = select(pure_noise(np.random.default_rng(0), 5), SelectConfig(method, k=k))
    assert plan.layers == layers
    assert all("a baseline, chosen without the measurement" in reason for reason in plan.reasons.values())


def test_random_layers_come_from_the_seed():
    empty = timeline(np.empty((0, L)), np.empty((0, L)))
    drawn = [select(empty, SelectConfig("random", k=4, seed=seed)).layers for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3 and all(len(set(layers)) == 4 for layers in drawn)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "top"}, "k.*'top'"),
        ({"k": 3}, "k.*'greedy'"),
        ({"method": "top", "k": True}, "k"),
        ({"significance": 0.0}, "significance"),
        ({"steps": (5, 2)}, "steps"),
        ({"steps": 3}, "steps"),
        ({"heads": "max"}, "heads"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SelectConfig(**options)


def test_the_plan_records_configuration_and_model():
    meta = {"model": {"class": "GPT2Model", "model_type": "gpt2", "parameters": 3}, "config": {"blocks": ["h.0"]}}
    plan = select(timeline(np.empty((0, 1)), np.empty((0, 1)), meta=meta), SelectConfig(steps=(3, 4)))
    assert plan.config["steps"] == [3, 4] and plan.config["significance"] == 0.05
    assert plan.model == {"model_type": "gpt2", "class": "GPT2Model", "named": True, "layers": ["h.0"]}


@pytest.mark.parametrize(
    "name", ["lazy_rank", "lazy_mass", "collapsed_entropy", "significance", "log_gradient", "alpha"]
)
@pytest.mark.parametrize("value", ["0.5", [0.5], {"0": 1}, object()], ids=type)
def test_an_option_of_the_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected"):
        SelectConfig(**{name: value})
