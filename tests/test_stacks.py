"""Selection within one stack of a model: which one, and that nothing of the others counts."""

import helpers.tiny_models as tiny
import numpy as np
import pytest
from helpers.made_timelines import timeline
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import Monitor, MonitorConfig, Plan, SelectConfig, cli, select
from inflection_fast.run.plans import baseline_plan, make_plan
from inflection_fast.timeline import Timeline, TimelineWriter

TEXT, VISION = [0, 2, 3, 5, 6, 8], [1, 4, 7]  # they take turns
STEPS = 12


def stacks(text=60, vision=30, trainable=(0, 0)):
    return [
        {"name": "text", "layers": TEXT, "parameters": text, "trainable": trainable[0]},
        {"name": "vision", "layers": VISION, "parameters": vision, "trainable": trainable[1]},
    ]


def measured(known, lowest=((3, 0.5), (4, 2.0)), steepest=5):
    """The lowest entropy of all is a vision block's; the fall within the text lands on block `steepest`."""
    rng = np.random.default_rng(0)
    entropy = 3 + 0.01 * rng.standard_normal((STEPS, 9))
    gradient = 0.01 * rng.standard_normal((STEPS, 9))
    for layer, depth in lowest:
        entropy[:, layer] -= depth
    gradient[:, [layer for layer in TEXT if layer > steepest]] += 3
    gradient[:, VISION] -= 7  # so that every step from one stack to the other is steeper
    return timeline(entropy, gradient, meta={} if known is None else {"stacks": known})


def test_the_extremes_and_neighbours_are_those_of_the_stack_with_most_parameters():
    plan = select(measured(stacks()))
    assert plan.found == {"entropy minimum": [3], "gradient cliff": [5]}
    assert plan.layers == (2, 3, 5, 6)  # blocks on either side within the stack
    assert "from block 6 the activation gradient norm falls" in plan.reasons[5]
    assert plan.reasons[2] == "Block 2 is next to block 3, the entropy minimum."
    assert "4 of 6 blocks: 2, 3, 5, 6." in plan.summary
    assert "Chosen within the stack text (the one with most parameters) of text, vision." in plan.summary
    assert "without values" not in plan.summary
    assert np.isnan(plan.scores[VISION]).all() and np.isfinite(plan.scores[TEXT]).all()
    assert plan.model["stack"] == {"name": "text", "layers": TEXT} and plan.candidates == TEXT


@pytest.mark.parametrize("method", ["greedy", "maxima", "top", "first", "last", "random", "all", "collapsed"])
def test_no_method_picks_from_two_stacks(method):
    k = 2 if method in ("top", "first", "last", "random") else None
    for stack, layers in (("text", TEXT), ("vision", VISION)):
        plan = select(
            measured(stacks()), SelectConfig(method, k=k, stack=stack, collapsed_entropy=5, significance=None)
        )
        assert plan.layers and set(plan.layers) <= set(layers)
        assert f"Chosen within the stack {stack} (as asked for)" in plan.summary
        assert k is None or len(plan.layers) == k


def test_what_trains_comes_before_what_is_large(tmp_path):
    plan = select(measured(stacks(trainable=(1, 2))), SelectConfig(window=0))
    assert plan.found["entropy minimum"] == [4] and "most trainable parameters" in plan.summary
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.candidates == VISION
    assert set(baseline_plan(again, "random", 2, set(), seed=0)[0].layers) <= set(VISION)
    assert baseline_plan(again, "last", 2, set(), seed=0)[0].layers == (4, 7)
    with pytest.raises(ValueError, match=r"model: layers \[4\] are not those of its stack"):
        Plan(again.layers, "", again.reasons, again.scores, {}, {}, again.model | {"stack": {"layers": [0]}})


@pytest.mark.parametrize(
    ("known", "config", "words"),
    [
        (stacks(), {"stack": "audio"}, "stack: this timeline has no stack 'audio'; it has text, vision"),
        (None, {"stack": "text"}, "does not say which stacks its blocks are in"),
        (
            stacks(),
            {"method": "first", "k": 4, "stack": "vision"},
            "k: 4 layers were asked for, the stack vision has 3",
        ),
        (stacks(), {"stack": ""}, "stack: expected the name"),
    ],
)
def test_a_stack_that_is_not_there_is_refused(known, config, words):
    with pytest.raises(ValueError, match=words):
        select(measured(known), SelectConfig(**config))


def test_a_timeline_without_stacks_or_with_one_is_a_single_stack():
    one = [{"name": "blocks", "layers": list(range(9)), "parameters": 1, "trainable": 0}]
    for known in (None, one):
        plan = select(measured(known), SelectConfig(window=0))
        assert plan.found["entropy minimum"] == [4] and "stack" not in plan.model and "stack" not in plan.summary
        assert plan.candidates == list(range(9))


def test_a_monitor_says_which_stacks_there_are_and_a_plan_is_made_within_one(tmp_path):
    model, batch = tiny.model_and_batch("t5")
    model.encoder.requires_grad_(False)
    with Monitor(model, MonitorConfig(every=1, quantities=("attention", "activation_grad")), tmp_path) as monitor:
        tiny.loss_of(model(**batch)).backward()
        monitor.step()
        blocks = monitor.blocks
    known = Timeline.load(tmp_path).meta["stacks"]
    assert [one["name"] for one in known] == ["encoder", "decoder"]
    for one in known:
        held = [block for block in blocks if block.stack == one["name"]]
        assert one["layers"] == [block.index for block in held]
    assert known[0]["parameters"] > 0 == known[0]["trainable"] and known[1]["trainable"] == known[1]["parameters"]
    chosen, _ = make_plan(tmp_path, SelectConfig("last", k=1), None)
    assert chosen.layers == (known[1]["layers"][-1],)


def test_the_command_line_passes_the_stack(tmp_path, capsys):
    measured_at, made = tmp_path / "a", measured(stacks())
    with TimelineWriter(measured_at, layers=made.layers, heads=made.heads, meta={"stacks": stacks()}) as writer:
        for i, step in enumerate(made.steps):
            writer.append(int(step), entropy=made.entropy[i], activation_grad=made.activation_grad[i])
    assert cli.main(["plan", str(measured_at), "--select.stack", "vision", "--select.window", "0"]) == 0
    assert "within the stack vision" in capsys.readouterr().out
    assert set(Plan.load(measured_at / "plan.json").layers) <= set(VISION)
