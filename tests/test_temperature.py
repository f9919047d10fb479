"""Attention temperature: what it does to entropy and outputs, its schedule, and that nothing is left."""

import helpers.tiny_models as tiny
import pytest
import torch
from helpers.injected import plan_for
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import Monitor, MonitorConfig, find_blocks
from inflection_fast.act import attention_temperature


def measured_entropy(model, batch):
    with Monitor(model, MonitorConfig(every=1, rows=None, quantities=("attention",))) as monitor:
        tiny.loss_of(model(**batch)).backward()
        monitor.step()
    model.zero_grad()
    return torch.tensor(monitor.timeline.entropy[0])


def sharpened_by(model, batch, layers, temperature):
    """[L, H] float64 entropies where the queries of some blocks are divided in the weights: the truth."""
    model, batch = tiny.in_float64(model, batch)
    for block in [find_blocks(model)[i] for i in layers]:
        with torch.no_grad():
            for name, p in block.module.named_parameters():
                if "q_proj" in name or "attention.self.query" in name:
                    p.div_(temperature)
                elif "c_attn" in name and "attn" in name:
                    p[..., : tiny.WIDTH].div_(temperature)
                elif name in ("mixer.qkv.weight", "mixer.qkv.bias") or ("in_proj" in name):
                    p[: tiny.WIDTH].div_(temperature)
    probabilities = tiny.probabilities(model, batch, double=False)
    masks = tiny.token_masks(batch, len(probabilities))
    return tiny.head_means([tiny.entropy(p) for p in probabilities], masks)


CASES = ["bert", "gpt2", "llama", "hand-written", "weighted", "encoder"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_entropy_is_that_of_scores_divided_by_the_temperature(name, implementation):
    if implementation not in tiny.CASES[name].implementations:
        implementation = None
    model, batch = tiny.model_and_batch(name, implementation)
    before = measured_entropy(model, batch)
    with attention_temperature(model, plan_for(model, 1), start=1.7, end=1.7):
        softened = measured_entropy(model, batch)
    truth = sharpened_by(model, batch, [1], 1.7)
    torch.testing.assert_close(softened, truth, rtol=0, atol=1e-5)
    assert (softened[1] > before[1] + 0.01).all() and torch.equal(softened[0], before[0])
    assert torch.equal(measured_entropy(model, batch), before)


@pytest.mark.parametrize("name", [*CASES, "t5", "vit"])
def test_temperature_one_and_removal_change_nothing_to_the_bit(name):
    model, batch = tiny.model_and_batch(name)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        expected = model(**batch)["logits"]
        with attention_temperature(model, start=1.0, end=1.0):
            assert torch.equal(model(**batch)["logits"], expected)
        with attention_temperature(model, start=3.0):
            assert not torch.allclose(model(**batch)["logits"], expected)
        assert torch.equal(model(**batch)["logits"], expected)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_schedule_ends_and_goes_on_after_a_resume():
    model = tiny.llama()
    handle = attention_temperature(model, [0], start=2.0, end=1.0, steps=4)
    seen = []
    for _ in range(6):
        seen.append(handle.temperature)
        handle.step()
    assert seen == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    handle.load_state_dict({"steps_done": 1})
    assert handle.temperature == 1.75 and float(handle._factor) == pytest.approx(1 / 1.75)
    handle.remove()
    cosine = attention_temperature(model, [0], start=2.0, end=1.0, steps=4, schedule="cosine")
    cosine.set_step(1)
    assert cosine.temperature == pytest.approx(2 - (1 - 2**-0.5) / 2)
    assert "from 2 to 1 in 4 steps (cosine)" in cosine.describe()["words"]
    cosine.remove()


def test_two_temperatures_come_and_go_in_any_order():
    model, batch = tiny.model_and_batch("llama")
    before = measured_entropy(model, batch)
    first = attention_temperature(model, [0], start=2.0, end=2.0)
    second = attention_temperature(model, [1], start=2.0, end=2.0)
    first.remove()
    now = measured_entropy(model, batch)
    assert torch.equal(now[0], before[0]) and (now[1] > before[1]).all()
    second.remove()
    assert torch.equal(measured_entropy(model, batch), before)


def test_gradients_are_those_of_divided_queries_also_under_checkpointing_and_amp():
    model, batch = tiny.model_and_batch("llama")

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with attention_temperature(model, start=1.5, end=1.5):
        expected = gradients()
        model.gradient_checkpointing_enable()
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other)
        model.gradient_checkpointing_disable()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(**batch).loss)


def test_a_compiled_model_follows_without_compiling_anew():
    model, batch = tiny.model_and_batch("llama")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), attention_temperature(model, start=3.0, end=1.0, steps=2) as handle:
        compiled = torch.compile(model, backend=backend)
        for _ in range(3):
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
            count = len(graphs)
            handle.step()
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
            assert len(graphs) == count > 0
    torch._dynamo.reset()


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return self.attention(x).softmax(-1) * x


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 0}, "start: expected a number > 0, got 0"),
        ({"end": -1.0}, "end: expected a number > 0"),
        ({"steps": -1}, "steps: expected an integer >= 0"),
        ({"schedule": "sine"}, r"schedule: expected one of \['cosine', 'linear'\]"),
        ({"layers": [3]}, "layers: expected distinct indices from 0 to 2"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_attached(options, words):
    model, batch = tiny.model_and_batch("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(ValueError, match=words):
            attention_temperature(model, **options)
        assert torch.equal(model(**batch).logits, expected)


def test_attention_that_cannot_be_scaled_is_refused_and_so_is_a_second_temperature():
    with pytest.raises(ValueError, match=r"the attention of 0 uses neither .* so it cannot be scaled"):
        attention_temperature(nn.Sequential(ByHand(), ByHand()))
    model = tiny.llama()
    with attention_temperature(model), pytest.raises(ValueError, match=r"applied already to blocks \[2\]; call remove"):
        attention_temperature(model, 2)
