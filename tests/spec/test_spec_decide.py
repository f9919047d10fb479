"""ski, select and Plan: the right layers, for reasons that are said, and the same ones every time."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from profiles import BAND, ENTROPY, LOG_GRADIENT, planted, timeline

from inflection_fast import Plan, SelectConfig, select, ski

NAN = float("nan")


def test_ski_of_the_planted_profile_is_high_where_entropy_and_gradient_are_low():
    scores = ski(np.array(ENTROPY), np.exp(LOG_GRADIENT))
    assert scores.shape == (12,) and np.isfinite(scores).all()
    assert scores.min() >= 0 and scores.max() <= 1
    assert set(np.argsort(scores)[-2:]) == {0, 5}


def test_ski_follows_entropy_alone_or_gradient_alone_at_the_ends_of_alpha():
    entropy, gradient = np.array(ENTROPY), np.exp(LOG_GRADIENT)
    assert np.argsort(ski(entropy, gradient, 1.0)).tolist() == np.argsort(-entropy).tolist()
    assert np.argsort(ski(entropy, gradient, 0.0)).tolist() == np.argsort(-gradient).tolist()
    ends = 0.3 * ski(entropy, gradient, 1.0) + 0.7 * ski(entropy, gradient, 0.0)
    assert np.allclose(ski(entropy, gradient, 0.3), ends, atol=1e-12)


@pytest.mark.parametrize("log_gradient", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_lowering_an_entropy_or_a_gradient_never_lowers_that_layers_rank(seed, log_gradient):
    rng = np.random.default_rng(seed)
    entropy, gradient = rng.uniform(0.5, 3, 9), np.exp(rng.normal(size=9))
    before = ski(entropy, gradient, log_gradient=log_gradient)
    for layer in range(9):
        for inputs in ((np.where(np.arange(9) == layer, entropy * 0.8, entropy), gradient),
                       (entropy, np.where(np.arange(9) == layer, gradient * 0.5, gradient))):  # fmt: skip
            after = ski(*inputs, log_gradient=log_gradient)
            assert set(np.flatnonzero(after > after[layer] + 1e-12)) <= set(np.flatnonzero(before > before[layer]))


def test_minmax_ski_does_not_depend_on_units():
    entropy, gradient = np.array(ENTROPY), np.exp(LOG_GRADIENT)
    base = ski(entropy, gradient)
    assert np.allclose(ski(entropy / np.log(2), gradient), base, atol=1e-12)  # bits
    assert np.allclose(ski(entropy, gradient * 1024.0), base, atol=1e-12)  # another scale of the loss
    assert not np.allclose(ski(entropy, gradient, log_gradient=False), base, atol=1e-3)


def test_a_layer_without_a_value_has_no_score_and_changes_no_other():
    entropy, gradient = np.array(ENTROPY), np.exp(LOG_GRADIENT)
    holes = entropy.copy()
    holes[[2, 7]] = NAN
    scores, rest = ski(holes, gradient), ~np.isnan(holes)
    assert np.isnan(scores).tolist() == np.isnan(holes).tolist()
    assert np.allclose(ski(holes, gradient, 1.0)[rest], ski(entropy[rest], gradient[rest], 1.0), atol=1e-12)


def test_ski_changes_no_input_and_takes_lists_of_a_flat_profile():
    entropy, gradient = np.array(ENTROPY), np.exp(LOG_GRADIENT)
    was = entropy.copy(), gradient.copy()
    ski(entropy, gradient)
    assert np.array_equal(entropy, was[0]) and np.array_equal(gradient, was[1])
    flat = ski(np.full(5, 2.0), np.full(5, 0.1))
    assert len(set(np.nan_to_num(flat, nan=-1.0).round(9))) == 1, "a flat profile prefers no layer"


@pytest.mark.parametrize("arguments, options, word", [
    ((np.ones(3), np.ones(4)), {}, "activation_grad"),
    ((np.ones((2, 3)), np.ones((2, 3))), {}, "entropy"),
    ((np.ones(3), np.ones(3), 1.5), {}, "alpha"),
    ((np.ones(3), np.ones(3), -0.1), {}, "alpha"),
    ((np.ones(3), np.ones(3), NAN), {}, "alpha"),
    ((np.ones(3), np.ones(3)), {"normalisation": "z"}, "normalisation"),
    ((np.ones(3), -np.ones(3)), {}, "activation_grad"),
])  # fmt: skip
def test_bad_ski_input_is_a_value_error_that_names_the_argument(arguments, options, word):
    with pytest.raises(ValueError, match=word):
        ski(*arguments, **options)


@pytest.mark.parametrize("cliff", ["steepest", "lowest"])
def test_greedy_gives_the_published_band_on_the_planted_profile(cliff):
    plan = select(planted(), SelectConfig(method="greedy", window=1, cliff=cliff))
    assert tuple(plan.layers) == BAND
    assert set(plan.reasons) == set(BAND) and all(len(reason.split()) >= 3 for reason in plan.reasons.values())
    assert "entropy" in plan.reasons[5].lower() and "gradient" in plan.reasons[0].lower()
    assert np.asarray(plan.scores).shape == (12,)


def test_the_default_configuration_is_greedy_with_window_one():
    assert (SelectConfig().method, SelectConfig().window, SelectConfig().alpha) == ("greedy", 1, 0.5)
    assert tuple(select(planted()).layers) == BAND


@pytest.mark.parametrize("window, layers", [(0, (0, 5)), (1, BAND), (2, (0, 1, 2, 3, 4, 5, 6, 7))])
def test_window_widens_and_stays_inside_the_model(window, layers):
    assert tuple(select(planted(), SelectConfig(window=window)).layers) == layers


def test_steepest_and_lowest_cliff_differ_where_they_should():
    # Falls most from block 8 to block 7, and goes on to its lowest point at block 2.
    fall = [-4.6, -4.8, -5.0, -4.8, -4.7, -4.6, -4.5, -4.4, -1.0, -0.9, -0.8, -0.7]
    entropy = np.roll(ENTROPY, 5)  # minimum at block 10
    steepest = select(timeline(entropy, fall), SelectConfig(window=0, cliff="steepest")).layers
    lowest = select(timeline(entropy, fall), SelectConfig(window=0, cliff="lowest")).layers
    assert 2 in lowest and 10 in lowest and len(lowest) == 2
    assert 10 in steepest and len(steepest) == 2 and set(steepest) & {7, 8} and 2 not in steepest


@pytest.mark.parametrize("method", ["greedy", "maxima", "top"])
def test_the_same_timeline_gives_the_same_plan(method):
    config = SelectConfig(method=method, k=3 if method == "top" else None)
    one, two = select(planted(), config), select(planted(), config)
    assert one.layers == two.layers and one.reasons == two.reasons and one.summary == two.summary
    assert np.array_equal(one.scores, two.scores)
    assert list(one.layers) == sorted(set(one.layers)) and all(type(layer) is int for layer in one.layers)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_top_takes_the_k_best_scores(k):
    plan = select(planted(), SelectConfig(method="top", k=k))
    assert len(plan.layers) == k
    worst_in = min(plan.scores[list(plan.layers)])
    assert all(plan.scores[j] <= worst_in for j in range(12) if j not in plan.layers)


def test_top_takes_a_share_of_the_layers():
    assert len(select(planted(), SelectConfig(method="top", k=0.5)).layers) == 6


def test_maxima_are_local_maxima_of_the_score():
    plan = select(planted(), SelectConfig(method="maxima", window=0))
    padded = np.concatenate([[-1], plan.scores, [-1]])
    peaks = {i for i in range(12) if padded[i + 1] > padded[i] and padded[i + 1] > padded[i + 2]}
    assert plan.layers and set(plan.layers) <= peaks and {0, 5} <= set(plan.layers)


@pytest.mark.parametrize("method", ["greedy", "maxima"])
@pytest.mark.parametrize("seed", range(4))
def test_a_profile_flat_within_its_noise_gives_an_empty_plan_that_says_why(seed, method):
    flat = timeline([2.5] * 12, [-1.0] * 12, noise=0.05, se=0.05, seed=seed)
    plan = select(flat, SelectConfig(method=method))
    assert tuple(plan.layers) == () and not plan.reasons
    assert len(plan.summary.split()) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_a_flat_entropy_adds_no_layer_to_a_real_cliff(seed):
    plan = select(timeline([2.5] * 12, LOG_GRADIENT, noise=0.05, se=0.05, seed=seed))
    assert set(plan.layers) <= {0, 1} and "entropy" in plan.summary.lower()


@pytest.mark.parametrize("seed", range(3))
def test_a_flat_gradient_adds_no_layer_to_a_real_minimum(seed):
    plan = select(timeline(ENTROPY, [-1.0] * 12, noise=0.05, se=0.05, seed=seed))
    assert set(plan.layers) <= {4, 5, 6} and "gradient" in plan.summary.lower()


@pytest.mark.parametrize("method", ["greedy", "maxima", "top"])
def test_layers_without_a_value_are_never_picked(method):
    entropy = np.array(ENTROPY)
    entropy[[3, 9]] = NAN
    plan = select(
        timeline(entropy, LOG_GRADIENT), SelectConfig(method=method, window=0, k=9 if method == "top" else None)
    )
    assert plan.layers and not {3, 9} & set(plan.layers)
    if method == "greedy":
        assert tuple(plan.layers) == (0, 5)


def test_a_step_with_nan_gradients_does_not_spoil_the_others():
    measured = planted()
    measured.activation_grad[4] = NAN
    measured.activation_grad[7, 3] = np.inf
    assert tuple(select(measured).layers) == BAND


@pytest.mark.parametrize("missing", ["entropy", "activation_grad", "everything", "steps"])
def test_a_timeline_without_the_signals_is_refused_or_gives_an_empty_plan_that_says_so(missing):
    absent = ["entropy", "activation_grad"] if missing == "everything" else [missing]
    measured = planted(steps=0 if missing == "steps" else 5, missing=absent)
    try:
        plan = select(measured)
    except ValueError as refused:
        said = str(refused)
    else:
        said = plan.summary
        allowed = {"entropy": {0, 1}, "activation_grad": {4, 5, 6}}.get(missing, set())
        assert set(plan.layers) <= allowed
    wanted = {"entropy": "entropy", "activation_grad": "gradient", "steps": "step"}.get(missing, "")
    assert wanted in said.lower().replace("activation_grad", "gradient") and len(said.split()) >= 3


def test_select_leaves_the_timeline_as_it_was():
    measured = planted()
    before = measured.entropy.copy(), measured.activation_grad.copy()
    select(measured)
    assert np.array_equal(measured.entropy, before[0]) and np.array_equal(measured.activation_grad, before[1])


@pytest.mark.parametrize("options, word", [
    ({"method": "best"}, "method"), ({"window": -1}, "window"), ({"window": 1.5}, "window"), ({"alpha": 2.0}, "alpha"),
    ({"alpha": NAN}, "alpha"), ({"cliff": "deep"}, "cliff"), ({"method": "top", "k": 0}, "k"),
    ({"method": "top", "k": -1}, "k"), ({"method": "top", "k": 1.5}, "k"), ({"normalisation": "z"}, "normalisation"),
])  # fmt: skip
def test_a_bad_configuration_is_refused_by_name(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        SelectConfig(**options)


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(ValueError, match="k"):
        select(planted(), SelectConfig(method="top", k=13))


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelectConfig().window = 3


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan, path = select(planted()), tmp_path / "plan.json"
    plan.save(path)
    again = Plan.load(path)
    assert tuple(again.layers) == BAND and again.reasons == plan.reasons and again.summary == plan.summary
    assert np.allclose(again.scores, plan.scores, equal_nan=True)
    assert again.config == plan.config and again.model == plan.model and again.profile == plan.profile
    assert again.config["method"] == "greedy" and again.config["window"] == 1 and again.config["alpha"] == 0.5
    assert again.model["model_type"] == "toy" and list(again.model["layers"]) == [
        f"encoder.layer.{i}" for i in range(12)
    ]
    assert all(len(values) == 12 for values in again.profile.values())
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_plan_with_nan_and_no_layers_comes_back_from_strict_json(tmp_path):
    entropy = np.array(ENTROPY)
    entropy[3] = NAN
    for name, measured in (("holes", timeline(entropy, LOG_GRADIENT)), ("flat", timeline([2.0] * 6, [-1.0] * 6))):
        plan = select(measured)
        plan.save(tmp_path / name)
        json.loads((tmp_path / name).read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        again = Plan.load(tmp_path / name)
        assert again.layers == plan.layers and np.array_equal(again.scores, plan.scores, equal_nan=True)
        assert again.summary == plan.summary


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"null", b"not json", b"\xff\xfe\x00", b'{"layers": [0, 1]}', b'{"layers": "all"}',
    pickle.dumps(Bomb()), b'{"a": ' * 20, b"7",
])  # fmt: skip
def test_a_file_that_is_no_plan_is_a_value_error(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan"):
        Plan.load(tmp_path / "plan.json")
    assert not (tmp_path / "exploded").exists()


def test_a_plan_cut_anywhere_is_a_value_error(tmp_path):
    select(planted()).save(tmp_path / "plan.json")
    whole = (tmp_path / "plan.json").read_bytes().rstrip()
    for cut in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "cut.json").write_bytes(whole[:cut])
        with pytest.raises(ValueError):
            Plan.load(tmp_path / "cut.json")


@pytest.mark.parametrize("change", [
    {"layers": [0, 99]}, {"layers": [-1]}, {"layers": [1, 1]}, {"layers": [0.5]}, {"layers": ["0"]}, {"scores": [1.0]},
    {"scores": "high"}, {"model": None},
])  # fmt: skip
def test_a_plan_that_contradicts_itself_is_a_value_error(tmp_path, change):
    select(planted()).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert set(change) <= set(content)
    (tmp_path / "plan.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError):
        Plan.load(tmp_path / "plan.json")
