"""What it costs to see attention that a model writes itself: its softmax is read by the operator on logits."""

from contextlib import ExitStack

import pytest
import torch
from bench_overhead import Training, measuring
from cases import race

ROUNDS = 12


def mpnet():
    """A step of a sentence encoder: MPNet adds a bias of positions to its scores and writes its softmax out."""
    transformers = pytest.importorskip("transformers")
    shape = {
        "hidden_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 2048,
    }
    model = transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**shape))
    batch = {"input_ids": torch.randint(5, 2000, (4, 128)), "labels": torch.arange(4) % 2}
    return Training(model, batch), [layer.attention for layer in model.mpnet.encoder.layer]


def gptj():
    """A step of GPT-J in small: scores in float32, a causal mask, softmax, one block's width of 512."""
    transformers = pytest.importorskip("transformers")
    shape = {"n_embd": 512, "n_layer": 2, "n_head": 8, "rotary_dim": 32, "vocab_size": 2048, "n_positions": 256}
    ids = torch.randint(0, 2048, (2, 256))
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**shape))
    return Training(model, {"input_ids": ids, "labels": ids}), [block.attn for block in model.transformer.h]


def alone(training, attentions):
    """The attention of all blocks by itself, forward and backward, on what it is given in a step."""
    given = []
    hooks = [
        one.register_forward_pre_hook(
            lambda module, args, kwargs: given.append((module, args, kwargs)), with_kwargs=True
        )
        for one in attentions
    ]
    training.step()
    training.model.zero_grad()
    for hook in hooks:
        hook.remove()

    def detached(value):
        is_hidden = isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()
        return value.detach().requires_grad_() if is_hidden else value

    given = [(m, [detached(a) for a in args], {k: detached(v) for k, v in kw.items()}) for m, args, kw in given]
    with torch.no_grad():
        gradients = [torch.randn_like(m(*args, **kw)[0]) for m, args, kw in given]

    def run():
        for (module, args, kwargs), gradient in zip(given, gradients, strict=True):
            module(*args, **kwargs)[0].backward(gradient, inputs=[*module.parameters(), *_hidden(args, kwargs)])
        training.optimizer.zero_grad()

    return run


def _hidden(args, kwargs):
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.requires_grad]


@pytest.mark.parametrize("build", [mpnet, gptj], ids=["MPNet", "GPT-J"])
def bench_attention_by_hand(benchmark, build):
    training, attentions = build()
    attention = alone(training, attentions)

    def shares(median):
        """What measuring adds to a step, in attentions of all blocks: at most 1 is the goal."""
        step, one = median["unmonitored"], median["attention of all blocks, forward and backward"]
        found = {f"attentions: {rows}": (median[rows] - step) / one for rows in ("64 rows", "all rows")}
        return found | {"attentions: noise": (median["unmonitored, again"] - step) / one}

    with ExitStack() as stack:
        rows = {"64 rows": 64, "all rows": None}
        seen = {
            name: stack.enter_context(measuring(training, count, quantities=("attention",)))
            for name, count in rows.items()
        }
        race(
            benchmark,
            f"training step with attention by hand, {build.__doc__.split(':')[0].removeprefix('A step of ')}",
            {
                **seen,
                "unmonitored": training.unmonitored,
                "unmonitored, again": training.unmonitored,
                "attention of all blocks, forward and backward": attention,
            },
            extra=shares,
            rounds=ROUNDS,
        )
