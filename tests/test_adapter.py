"""The adapter quantity against SVD in float64, and adapters that learn nothing by name."""

import math

import pytest
import torch
from helpers.by_hand import HandParameters, measured, sums_of, values_of
from helpers.tiny_models import bert
from peft import IA3Config, LoraConfig, get_peft_model

from inflection_fast import find_blocks
from inflection_fast.quantities.adapter import Adapter


def adapted(targets=("query", "value"), **options):
    torch.manual_seed(0)
    model = get_peft_model(bert(), LoraConfig(r=4, target_modules=list(targets), **options))
    return model, find_blocks(model)


def train_once(model, lr=0.1):
    ids = torch.randint(0, 40, (3, 8))
    model(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad.sign()


def look(quantity, blocks):
    sums = sums_of(quantity, len(blocks))
    with torch.no_grad():
        quantity.on_backward_end(sums, HandParameters(blocks))
        quantity.on_backward_end(sums, HandParameters(blocks))  # the last call counts
    return values_of(quantity, sums)


def prepared(model, blocks):
    quantity = Adapter()
    quantity.prepare(measured(model, blocks))
    return quantity


def test_norms_ranks_and_shares_equal_those_of_the_product():
    model, blocks = adapted(rank_pattern={"query": 7})
    quantity = prepared(model, blocks)
    for _ in range(2):
        train_once(model)
    found = look(quantity, blocks)
    names = quantity.axes["adapter"]
    assert len(names) == 6 and all(name in dict(model.base_model.model.named_modules()) for name in names)
    norms = {}
    for place, name in enumerate(names):
        layer = model.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        s = torch.linalg.svdvals(b.detach().double() @ a.detach().double())
        p = (s / s.sum())[s > 1e-12 * s[0]]
        norms[name] = s.square().sum().item()
        assert found.adapter_norm[place] == pytest.approx(math.sqrt(norms[name]), rel=1e-9)
        assert found.adapter_rank[place] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)
        gradient = sum(w.grad.double().square().sum() for w in (a, b)).sqrt().item()
        assert found.adapter_gradient[place] == pytest.approx(gradient, rel=1e-6)
        assert found.adapter_idle[place] == 0
    for block in blocks:
        own = sum(value for name, value in norms.items() if name.startswith(block.name + "."))
        assert found.adapter_share[block.index] == pytest.approx(own / sum(norms.values()), rel=1e-9)


def test_adapters_that_learn_nothing_are_told_from_those_that_do():
    model, blocks = adapted()
    quantity = prepared(model, blocks)
    names = list(quantity.axes["adapter"])
    missing, zero, stuck = (model.base_model.model.get_submodule(names[i]) for i in (0, 2, 5))
    missing.lora_A["default"].weight.requires_grad_(False)
    missing.lora_B["default"].weight.requires_grad_(False)
    for _ in range(2):
        model.zero_grad()
        train_once(model)
        with torch.no_grad():
            stuck.lora_B["default"].weight.zero_()
            for w in (zero.lora_A["default"].weight, zero.lora_B["default"].weight):
                w.grad.zero_()
    found = look(quantity, blocks)
    assert found.adapter_idle.tolist() == [1, 0, 1, 0, 0, 1]
    assert found.adapter_gradient[0] != found.adapter_gradient[0] and found.adapter_gradient[2] == 0


def test_a_new_adapter_is_idle_until_its_b_has_moved():
    model, blocks = adapted()
    quantity = prepared(model, blocks)
    ids = torch.randint(0, 40, (3, 8))
    model(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert look(quantity, blocks).adapter_idle.all()
    train_once(model)
    assert not look(quantity, blocks).adapter_idle.any()


def test_several_adapters_have_names_of_their_own_and_only_active_ones_can_be_idle():
    model, blocks = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["key"]))
    model.set_adapter("second")
    quantity = prepared(model, blocks)
    names = quantity.axes["adapter"]
    assert len(set(names)) == 9 and all(name.endswith((":default", ":second")) for name in names)
    train_once(model)
    model.zero_grad()
    train_once(model)
    found = dict(zip(names, look(quantity, blocks).adapter_idle, strict=True))
    assert all(value == 0 for name, value in found.items() if name.endswith(":second"))
    assert all(value != value for name, value in found.items() if name.endswith(":default"))


def test_embeddings_and_other_kinds_of_adapters():
    model, blocks = adapted(("query", "word_embeddings"))
    quantity = prepared(model, blocks)
    place = next(i for i, name in enumerate(quantity.axes["adapter"]) if "word_embeddings" in name)
    for _ in range(2):
        train_once(model)
    layer = model.base_model.model.get_submodule(quantity.axes["adapter"][place])
    product = layer.lora_embedding_B["default"].double() @ layer.lora_embedding_A["default"].double()
    found = look(quantity, blocks)
    assert found.adapter_norm[place] == pytest.approx(product.norm().item(), rel=1e-9)
    assert found.adapter_share.sum() == pytest.approx(1)

    torch.manual_seed(0)
    config = IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    model = get_peft_model(bert(), config)
    blocks = find_blocks(model)
    quantity = prepared(model, blocks)
    train_once(model)
    found = look(quantity, blocks)
    assert (found.adapter_norm != found.adapter_norm).all() and (found.adapter_idle == 0).all()


def test_a_model_without_adapters_is_refused():
    model = bert()
    with pytest.raises(ValueError, match="has no adapters of peft"):
        Adapter().prepare(measured(model, find_blocks(model)))
