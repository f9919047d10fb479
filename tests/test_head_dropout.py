"""Head dropout: which heads, how often, the mean output, and that nothing is left."""

import copy
import dataclasses

import helpers.tiny_models as tiny
import pytest
import torch
from helpers.injected import plan_for
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast import find_blocks
from inflection_fast.act import head_dropout

OUTPUT = {"bert": "attention.output.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}


def joined_heads(model, name, batch, layer):
    """[B, T, H, D]: what the output projection of a block reads, after all hooks."""
    seen = []
    module = find_blocks(model)[layer].module.get_submodule(OUTPUT[name])
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch)
    handle.remove()
    return seen[0].unflatten(-1, (tiny.HEADS, -1))


@pytest.mark.parametrize("name", OUTPUT)
def test_chosen_heads_are_left_out_for_whole_sequences_and_the_others_never(name):
    model, batch = tiny.model_and_batch(name)
    plain = joined_heads(model, name, batch, 0)
    torch.manual_seed(1)
    dropped = 0
    with head_dropout(model, [0, 1], p=0.5, heads={0: [1, 3], 1: [0]}) as handle:
        for _ in range(20):
            heads = joined_heads(model, name, batch, 0)
            assert torch.equal(heads[:, :, [0, 2]], plain[:, :, [0, 2]])
            for sequence, expected in zip(heads, plain, strict=True):
                for head in (1, 3):
                    gone = not sequence[:, head].any()
                    dropped += gone
                    torch.testing.assert_close(sequence[:, head], (0.0 if gone else 2.0) * expected[:, head])
        assert handle.describe()["heads"] == {"0": [1, 3], "1": [0]}
        model.eval()
        assert torch.equal(joined_heads(model, name, batch, 0), plain)
        model.train()
    assert 40 < dropped < 80  # of 120 with probability 1/2
    assert torch.equal(joined_heads(model, name, batch, 0), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recomputed_and_compiled_blocks_leave_out_the_same_heads():
    model, batch = tiny.model_and_batch("llama")

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(3)
        tiny.loss_of(run(**batch)).backward()
        return [p.grad.clone() for p in model.parameters()]

    with head_dropout(model, p=0.5):
        expected = gradients(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for one, other in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(one, other)
        model.gradient_checkpointing_disable()
        compiled = torch.compile(model, backend="eager")
        for one, other in zip(gradients(compiled), expected, strict=True):
            torch.testing.assert_close(one, other)
        torch.manual_seed(3)
        twin = copy.deepcopy(model)(**batch)["logits"]
        torch.manual_seed(3)
        assert torch.equal(twin, model(**batch)["logits"])
    torch._dynamo.reset()


def test_the_heads_of_a_plan_are_taken_and_what_cannot_be_is_refused():
    model, _ = tiny.model_and_batch("bert")
    plan = dataclasses.replace(plan_for(model, 1), heads={1: (2,)})
    with head_dropout(model, plan) as handle:
        assert handle.heads == {1: [2]}
        with pytest.raises(ValueError, match=r"head dropout is applied already to blocks \[1\]"):
            head_dropout(model)
    for options, words in (
        ({"p": 1.0}, r"p: expected a number in \[0, 1\), got 1.0"),
        ({"heads": [7]}, "heads: expected distinct indices from 0 to 3 in block 0"),
        ({"layers": 5}, "layers: expected distinct indices"),
    ):
        with pytest.raises(ValueError, match=words):
            head_dropout(model, **options)
    with pytest.raises(ValueError, match=r"is nn.MultiheadAttention, which does not call its output projection"):
        head_dropout(tiny.Encoder())
    assert not any(module._forward_pre_hooks for module in model.modules())
