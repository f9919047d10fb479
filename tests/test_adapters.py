"""Adapters of every kind on named modules, and parts of a model without adapters."""

import copy

import pytest
import torch
from helpers.tiny_models import bert

from inflection_fast.act.adapters import (
    KINDS,
    adapt,
    adapter_parameters,
    bottleneck,
    default_modules,
    eva_ranks,
    kappa_order,
    train_only,
)

QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(3)]


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (4, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return bert().eval()


def test_default_modules_are_those_of_the_wanted_blocks(model):
    assert default_modules(model, [2]) == {2: [QUERIES[2], QUERIES[2].replace("query", "value")]}
    assert list(default_modules(model)) == [0, 1, 2]


def test_every_module_has_its_own_rank_and_the_same_scale(model):
    ranks = {QUERIES[0]: 1, QUERIES[2]: 5}
    adapted = adapt(model, "lora", ranks, scale=2.0)
    for name, rank in ranks.items():
        layer = adapted.base_model.model.get_submodule(name)
        assert layer.lora_A["default"].weight.shape == (rank, 16) and layer.scaling["default"] == 2.0
    assert not hasattr(adapted.base_model.model.get_submodule(QUERIES[1]), "lora_A")
    assert adapter_parameters(adapted) == (1 + 5) * 32


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_little_and_trains_itself_and_the_head_alone(model, kind):
    before = model(**batch()).logits
    weights = copy.deepcopy(model.state_dict())
    adapted = adapt(model, kind, dict.fromkeys(QUERIES, 2), steps=20).eval()
    if kind != "prefix":  # virtual tokens are attended to from the beginning
        assert (adapted(**batch()).logits - before).abs().max() < (1e-3 if kind == "adalora" else 1e-6)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    outside = [n for n in trained if "classifier" not in n]
    marks = ("lora_", "ia3_", "vera_", "prompt_encoder")
    assert outside and all(any(mark in name for mark in marks) for name in outside)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items() if k in model.state_dict())


def test_nonsense_is_refused_and_leaves_the_model_as_it_was(model):
    names = [name for name, _ in model.named_modules()]
    for kind, ranks, words in (
        ("loha", {QUERIES[0]: 1}, "kind: expected one of"),
        ("lora", {}, "at least one module"),
        ("lora", {QUERIES[0]: 0}, "expected at least 1"),
        ("lora", {"bert.nothing": 2}, "has no modules"),
        ("adalora", {QUERIES[0]: 2}, "at least 4 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            adapt(model, kind, ranks)
    assert names == [name for name, _ in model.named_modules()]


def test_parts_of_a_model_without_adapters(model):
    train_only(model, "top", 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("bert.encoder.layer.2.", "bert.pooler", "classifier")) for n in trained)
    with pytest.raises(ValueError, match="3 blocks, got 4"):
        train_only(model, "top", 4)
    with pytest.raises(ValueError, match="expected head, top, bias or all"):
        train_only(model, "middle")


def test_a_bottleneck_begins_as_nothing_and_is_saved_with_its_block(model):
    before = model(**batch()).logits
    adapted = bottleneck(model, [0, 2], width=3)
    assert torch.equal(adapted(**batch()).logits, before)
    with torch.no_grad():
        adapted.bert.encoder.layer[2].bottleneck.up.weight.fill_(0.1)
    assert not torch.equal(adapted(**batch()).logits, before)
    inner = {n for n, p in adapted.named_parameters() if p.requires_grad and "classifier" not in n}
    assert len(inner) == 8 and all(".bottleneck." in n for n in inner)
    assert sum(p.numel() for n, p in adapted.named_parameters() if n in inner) == 2 * (2 * 3 * 16 + 3 + 16)
    with pytest.raises(ValueError, match="expected some of 0 to 2"):
        bottleneck(bert(), [3], width=2)


def test_kappa_puts_the_best_conditioned_module_first(model):
    with torch.no_grad():
        model.get_submodule(QUERIES[1]).weight.copy_(torch.eye(16))
    assert kappa_order(model)[0] == QUERIES[1]


def test_eva_spends_the_ranks_where_inputs_lie_in_few_directions(model):
    names = [name for of_block in default_modules(model).values() for name in of_block]
    ranks = eva_ranks(model, names, 2, [batch(seed) for seed in range(8)])
    assert sum(ranks.values()) == 2 * len(names) and max(ranks.values()) <= 4
    assert eva_ranks(model, names, 2, [batch(seed) for seed in range(8)]) == ranks
