"""The Monitor watches: it changes nothing while attached, and leaves nothing behind."""

import numpy as np
import pytest
import torch
from models import KINDS, batch, build
from state import state_of
from torch import nn

from inflection_fast import Monitor, MonitorConfig, find_blocks, measure_overhead

EVERY = MonitorConfig(every=1, rows=4)


def train(model, kind, steps=3, monitor=None, freeze=False):
    torch.manual_seed(99)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for s in range(steps):
        loss = model(**batch(kind, seed=s)).loss
        loss.backward()
        if monitor is not None:
            monitor.step(loss=loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
    return losses


def probe(kind):
    return [{k: v for k, v in batch(kind, seed=50).items() if k != "labels"}]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_equal_to_the_bit_with_and_without(kind, attn, frozen):
    if kind == "plain" and attn == "eager":
        pytest.skip("it has no other attention")
    alone, watched = build(kind, dropout=0.1, attn=attn), build(kind, dropout=0.1, attn=attn)
    for model in (alone, watched):
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or any(word in name for word in (".2.", "head", "classifier")))
    plain_losses = train(alone, kind)
    with Monitor(watched, EVERY, probe=probe(kind)) as monitor:
        losses = train(watched, kind, monitor=monitor)
    assert all(torch.equal(a, b) for a, b in zip(plain_losses, losses, strict=True))
    for (name, a), b in zip(alone.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert np.isfinite(monitor.timeline.entropy).all() and np.isfinite(monitor.timeline.delta_cka).all()
    changed = train(build(kind, dropout=0.1, attn=attn, seed=1), kind)
    assert not torch.equal(changed[0], losses[0])


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_equal_to_the_bit_while_attached(kind):
    model, one = build(kind).eval(), batch(kind)
    with torch.no_grad():
        before = model(**one).logits
    with Monitor(model, EVERY):
        attached = model(**one).logits
    with torch.no_grad():
        after = model(**one).logits
    assert torch.equal(before, attached) and torch.equal(before, after)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_as_before_after_leaving(kind, frozen):
    model = build(kind, dropout=0.1)
    if frozen:
        for p in list(model.parameters())[:-2]:
            p.requires_grad_(False)
    model.get_submodule(find_blocks(model)[0].path).register_forward_hook(
        lambda m, a, out: None
    )  # a user's own hook stays
    before = state_of(model)
    with Monitor(model, EVERY, probe=probe(kind)) as monitor:
        train(model, kind, monitor=monitor)
        assert state_of(model) != before or frozen, "nothing is attached at all"
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["forward", "backward", "between", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_as_before_when_training_raises(kind, where):
    model = build(kind, dropout=0.1)
    before, one = state_of(model), batch(kind)
    spoiled = one | {"input_ids": one["input_ids"] + 10_000}
    with pytest.raises((IndexError, RuntimeError, KeyboardInterrupt)):
        with Monitor(model, EVERY, probe=probe(kind)) as monitor:
            if where == "first":
                raise KeyboardInterrupt
            train(model, kind, steps=1, monitor=monitor)
            if where == "forward":
                model(**spoiled)
            loss = model(**one).loss
            if where == "backward":
                loss.backward()
                loss.backward()
            raise KeyboardInterrupt
    assert state_of(model) == before
    assert monitor.timeline.steps.tolist() == ([] if where == "first" else [0])


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_a_model_may_be_watched_again_and_gives_the_same_numbers(kind):
    model, timelines = build(kind), []
    for _ in range(2):
        with Monitor(model, MonitorConfig(every=1, rows=None)) as monitor:
            model(**batch(kind)).loss.backward()
            monitor.step()
            model.zero_grad()
        timelines.append(monitor.timeline)
    assert np.array_equal(timelines[0].entropy, timelines[1].entropy)
    assert np.array_equal(timelines[0].activation_grad, timelines[1].activation_grad)


def test_close_may_be_called_early_and_twice():
    model = build("bert")
    before = state_of(model)
    with Monitor(model, EVERY) as monitor:
        train(model, "bert", steps=1, monitor=monitor)
        monitor.close()
        monitor.close()
        assert state_of(model) == before
    assert monitor.timeline.steps.tolist() == [0]


def test_gradients_are_left_as_backward_made_them():
    for kind in ("bert", "plain"):
        alone, watched, one = build(kind), build(kind), batch(kind)
        alone(**one).loss.backward()
        with Monitor(watched, EVERY, probe=probe(kind)) as monitor:
            watched(**one).loss.backward()
            monitor.step()
        for a, b in zip(alone.parameters(), watched.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)


def test_the_state_of_the_random_generator_is_not_moved():
    model, one = build("bert", dropout=0.0), batch("bert")
    with Monitor(model, EVERY, probe=probe("bert")) as monitor:
        for _ in range(2):
            before = torch.get_rng_state()
            model(**one).loss.backward()
            monitor.step()
            assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_leaves_training_mode_and_dropout_as_they_were():
    model = build("gpt2", dropout=0.1)
    model.transformer.h[1].eval()
    before = {name: m.training for name, m in model.named_modules()}
    with Monitor(model, EVERY, probe=probe("gpt2")) as monitor:
        train(model, "gpt2", steps=2, monitor=monitor)
        assert {name: m.training for name, m in model.named_modules()} == before


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_compiled_model_is_measured_or_refused(kind):
    model, one = build(kind), batch(kind)
    compiled = torch.compile(model, backend="eager")
    try:
        with Monitor(compiled, MonitorConfig(every=1, rows=None)) as monitor:
            compiled(**one).loss.backward()
            monitor.step()
    except (ValueError, RuntimeError, NotImplementedError) as refused:
        assert "compile" in str(refused)
        return
    again = build(kind)
    with Monitor(again, MonitorConfig(every=1, rows=None)) as plain:
        again(**one).loss.backward()
        plain.step()
    assert np.allclose(monitor.timeline.entropy, plain.timeline.entropy, atol=1e-5)
    assert np.allclose(monitor.timeline.activation_grad, plain.timeline.activation_grad, rtol=1e-4)


class NoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_without_attention_is_refused_before_anything_is_attached(tmp_path):
    model = NoAttention()
    before = state_of(model)
    with pytest.raises(ValueError, match="attention"):
        with Monitor(model, EVERY, out=tmp_path / "run"):
            pass
    assert state_of(model) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, word", [
    ({"every": 0}, "every"), ({"every": -1}, "every"), ({"every": 1.5}, "every"), ({"rows": 0}, "rows"),
    ({"rows": -3}, "rows"), ({"rows": 2.5}, "rows"), ({"signals": ("entropie",)}, "entropie"),
    ({"signals": ()}, "signals"), ({"probe_every": 0}, "probe_every"), ({"cka_rank": 0}, "cka_rank"),
    ({"cka_pooling": "max"}, "cka_pooling"), ({"cka_rows": 0}, "cka_rows"), ({"cka_reference": "end"}, "cka_reference"),
    ({"seed": "x"}, "seed"),
])  # fmt: skip
def test_a_bad_configuration_is_refused_by_name(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        MonitorConfig(**options)


def test_a_block_that_does_not_exist_is_named_with_near_matches():
    model = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.") as caught:
        with Monitor(model, MonitorConfig(blocks=("bert.encoder.layers.0",))):
            pass
    assert "layers.0" in str(caught.value) and state_of(model) == before


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_overhead_is_two_medians_and_their_noise_and_leaves_the_model(kind):
    model = build(kind)
    before, weights = state_of(model), [p.detach().clone() for p in model.parameters()]
    overhead = measure_overhead(model, batch(kind), EVERY, pairs=3)
    assert overhead.off_ms > 0 and overhead.on_ms > 0 and overhead.noise >= 0
    assert np.isfinite(overhead.ratio) and overhead.ratio > 0
    assert state_of(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
