"""The penalty on attention entropy: its value and gradients against float64 autograd, and what it leaves alone."""

import dataclasses
import itertools

import helpers.tiny_models as tiny
import numpy as np
import pytest
import torch
from helpers.injected import plan_for
from helpers.plain_flash import flash, packed_llama  # noqa: F401
from helpers.tiny_models import one_thread  # noqa: F401
from model_types.tiny import batch_of, config_of, model_of
from torch.utils.checkpoint import checkpoint

from inflection_fast import Monitor, MonitorConfig, find_blocks
from inflection_fast.act import attention_entropy_loss, attention_temperature
from inflection_fast.ops import qk_arguments

TARGET = 1.2  # nats, within the range of the tiny models' heads
PENALTY_ONLY = 50.0  # a weight at which nothing else is seen in a gradient


def rows_used(handle, length=tiny.T):
    """Query rows and their weights, as the handle drew them."""
    strata = handle._strata[length]
    rows = torch.arange(length) if strata.rows is None else strata.rows
    return rows, strata.weights.double()


def truth(model, batch, handle):
    """The penalty in float64, with a graph, from the sampled valid rows of the model's own probabilities."""
    model, batch = tiny.in_float64(model, batch)
    probabilities = tiny.probabilities(model, batch, double=False)
    masks = tiny.token_masks(batch, len(probabilities))
    terms = []
    for layer in handle.layers:
        rows, weights = rows_used(handle, probabilities[layer].shape[2])
        p = probabilities[layer]
        entropies = -(p * p.clamp_min(1e-300).log()).sum(-1)[:, :, rows]  # xlogy: NaN where masked
        counted = (masks[layer][:, rows] * weights)[:, None]
        means = (entropies * counted).sum((0, 2)) / counted.sum()
        terms.append(means if handle.heads[layer] is None else means[handle.heads[layer]])
    short = handle.target - torch.cat(terms)
    return model, handle.weight * (short.relu() if handle.mode == "floor" else short).square().mean()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def agree(model, other, rtol=2e-4):
    """Gradients of a key's bias are zero but for rounding, so the largest gradient of all gives the scale as well."""
    theirs = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert scale > 0.01
    for name, p in model.named_parameters():
        expected = theirs.get(name, torch.zeros_like(p, dtype=torch.float64))
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        bound = rtol * float(expected.abs().max()) + 1e-6 * scale
        torch.testing.assert_close(
            ours.double(), expected, rtol=0, atol=bound, msg=lambda words, name=name: name + words
        )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("bert", "sdpa"), ("bert", "eager"), ("gpt2", "sdpa"), ("llama", "sdpa"), ("mistral", "eager"),
     ("gemma2", "eager"), ("vit", "sdpa"), ("encoder", None), ("hand-written", None), ("weighted", None)],
)  # fmt: skip
@pytest.mark.parametrize(("mode", "rows", "heads"), [("floor", None, None), ("near", 4, [1, 3])])
def test_value_and_gradients_are_those_of_float64(name, implementation, mode, rows, heads):
    model, batch = tiny.model_and_batch(name, implementation)
    options = {"mode": mode, "rows": rows, "heads": heads, "weight": PENALTY_ONLY}
    target = 2.5 if name in ("bert", "gemma2", "vit") else TARGET  # which attend more evenly
    with attention_entropy_loss(model, target, [0, 2], **options) as handle:
        model(**batch)
        loss = handle.loss()
        loss.backward()
        double, expected = truth(model, batch, handle)
    assert expected > 0.01
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-7)
    expected.backward()
    agree(model, double)
    assert all(len(means) == (2 if heads else tiny.HEADS) for means in handle.entropies.values())


