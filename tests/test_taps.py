"""Taps leave a model as it is, count only what is part of training, and refuse what they cannot see."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.attention_measured import ALL_ROWS, PAIRS, measured
from helpers.tiny_models import HEADS, VOCAB, HandWritten, bert, gpt2, in_float64, loss_of, model_and_batch, one_thread  # noqa: F401
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig

hf = pytest.importorskip("transformers")


# ---- leaving the model as it is --------------------------------------------------------------------------------------


def everything_attached(model):
    """Hooks, and whatever else could be left behind on a model or on the attention interface."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in vars(module)
        if "hooks" in name and isinstance(getattr(module, name), dict)
    ]
    return sum(hooks), dict(vars(ALL_ATTENTION_FUNCTIONS)), torch._C._len_torch_function_stack()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name, implementation", PAIRS)
def test_outputs_and_gradients_are_equal_to_the_bit(name, implementation, frozen):
    model, batch = model_and_batch(name, implementation)
    if frozen:
        model.requires_grad_(False)
        list(model.parameters())[-1].requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    results = []
    for monitored in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        if monitored:
            clean = everything_attached(model)
            with Monitor(model, MonitorConfig(every=1, rows=5)) as monitor:
                output = model(**batch)
                assert everything_attached(model)[1:] == clean[1:]  # the interface and the modes: inside forward only
                loss_of(output).backward()
                monitor.step()
            assert everything_attached(model) == clean
        else:
            output = model(**batch)
            loss_of(output).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((output["logits"], output["loss"], torch.get_rng_state(), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert implementation is None or model.config._attn_implementation == implementation


def test_steps_off_the_schedule_have_no_hooks():
    model, batch = model_and_batch("bert")
    clean = everything_attached(model)
    with Monitor(model, MonitorConfig(every=3)) as monitor:
        for step in range(5):
            assert monitor.measuring == (step % 3 == 0)
            assert (everything_attached(model) == clean) == (step % 3 != 0)
            loss_of(model(**batch)).backward()
            monitor.step()
    assert monitor.timeline.steps.tolist() == [0, 3]


@pytest.mark.parametrize("name", ["bert", "hand-written"])
@pytest.mark.parametrize("where", ["forward", "between"])
def test_everything_is_detached_when_training_raises(name, where):
    model, batch = model_and_batch(name)
    clean = everything_attached(model)
    broken = list(model.modules())[-1]

    def fail(*_):
        raise KeyboardInterrupt  # no Exception: torch runs no "always called" hook for it

    handle = broken.register_forward_pre_hook(fail) if where == "forward" else None
    with pytest.raises(KeyboardInterrupt):
        with Monitor(model, ALL_ROWS):
            model(**batch)
            fail()
    if handle is not None:
        handle.remove()
    assert everything_attached(model) == clean


def test_a_forward_that_raises_is_forgotten():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch).entropy
    with Monitor(model, ALL_ROWS) as monitor:
        with pytest.raises(IndexError):
            model(**batch | {"input_ids": batch["input_ids"].flip(0, 1), "labels": torch.tensor([0, 1, 7])})
        loss_of(model(**batch)).backward()
        monitor.step()
    torch.testing.assert_close(monitor.timeline.entropy, expected, rtol=0, atol=0)


@pytest.fixture
def in_small_portions(monkeypatch):
    """As of models whose statistics of one forward are too large to be kept until its end."""
    from inflection_fast.measure import attention

    monkeypatch.setattr(attention, "WAITING_BYTES", 0)


def test_values_do_not_depend_on_the_portions_in_which_they_are_added_up(request):
    model, batch = model_and_batch("bert")
    expected = measured(model, batch)
    request.getfixturevalue("in_small_portions")
    actual = measured(model, batch)
    for name in ("entropy", "entropy_se", "max_logit", "collision", "sink"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=0)


def test_a_forward_that_raises_after_a_part_was_added_up_is_forgotten_too(in_small_portions):
    model, batch = model_and_batch("bert")
    expected = measured(model, batch)
    wrong = batch | {"labels": torch.tensor([0, 1, 7])}  # no such class: raises after the last block
    with Monitor(model, ALL_ROWS) as monitor:
        with pytest.raises(IndexError):
            model(**wrong)
        loss_of(model(**batch)).backward()
        monitor.step()
    for name in ("entropy", "max_logit", "loss"):
        np.testing.assert_array_equal(getattr(monitor.timeline, name), getattr(expected, name))


# ---- what does not count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "hand-written"])
def test_evaluations_in_between_and_other_models_do_not_count(name):
    model, batch = model_and_batch(name)
    other, other_batch = model_and_batch(name, seed=1)
    expected = measured(model, batch)
    with Monitor(model, ALL_ROWS) as monitor:
        with torch.no_grad():
            model(**other_batch)
        with torch.inference_mode():
            model(**other_batch)
        loss = loss_of(model(**batch))
        loss_of(other(**other_batch)).backward()
        loss.backward()
        with torch.no_grad():
            model(**other_batch)
        monitor.step()
    for signal in ("entropy", "max_logit"):
        actual = getattr(monitor.timeline, signal)
        torch.testing.assert_close(actual, getattr(expected, signal), rtol=0, atol=0)


def test_a_second_model_inside_the_first_does_not_count():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch).entropy
    teacher = bert().train()

    def teach(module, args):  # runs in the middle of the student's forward, through the same attention interface
        teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    handle = model.bert.encoder.layer[1].attention.register_forward_pre_hook(teach)
    timeline = measured(model, batch)
    handle.remove()
    torch.testing.assert_close(timeline.entropy, expected, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama", "encoder", "hand-written"])
def test_two_monitors_of_one_model_see_what_each_sees_alone(name, frozen):
    model, batch = model_and_batch(name)
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in [*model.parameters()][-2:]:
            parameter.requires_grad_(True)
    exact = MonitorConfig(every=1, rows=None, quantities=("attention", "activation_grad"), frozen_share=1.0)
    config = dataclasses.replace(exact, frozen_share=0.5)
    expected = measured(model, batch, exact)
    model.zero_grad()
    clean = everything_attached(model)
    with Monitor(model, config) as first, Monitor(model, config) as second:
        loss_of(model(**batch)).backward()
        first.step()
        second.step()
    assert everything_attached(model) == clean
    for monitor in (first, second):
        for signal in ("entropy", "max_logit", "activation_grad"):
            if not (frozen and signal == "activation_grad" and monitor is first):  # which takes samples
                actual = getattr(monitor.timeline, signal)
                np.testing.assert_allclose(actual, getattr(expected, signal), rtol=1e-5, err_msg=signal)
        assert np.isfinite(monitor.timeline.activation_grad).all()


# ---- what cannot be measured -----------------------------------------------------------------------------------------


def test_blocks_whose_attention_is_not_seen_are_nan_and_named_once(caplog):
    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=VOCAB, state_size=4, use_cache=False)
    model, ids = hf.MambaForCausalLM(config).train(), torch.arange(6)[None]
    with caplog.at_level(logging.WARNING, "inflection_fast"):
        config = MonitorConfig(every=1, signals=("attention", "activation_grad"))
        timeline = measured(model, {"input_ids": ids, "labels": ids}, config)
    assert np.isnan(timeline.entropy).all() and (timeline.activation_grad > 0).all()
    assert [
        "no softmax attention was seen in the blocks ['backbone.layers.0'" in r.getMessage() for r in caplog.records
    ]


