"""New weights for heads and feed-forward layers: which numbers change, how they are drawn, and back."""

import dataclasses

import helpers.tiny_models as tiny
import pytest
import torch
from helpers.injected import plan_for
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast.act import reinitialise_heads, reset_feed_forward

D = tiny.WIDTH // tiny.HEADS


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    """{name: boolean mask of the numbers that differ}, without those that did not change at all."""
    masks = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    return {name: mask for name, mask in masks.items() if mask.any()}


def attended(model, batch):
    """[L][B, H, T, T] probabilities and, of block 0, the joined heads before the output projection."""
    return tiny.probabilities(model, batch)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "vit"])
def test_the_attention_of_the_chosen_heads_changes_and_that_of_no_other(name):
    model, batch = tiny.model_and_batch(name)
    model.eval()
    probabilities, before = attended(model, batch), weights(model)
    handle = reinitialise_heads(model, [0], heads=[1, 2] if name != "llama" else [0, 1])
    chosen = [1, 2] if name != "llama" else [0, 1]
    now = attended(model, batch)
    others = [head for head in range(tiny.HEADS) if head not in chosen]
    torch.testing.assert_close(now[0][:, others], probabilities[0][:, others])
    # Fresh weights are small, so the new heads attend nearly uniformly.
    assert (tiny.entropy(now[0])[:, chosen].mean() > tiny.entropy(probabilities[0])[:, chosen].mean() + 0.05).all()
    masks = changed(model, before)
    assert masks and all(".0." in key for key in masks)
    assert sum(int(mask.sum()) for mask in masks.values()) <= handle.numbers
    handle.undo()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert handle.describe()["permanent"] and "got new weights" in handle.describe()["words"]
    with pytest.raises(RuntimeError, match="permanent"):
        handle.remove()


def test_shared_keys_and_values_stay_unless_the_whole_group_is_new():
    model, _ = tiny.model_and_batch("llama")  # 4 heads, 2 groups
    before = weights(model)
    handle = reinitialise_heads(model, [1], heads=[0])
    masks = changed(model, before)
    assert {name.rpartition("self_attn.")[2] for name in masks} == {"q_proj.weight", "o_proj.weight"}
    assert masks["model.layers.1.self_attn.q_proj.weight"][:D].all()
    assert not masks["model.layers.1.self_attn.q_proj.weight"][D:].any()
    assert masks["model.layers.1.self_attn.o_proj.weight"][:, :D].all()
    assert not masks["model.layers.1.self_attn.o_proj.weight"][:, D:].any()
    assert handle.kept_groups == {1: [0]} and "other heads use were kept" in handle.describe()["words"]
    whole = reinitialise_heads(model, [0], heads=[2, 3])
    masks = changed(model, before)
    keys = masks["model.layers.0.self_attn.k_proj.weight"]
    assert keys[D:].all() and not keys[:D].any() and whole.kept_groups == {}


def test_numbers_are_drawn_as_the_architecture_draws_them_and_the_same_on_every_rank():
    model, _ = tiny.model_and_batch("gpt2")
    state = torch.get_rng_state()
    before = weights(model)
    reinitialise_heads(model, [0, 1, 2], seed=5)
    reset_feed_forward(model, [0, 1, 2], seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    std = model.config.initializer_range
    found = {name: p for name, p in model.named_parameters() if ".1." in name and name in changed(model, before)}
    assert found["transformer.h.1.attn.c_attn.weight"].std().item() == pytest.approx(std, rel=0.15)
    scaled = found["transformer.h.1.mlp.c_proj.weight"].std().item()  # GPT-2 scales these by depth
    assert scaled == pytest.approx(std / (2 * model.config.n_layer) ** 0.5, rel=0.15)
    assert not torch.equal(found["transformer.h.1.attn.c_attn.weight"], model.transformer.h[0].attn.c_attn.weight)
    again, _ = tiny.model_and_batch("gpt2")
    reinitialise_heads(again, [0, 1, 2], seed=5)
    reset_feed_forward(again, [0, 1, 2], seed=5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_feed_forwards_are_reset_and_attention_is_not_and_an_optimizer_forgets():
    model, batch = tiny.model_and_batch("bert")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    tiny.loss_of(model(**batch)).backward()
    optimizer.step()
    before = weights(model)
    handle = reset_feed_forward(model, plan_for(model, 2))
    masks = changed(model, before)
    wanted = {f"bert.encoder.layer.2.{part}.dense" for part in ("intermediate", "output")}
    assert {name.rpartition(".")[0] for name in masks} == wanted == set(handle.modules)
    handle.forget(optimizer)
    for name, p in model.named_parameters():
        cleared = not optimizer.state[p]["exp_avg"].any()
        assert cleared == (name.rpartition(".")[0] in wanted) or not p.grad.any()


def test_collapsed_heads_of_a_plan_and_what_cannot_be():
    model, _ = tiny.model_and_batch("bert")
    plan = dataclasses.replace(plan_for(model, 0, 1), heads={0: (3,), 1: (0, 1)})
    before = weights(model)
    handle = reinitialise_heads(model, plan)
    rows = changed(model, before)["bert.encoder.layer.0.attention.self.query.weight"].any(1).nonzero().flatten()
    assert rows.tolist() == list(range(3 * D, 4 * D)) and handle.heads == {0: [3], 1: [0, 1]}
    before = weights(model)
    for options, words in (
        ({"layers": [0], "heads": [4]}, "heads: expected distinct indices from 0 to 3"),
        ({"layers": [9]}, "layers: expected distinct indices"),
        ({"layers": [0], "seed": -1}, "seed: expected an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            reinitialise_heads(model, **options)
    with pytest.raises(ValueError, match=r"weights of nn.MultiheadAttention"):
        reinitialise_heads(tiny.Encoder(), [0])
    other, _ = tiny.model_and_batch("distilbert")
    with pytest.raises(ValueError, match="plan: it was made for a model of type bert"):
        reset_feed_forward(other, plan)
    assert not changed(model, before)


def test_weights_that_were_replaced_are_not_put_back_into_nowhere():
    model = tiny.bert()
    handle = reset_feed_forward(model, [0])
    module = model.get_submodule(handle.modules[0])
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    for call in (handle.undo, lambda: handle.forget(torch.optim.SGD(model.parameters(), 0.1))):
        with pytest.raises(RuntimeError, match="the model has other parameters now"):
            call()