def test_a_hand_written_softmax_is_seen():
    model = model_of("deberta", config_of("deberta")).train(False)
    batch = batch_of("deberta", model)
    with attention_entropy_loss(model, 5.0, mode="near", rows=None) as handle:
        model(**batch)
        handle.loss().backward()
        entropies = handle.entropies
    with Monitor(model, MonitorConfig(every=1, rows=None, quantities=("attention",))) as monitor:
        model(**batch).last_hidden_state.sum().backward()
        monitor.step()
    for layer, means in entropies.items():
        np.testing.assert_allclose(means, monitor.timeline.entropy[0, layer], atol=2e-6)


def test_training_with_it_keeps_heads_above_the_floor_and_leaves_nothing_behind():
    model, batch = tiny.model_and_batch("llama")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        expected = model(**batch).logits
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with attention_entropy_loss(model, TARGET, weight=1.0, rows=6) as handle:
        assert torch.equal(model(**batch).logits, expected)
        drawn = []
        for _ in range(40):
            model(**batch)
            handle.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            drawn.append(tuple(rows_used(handle)[0].tolist()))
            handle.step()
        assert len(set(drawn)) > 10
        handle.loss()
        lowest = torch.stack([*handle.entropies.values()]).min()
        words = handle.describe()
    assert lowest > 0.8 * TARGET and words["target"] == TARGET and "above 1.2 nats" in words["words"]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", ["llama", "hand-written"])
def test_checkpointing_and_micro_batches_change_nothing(name):
    model, batch = tiny.model_and_batch(name)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]

    def penalised(together):
        model.zero_grad()
        with attention_entropy_loss(model, TARGET, rows=5, weight=PENALTY_ONLY) as handle:
            parts = []
            for half in halves:
                model(**half)
                parts.append(handle.loss())
                if not together:
                    parts.pop().backward()
            if parts:
                sum(parts).backward()
        return gradients(model)

    expected = penalised(together=False)
    if name == "llama":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.checkpoint = lambda block, x: checkpoint(block, x, use_reentrant=False)
    for together in (False, True):
        again = penalised(together)
        assert again.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-6)
    if name == "llama":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        with attention_entropy_loss(model, TARGET) as handle:
            model(**batch)
            with pytest.raises(RuntimeError, match=r"no attention with gradients was seen.*use_reentrant=False"):
                handle.loss()


def test_it_sees_the_attention_that_a_temperature_made_and_a_monitor_sees_neither_twice():
    model, batch = tiny.model_and_batch("gpt2")
    config = MonitorConfig(every=1, rows=None, quantities=("attention",))
    entropies = []
    for order in itertools.permutations(("loss", "temperature")):
        handles = {}
        for which in order:
            if which == "loss":
                handles[which] = attention_entropy_loss(model, TARGET, rows=None, add_to_loss=True)
            else:
                handles[which] = attention_temperature(model, start=2.0, end=2.0)
        with Monitor(model, config) as monitor:
            model(**batch).loss.backward()
            monitor.step()
        found = torch.stack([handles["loss"].entropies[layer] for layer in range(3)])
        np.testing.assert_allclose(found, monitor.timeline.entropy[0], atol=2e-6)
        entropies.append(found)
        for which in order:
            handles[which].remove()
        model.zero_grad()
    assert torch.equal(*entropies)


def test_it_is_added_to_the_loss_of_the_model_and_amp_scales_both():
    model, batch = tiny.model_and_batch("bert")
    plain = model(**batch).loss
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with attention_entropy_loss(model, TARGET, weight=2.0, add_to_loss=True) as handle:
        output = model(**batch)
        torch.testing.assert_close(output.loss, plain + handle.loss())
        output.loss.backward()
        unscaled = gradients(model)
        model.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        for name, expected in unscaled.items():
            torch.testing.assert_close(gradients(model)[name] / 8, expected, rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert handle.loss().isfinite() and model(**batch).loss.isfinite()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, plain)
        with pytest.raises(RuntimeError, match="the model returned no loss; give it labels"):
            model(input_ids=batch["input_ids"])