def test_blocks_that_nobody_calls_are_refused_in_words():
    config = hf.SqueezeBertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    config.intermediate_size = config.embedding_size = 16
    model, ids = hf.SqueezeBertModel(config).train(), torch.arange(6)[None]
    clean = everything_attached(model)
    with pytest.raises(ValueError, match=r"none of the blocks \['encoder.layers.0', 'encoder.layers.1'\] ran"):
        measured(model, {"input_ids": ids}, MonitorConfig(every=1, blocks=("encoder.layers.0", "encoder.layers.1")))
    assert everything_attached(model) == clean


def test_flex_masks_are_refused_in_words():
    from inflection_fast.measure.attention_call import SequenceStarts
    from inflection_fast.measure.attention_observer import InterfaceCall, _interface_call

    q = torch.randn(1, HEADS, 6, 4)
    with pytest.raises(ValueError, match="'flex_attention' with a object, which cannot be read"):
        given = InterfaceCall("flex_attention", None, nn.Identity(), q, q, object(), (), {})
        _interface_call(given, given.mask, SequenceStarts())


def test_a_block_that_runs_more_often_than_it_is_named_is_refused():
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "embedding_size": 8}
    model = hf.AlbertModel(hf.AlbertConfig(**sizes, num_hidden_layers=2, vocab_size=VOCAB)).train()
    once = MonitorConfig(every=1, blocks=("encoder.albert_layer_groups.0.albert_layers.0@0",))
    with pytest.raises(ValueError, match="runs more than once"):
        measured(model, {"input_ids": torch.arange(6)[None]}, once)


def test_attention_of_hand_written_heads_needs_a_head_axis():
    model = HandWritten()
    for block in model.blocks:
        block.mixer.forward = lambda x: F.scaled_dot_product_attention(x, x, x)
    with pytest.raises(ValueError, match=r"expected queries \[B, H, T, D\], got shape \(1, 6, 16\)"):
        measured(model, {"input_ids": torch.arange(6)[None], "labels": torch.arange(6)[None]})


def test_a_model_in_float64_is_refused_unless_only_its_gradients_are_measured():
    model, batch = in_float64(*model_and_batch("llama"))
    with pytest.raises(TypeError, match=r"block 'model.layers.0' is in float64.*leave 'attention' out"):
        measured(model, batch)
    norms = measured(model, batch, MonitorConfig(every=1, signals=("activation_grad",))).activation_grad
    assert (norms > 0).all()


def test_one_model_may_mix_interfaces_and_torch_calls():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = gpt2(), HandWritten()

        def forward(self, input_ids, labels):
            return {"loss": loss_of(self.first(input_ids, labels=labels)) + loss_of(self.second(input_ids, labels))}

    torch.manual_seed(0)
    model, ids = Mixed().train(), torch.randint(VOCAB, (2, 12))
    timeline = measured(model, {"input_ids": ids, "labels": ids})
    expected = [measured(half, {"input_ids": ids, "labels": ids}).entropy for half in (model.first, model.second)]
    torch.testing.assert_close(timeline.entropy, torch.cat([torch.from_numpy(e) for e in expected], 1).numpy())
