"""Smaller models of planned blocks, models without some, and back."""

import helpers.tiny_models as tiny
import pytest
import torch
import transformers as hf
from helpers.inherited import outputs
from helpers.injected import plan_for
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import find_blocks
from inflection_fast.act import drop, grow, inherit, inherited_blocks


def skipping(model, layers):
    """Run a model with some blocks bypassed, by hooks of the test's own: what dropping means."""

    def bypass(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    blocks = [find_blocks(model)[i] for i in layers]
    return [b.module.register_forward_hook(bypass, with_kwargs=True) for b in blocks]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "gemma2", "vit", "hand-written", "encoder"])
@pytest.mark.parametrize("kept", [(0, 1), (2,), (0, 2)])
def test_the_planned_blocks_run_and_the_others_are_gone(name, kept, tmp_path):
    model, batch = tiny.model_and_batch(name, "eager" if name == "gemma2" else None)
    gone = [i for i in range(3) if i not in kept]
    before = weights(model)
    handles = skipping(model, gone)
    expected = outputs(model, batch)
    for handle in handles:
        handle.remove()
    small = inherit(model, plan_for(model, *kept))
    assert torch.equal(outputs(small, batch), expected)
    assert len(find_blocks(small, None if len(kept) > 1 else [find_blocks(small)[0].name])) == len(kept)
    shared = inherit(model, kept, share=True)
    assert {id(p) for p in shared.parameters()} <= {id(p) for p in model.parameters()}
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}
    with drop(model, gone) as handle:
        assert torch.equal(outputs(model, batch), expected) and handle.layers == gone
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small.parameters())
    after = weights(model)
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    if hasattr(small, "save_pretrained"):
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path, attn_implementation=small.config._attn_implementation)
        assert torch.equal(outputs(again, batch), expected)
        assert small.config.num_hidden_layers == len(kept) and model.config.num_hidden_layers == 3


def test_generation_with_a_cache_works_on_fewer_blocks():
    model, batch = tiny.model_and_batch("llama")
    ids = batch["input_ids"][:1]
    small = inherit(model, (0, 2)).eval()
    with drop(model.eval(), [1]):
        for cached in (True, False):
            options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
            assert torch.equal(model.generate(ids, **options), small.generate(ids, **options))


def test_what_cannot_be_shortened_is_refused_and_nothing_changes():
    t5 = tiny.t5()
    with pytest.raises(ValueError, match=r"its blocks are in 2 lists \(decoder.block, encoder.block\)"):
        inherit(t5, [0, 1])
    encoder = t5.encoder
    with pytest.raises(ValueError, match=r"block 0 holds .*relative_attention_bias.*keep block 0"):
        inherit(encoder, [1])
    model = tiny.bert()
    for act, layers, words in (
        (drop, [0, 1, 2], "all blocks would be dropped"),
        (drop, [3], "expected distinct indices from 0 to 2"),
        (inherit, [], "expected distinct indices"),
    ):
        with pytest.raises(ValueError, match=words):
            act(model, layers)
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 3
    handle = drop(model, [1])
    handle.remove()
    handle.remove()
    assert len(find_blocks(model)) == 3


def test_a_configuration_that_counts_by_index_is_refused():
    sizes = tiny._SIZES | {"num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    config = hf.Qwen3MoeConfig(**sizes, **experts, vocab_size=tiny.VOCAB)
    model = hf.Qwen3MoeForCausalLM(config)
    with pytest.raises(ValueError, match=r"defines the parts of blocks by index"):
        inherit(model, [0, 2])
    assert model.config.num_hidden_layers == 3 and len(find_blocks(inherit(model, [0, 1]))) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "hand-written"])
def test_a_smaller_model_grows_and_keeps_what_it_has_learnt(name, tmp_path):
    model, batch = tiny.model_and_batch(name)
    small = inherit(model, [0])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.01)
    if hasattr(small, "save_pretrained"):
        small.save_pretrained(tmp_path)
        small = type(small).from_pretrained(tmp_path)
    assert inherited_blocks(small) == [0]
    larger = grow(small, model, by=2)
    assert inherited_blocks(larger) == [0, 1, 2] and len(find_blocks(larger)) == 3
    ours, theirs, grown = weights(small), weights(model), weights(larger)
    assert grown.keys() == theirs.keys()
    for key, value in grown.items():
        assert torch.equal(value, ours[key] if key in ours else theirs[key]), key
    assert ours.keys() < grown.keys()
    assert torch.isfinite(outputs(larger, batch)).all()
    for arguments, words in (
        ((small, model, 3), "expected at most 2, the number of blocks after block 0, got 3"),
        ((model, model, 1), "its configuration has no inherited blocks"),
        ((small, model, 0), "by: expected an integer >= 1"),
        ((larger, tiny.distilbert()), "which the smaller model inherited|are not the same there|more blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            grow(*arguments)