def test_a_compiled_model_has_the_same_penalty():
    model, batch = tiny.model_and_batch("llama")
    del model.model.layers[1:]  # each breaks the graph, and compiles a few seconds
    with attention_entropy_loss(model, TARGET, rows=5, weight=PENALTY_ONLY) as handle:
        model(**batch)
        expected = handle.loss()
        expected.backward()
        wanted = gradients(model)
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            compiled(**batch)
            loss = handle.loss()
            loss.backward()
            torch.testing.assert_close(loss, expected)
            for name, value in wanted.items():
                torch.testing.assert_close(gradients(model)[name], value, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_nothing_that_is_kept_for_the_backward_pass_has_a_row_for_every_pair():
    model = tiny.llama()
    ids = torch.randint(3, tiny.VOCAB, (1, 300))
    kept = []
    with attention_entropy_loss(model, TARGET, rows=None) as handle:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(input_ids=ids)
            handle.loss()
    assert 0 < max(kept) < 300 * 300


def test_a_resumed_run_draws_the_same_rows_and_a_plan_names_its_heads():
    model, batch = tiny.model_and_batch("llama")
    plan = plan_for(model, 0, 2)
    plan = dataclasses.replace(plan, heads={0: (1,), 2: (0, 3)})
    first = attention_entropy_loss(model, TARGET, plan, rows=4)
    assert first.heads == {0: [1], 2: [0, 3]}
    for _ in range(3):
        first.step()
    model(**batch)
    drawn, state = rows_used(first)[0], first.state_dict()
    first.remove()
    with attention_entropy_loss(model, TARGET, plan, rows=4) as second:
        second.load_state_dict(state)
        model(**batch)
        assert torch.equal(rows_used(second)[0], drawn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": 0}, "target: expected a number > 0, got 0"),
        ({"weight": -1.0}, "weight: expected a number >= 0"),
        ({"rows": 0}, "rows: expected an integer >= 1"),
        ({"mode": "above"}, r"mode: expected one of \['floor', 'near'\]"),
        ({"layers": [3]}, "layers: expected distinct indices from 0 to 2"),
        ({"heads": [4]}, r"heads: expected distinct indices from 0 to 3 in block 0, got \[4\]"),
        ({"heads": {1: [0]}, "layers": [0]}, r"heads: blocks \[1\] are not among the layers \[0\]"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_applied(options, words):
    model, batch = tiny.model_and_batch("llama")
    with pytest.raises(ValueError, match=words):
        attention_entropy_loss(model, **{"target": TARGET} | options)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with attention_entropy_loss(model, TARGET) as handle:
        with pytest.raises(ValueError, match="applied already to blocks"):
            attention_entropy_loss(model, TARGET, [1])
        with pytest.raises(RuntimeError, match="no attention with gradients was seen; call loss"):
            handle.loss()
        with torch.no_grad():
            model(**batch)
        with pytest.raises(RuntimeError, match="no attention with gradients"):
            handle.loss()
    double, batch = tiny.in_float64(model, batch)
    with attention_entropy_loss(double, TARGET), pytest.raises(TypeError, match="attention is in float64"):
        double(**batch)
    assert len(find_blocks(model)) == 3


def test_layers_share_what_is_made_of_packed_sequences_until_the_next_forward(flash, monkeypatch):
    model, batch = packed_llama(flash)
    made, bounds = [], qk_arguments.key_bounds
    monkeypatch.setattr(qk_arguments, "key_bounds", lambda *lengths: made.append(1) or bounds(*lengths))
    with attention_entropy_loss(model, target=TARGET, rows=None) as handle:
        model(**batch)
        assert len(made) == 1 < len(handle.layers)
        of_three = handle.loss()
        batch["position_ids"].copy_(torch.arange(batch["position_ids"].numel()))  # the same tensor, now one sequence
        model(**batch)
        of_one = handle.loss()
    batch["position_ids"] = batch["position_ids"].clone()
    with attention_entropy_loss(model, target=TARGET, rows=None) as handle:
        model(**batch)
        assert handle.loss() == of_one != of_three
