"""Arms: what each chooses, what it spends, and that it leaves the model as it was."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.tiny_study import added_arms, tiny_study
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from inflection_fast.blocks import find_blocks
from inflection_fast.run.errors import UserError
from inflection_fast.study.adaptation import NoArm, Spending
from inflection_fast.study.arms import arm_of, arms
from inflection_fast.study.arms_data import breakpoints
from inflection_fast.study.arms_interventions import prepare
from inflection_fast.study.arms_weights import signal_ratio
from inflection_fast.study.store import Store
from inflection_fast.study.training_hooks import training_hooks
from inflection_fast.study.training_loop import train
from inflection_fast.study.work import Work

INTERVENED = ("greedy_temperature", "greedy_entropy_floor", "greedy_head_dropout")
PREPARED = ("greedy_debiased", "blocks_new_heads", "blocks_reset_feed_forward")
LORA_ARMS = ("kappa", "spectrum", "eva", "gradient_high", "gradient_low", "auto_rgn", "block_cka", "breakpoints",
             "first_order", "trial_norm", "trial_sensitivity", "halving", "random", "first", "last", "even", "greedy",
             "maxima", "top", "all_equal", "greedy_debiased", *INTERVENED)  # fmt: skip
OTHERS = ("ia3", "dora", "vera", "prefix", "bottleneck", "ia3_planned", "dora_planned", "vera_planned",
          "bottleneck_planned", "adalora", "lisa", "head", "shallow", "full", "full_rates", "bitfit", "all", "blocks",
          "blocks_new_heads", "blocks_reset_feed_forward", "blocks_sigma")  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    config = tiny_study(tmp_path_factory.mktemp("study"))
    return Work(config, Store.of(config))


def chosen(work, name):
    seen = work.seen("one", "under", name, seed=1)
    seen.learning_rate = 1e-3
    return work.chosen(name, seen), seen


def test_every_arm_has_a_test():
    assert {*LORA_ARMS, *OTHERS} == set(arms())


@pytest.mark.parametrize("name", LORA_ARMS)
def test_a_lora_arm_spends_the_budget(work, name):
    adaptation, _ = chosen(work, name)
    assert adaptation.kind == "lora"
    # query and value of a block: the budget is spent twice
    assert sum(adaptation.ranks.values()) == 2 * work.config.budget
    model = adaptation.apply(work.start("one", "under", 1), 4)
    assert adaptation.parameters(model) == 2 * work.config.budget * 32


@pytest.mark.parametrize("name", [*LORA_ARMS, *OTHERS])
def test_an_arm_leaves_the_model_as_it_was_and_chooses_the_same_again(work, name):
    seen = work.seen("one", "under", name, seed=1)
    seen.learning_rate = 1e-3
    before = copy.deepcopy(seen.model.state_dict())
    flags = [p.requires_grad for p in seen.model.parameters()]
    adaptation = work.chosen(name, seen)
    after = seen.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert flags == [p.requires_grad for p in seen.model.parameters()]
    again, _ = chosen(work, name)
    assert again.key() == adaptation.key() and again.layers == adaptation.layers


@pytest.mark.parametrize("name", OTHERS)
def test_another_adapter_trains(work, name):
    adaptation, _ = chosen(work, name)
    result = work.training("one", "under", 1, adaptation, 1e-3, "test")
    assert result["trainable"] > 0 and result["metrics"]["n"] == work.config.target.test
    assert np.isfinite(result["losses"]).all()


@pytest.mark.parametrize("name", INTERVENED)
def test_an_intervention_changes_the_training_of_the_same_adapters_and_is_taken_back(work, name):
    (plain, _), (adaptation, _) = chosen(work, "greedy"), chosen(work, name)
    assert adaptation.ranks == plain.ranks and adaptation.key() != plain.key()
    result = work.training("one", "under", 1, adaptation, 1e-3, "test")
    assert np.isfinite(result["losses"]).all() and result["trainable"] > 0
    model = adaptation.apply(work.start("one", "under", 1), 4).train()
    batch = {"input_ids": torch.arange(5, 37).view(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():  # attention that is far from uniform
        for parameter in model.parameters():
            parameter.mul_(30 if parameter.dim() > 1 else 1)
    torch.manual_seed(0)
    before = model(**batch).loss
    hooks = training_hooks(adaptation, model, 2, seed=1, learning_rate=1e-3)
    torch.manual_seed(0)
    assert model(**batch).loss != before
    for step in range(2):
        hooks["after_step"](step)
    torch.manual_seed(0)
    assert model(**batch).loss == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert type(ALL_ATTENTION_FUNCTIONS) is AttentionInterface


def test_parameters_of_dora_and_bottleneck_are_close_to_those_of_lora(work):
    spent = {}
    for name in ("all_equal", "dora", "bottleneck"):
        adaptation, _ = chosen(work, name)
        spent[name] = adaptation.parameters(adaptation.apply(work.start("one", "under", 1), 4))
    assert spent["dora"] == spent["all_equal"] + 3 * 2 * 16  # and a magnitude for each output


def test_full_training_trains_everything_and_the_head_nothing_else(work):
    parts = {}
    for name in ("head", "shallow", "bitfit", "full"):
        adaptation, _ = chosen(work, name)
        model = adaptation.apply(work.start("one", "under", 1), 4)
        parts[name] = {n for n, p in model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in model.named_parameters()}
    assert parts["full"] == everything
    assert parts["head"] == {"classifier.weight", "classifier.bias"}
    assert parts["bitfit"] == {n for n in everything if n.endswith("bias")} | parts["head"]
    assert parts["shallow"] == {n for n in everything if ".layer.2." in n or "pooler" in n} | parts["head"]


def test_trials_are_part_of_the_cost(work):
    _, seen = chosen(work, "trial_norm")
    assert seen.cost()["steps"] == 4 and seen.cost()["wall_s"] > 0
    _, seen = chosen(work, "greedy")
    assert seen.cost()["steps"] == work.config.train.steps


def test_ranks_are_as_even_as_whole_numbers_allow():
    assert Spending(12).over([4, 1, 2, 0, 3]) == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}
    with pytest.raises(NoArm, match="cannot share"):
        Spending(2).over([0, 1, 2])


def test_lisa_trains_few_blocks_at_a_time(work):
    adaptation, _ = chosen(work, "lisa")
    model = work.adapted("one", "under", 1, adaptation)
    everything = list(model.parameters())
    hooks = training_hooks(adaptation, model, 4, seed=1, learning_rate=1e-3)
    on = [all(p.requires_grad for p in block.module.parameters()) for block in find_blocks(model)]
    assert sum(on) == 2 and len(on) == 3
    assert [*map(id, hooks["parameters"])] == [*map(id, everything)], "the optimizer knows those that train later"


@pytest.mark.parametrize("name", PREPARED)
def test_an_intervention_before_training_changes_the_model_and_nothing_that_is_not_named(work, name):
    adaptation, _ = chosen(work, name)
    if name == "greedy_debiased":  # the tiny source is not learnt well enough for its guard
        settings = {**adaptation.options["settings"], "least_accuracy": 0.0}
        adaptation = dataclasses.replace(adaptation, options={**adaptation.options, "settings": settings})
    before = work.start("one", "under", 1).state_dict()
    prepared = work.start("one", "under", 1)
    source = work.texts("one").source_parts[0]
    prepare(adaptation, prepared, lambda: source, work.config.train, seed=1)
    changed = {key for key, value in prepared.state_dict().items() if not torch.equal(value, before[key])}
    inside = tuple(f"bert.encoder.layer.{layer}." for layer in adaptation.layers)
    if name == "greedy_debiased":  # all of the model learns to be less sure
        assert "classifier.weight" in changed and any(key.startswith(inside) for key in changed)
        again = work.start("one", "under", 1)
        prepare(adaptation, again, lambda: source, work.config.train, seed=1)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in prepared.state_dict().items())
    else:
        attention = {key for key in changed if ".attention." in key}
        assert changed and all(key.startswith(inside) for key in changed)
        assert changed == attention if name == "blocks_new_heads" else not attention


def test_planned_blocks_train_whole_and_blocks_learn_at_rates_by_their_gradients(work):
    adaptation, _ = chosen(work, "blocks")
    model = work.adapted("one", "under", 1, adaptation)
    inside = tuple(f"bert.encoder.layer.{layer}." for layer in adaptation.layers)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if n.startswith((*inside, "classifier."))}
    adaptation, _ = chosen(work, "full_rates")
    shares = adaptation.options["rates"]
    assert max(shares) == 1 and 0 < min(shares) < 1
    model = work.adapted("one", "under", 1, adaptation)
    groups = training_hooks(adaptation, model, 4, seed=1, learning_rate=0.5)["parameters"]
    assert [group["lr"] for group in groups] == [*(0.5 * share for share in shares), 0.5]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_weights_that_were_reparametrised_are_plain_after_the_training(work):
    adaptation, _ = chosen(work, "blocks_sigma")
    model = work.adapted("one", "under", 1, adaptation)
    names = {name for name, _ in model.named_parameters()}
    hooks = training_hooks(adaptation, model, 2, seed=1, learning_rate=1e-3)
    assert any(name.endswith("weight.0.gamma") for name, _ in model.named_parameters())
    train(model, work.texts("one").split(1).train, work.config.train, learning_rate=1e-2, seed=1, steps=2, **hooks)
    assert {name for name, _ in model.named_parameters()} == names


# ---- the rules themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (37, 911)])
def test_pure_noise_has_no_signal_and_a_planted_one_is_found(shape):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator) * 0.02
    # The largest singular value of noise passes the edge by about its fluctuation, of order n^(-2/3).
    values = torch.linalg.svdvals(noise)
    assert signal_ratio(noise) <= 3 * float(values[0] / values.sum())
    u, v = torch.randn(shape[0], 3, generator=generator), torch.randn(shape[1], 3, generator=generator)
    assert signal_ratio(noise + u @ v.T) > 10 * max(signal_ratio(noise), 0.01)


def test_breakpoints_are_kept_in_the_order_of_the_tolerance():
    way = np.array([[0, 0], [1, 0.1], [2, 3], [3, 0.2], [4, 0], [5, 0]], float)
    kept = breakpoints(way)
    assert kept[0] == kept[5] == np.inf
    assert max((1, 2, 3, 4), key=kept.get) == 2 and kept[2] == 3
    # Points on a line are of no use, and never kept before one that is off it.
    assert min((1, 2, 3, 4), key=kept.get) == 4
    # No point is kept before the one that its side was split at.
    assert all(kept[point] <= kept[2] for point in (1, 3, 4))


def test_an_unknown_arm_is_named_and_a_user_s_arm_is_found(work):
    class Middle:
        draws = False

        def choose(self, seen):
            return seen.lora([1])

    with added_arms(middle=Middle):
        assert arm_of("middle").choose(work.seen("one", "under", "middle", 1)).layers == (1,)
    with added_arms(first=Middle), pytest.raises(UserError, match="has the name of another arm"):
        arms()


def test_a_model_that_peft_knows_no_modules_of_is_adapted_by_its_structure(work):
    known = arm_of("all").choose(work.seen("one", "under", "all", 1))
    seen = work.seen("one", "under", "all", 1)
    seen.model.config.model_type = "made_up"
    assert arm_of("all").choose(seen).layers == known.layers
