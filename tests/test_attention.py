"""What is seen of attention while a model trains, against the probabilities of the model's own eager attention."""

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_measured import ALL_ROWS, PAIRS, check_attention, measured
from helpers.tiny_models import (  # noqa: F401
    CASES,
    HEADS,
    VOCAB,
    T,
    continue_text,
    entropy,
    gpt_oss,
    head_means,
    in_float64,
    loss_of,
    model_and_batch,
    one_thread,
    probabilities,
    token_masks,
)
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.schedule import RowSampler

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()


@pytest.mark.parametrize("name, implementation", PAIRS)
def test_attention_is_that_of_the_model(name, implementation):
    model, batch = model_and_batch(name, implementation)
    truth = probabilities(model, batch)
    timeline = measured(model, batch)
    assert len(timeline.layers) == len(truth)
    check_attention(timeline, truth, token_masks(batch, len(truth)))


def test_a_decoder_may_be_shorter_than_its_encoder():
    model, batch = model_and_batch("t5")
    for name in ("labels", "decoder_attention_mask"):
        batch[name] = batch[name][:, :9].contiguous()
    truth = probabilities(model, batch)
    check_attention(measured(model, batch), truth, token_masks(batch, len(truth)))


def flash_like(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """What a flash kernel makes of its arguments: a 2-D padding mask or none, a causal flag, a window."""
    assert attention_mask is None or attention_mask.dim() == 2
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    keep = torch.ones_like(distance, dtype=torch.bool)
    if module.is_causal:
        keep &= distance >= 0
    if sliding_window is not None:
        keep &= distance.abs() < sliding_window
    if attention_mask is not None:
        keep = keep & attention_mask[:, None, None, :].bool()
    out = F.scaled_dot_product_attention(query, key, value, keep, scale=scaling)
    return out.nan_to_num(0.0).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    hf.AttentionInterface.register("tiled", flash_like)
    AttentionMaskInterface.register("tiled", flash_attention_mask)
    yield "tiled"
    del hf.AttentionInterface._global_mapping["tiled"]
    del AttentionMaskInterface._global_mapping["tiled"]


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_through_a_flash_kernel(name, padded, flash):
    model, batch = model_and_batch(name)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    truth = probabilities(model, batch)
    model.set_attn_implementation(flash)
    check_attention(measured(model, batch), truth, token_masks(batch, len(truth)))


def test_without_a_mask_eager_attention_is_not_causal_and_others_are_what_the_module_says():
    from inflection_fast.measure.attention_call import SequenceStarts
    from inflection_fast.measure.attention_observer import InterfaceCall, _interface_call

    causal, q = nn.Identity(), torch.randn(1, HEADS, 6, 4)
    causal.is_causal = True

    def is_causal(name, mask=None, **settings):
        given = InterfaceCall(name, None, causal, q, q, mask, (), settings)
        return _interface_call(given, mask, SequenceStarts()).is_causal

    assert [is_causal(name) for name in ("eager", "sdpa", "other")] == [False, True, True]
    assert not is_causal("sdpa", is_causal=False)
    assert not is_causal("sdpa", mask=q[..., :1])


def test_flash_kernels_align_causal_masks_at_the_last_key():
    from inflection_fast.measure.attention_observer import _last_aligned

    band = _last_aligned(2, 5, True, (2, 0), "cpu")
    assert band.tolist() == [[False, True, True, True, False], [False, False, True, True, True]]


def test_sinks_are_part_of_the_distribution():
    model, batch = gpt_oss(), continue_text()
    model.set_attn_implementation("eager")
    timeline, masks = measured(model, batch), token_masks(batch, 2)
    # The model drops the sink's column from the weights that it returns: what they lack of 1 is the sink.
    truth = [
        torch.cat([(1 - p.sum(-1, keepdim=True)).clamp(min=0), p], -1)
        for p in probabilities(model, batch, double=False)
    ]
    check_attention(timeline, truth, masks)


def test_max_logit_is_the_largest_attended_score():
    model, batch = model_and_batch("bert")
    double, inputs = in_float64(model, batch)
    expected, hidden = [], []
    for layer in double.bert.encoder.layer:
        layer.attention.self.register_forward_pre_hook(lambda module, args: hidden.append((module, args[0])))
    double(**inputs)
    valid = batch["attention_mask"].bool()
    for module, x in hidden:
        q, k = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (module.query, module.key))
        scores = (q @ k.mT * module.scaling).masked_fill(
            ~(valid[:, None, :, None] & valid[:, None, None, :]), -torch.inf
        )
        expected.append(scores.amax((0, 2, 3)))
    actual = torch.from_numpy(measured(model, batch).max_logit[0])
    torch.testing.assert_close(actual, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "encoder"])
def test_more_padding_changes_nothing(name):
    model, batch = model_and_batch(name)
    before = measured(model, batch).entropy
    padding = {"attention_mask": 0, "decoder_attention_mask": 0, "padding": True, "labels": -100}
    padded = {
        key: F.pad(value, (0, 5), value=padding.get(key, 0)) if value.dim() == 2 else value
        for key, value in batch.items()
    }
    torch.testing.assert_close(measured(model, padded).entropy, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, implementation", [("bert", "sdpa"), ("gpt2", "eager"), ("t5", "sdpa")])
def test_padding_is_read_from_the_mask_of_attention_where_the_model_gets_none_of_its_own(name, implementation):
    model, batch = model_and_batch(name, implementation)
    expected = measured(model, batch).entropy

    class Outer(nn.Module):  # what the monitor sees is called without a mask
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch)

    outer = Outer()
    with Monitor(outer, ALL_ROWS) as monitor:
        loss_of(outer(batch)).backward()
        monitor.step()
    torch.testing.assert_close(monitor.timeline.entropy, expected, rtol=1e-6, atol=1e-6)


def test_masks_given_by_position_count():
    model, batch = model_and_batch("bert")
    expected = measured(model, batch).entropy
    with Monitor(model, ALL_ROWS) as monitor:
        loss_of(model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])).backward()
        monitor.step()
    torch.testing.assert_close(monitor.timeline.entropy, expected, rtol=0, atol=0)


def test_micro_batches_are_weighted_by_their_tokens():
    model, batch = model_and_batch("bert")
    truth, masks = probabilities(model, batch), token_masks(batch, 3)
    with Monitor(model, ALL_ROWS) as monitor:
        for part, size in (([0], 7), ([1, 2], 12)):  # another length, another number of tokens
            micro = {k: v[part][:, :size] if v.dim() == 2 else v[part] for k, v in batch.items()}
            loss_of(model(**micro)).backward()
        monitor.step()
    check_attention(monitor.timeline, truth, masks)


def test_sampled_rows_are_near_the_mean_of_all_rows_and_say_how_near():
    model, _ = model_and_batch("gpt2")
    ids = torch.randint(VOCAB, (4, 60))
    batch = {"input_ids": ids, "labels": ids}
    everything = measured(model, batch)
    sampled = measured(model, batch, MonitorConfig(every=1, rows=20, signals=("attention",)))
    error = abs(sampled.entropy - everything.entropy)
    assert (error > 0).all() and (sampled.entropy_se > 0).all()
    assert (error < 4 * sampled.entropy_se).all()
    assert (sampled.max_logit <= everything.max_logit).all()


@pytest.mark.parametrize("name", ["bert", "mistral", "t5", "encoder", "weighted"])
def test_sampled_rows_stand_for_their_strata(name):
    model, batch = model_and_batch(name)
    sampler = RowSampler(5, 0, torch.device("cpu"))
    sampler.begin(0)
    strata = sampler.draw(T)  # T5 draws once for both halves: their lengths are equal
    timeline = measured(model, batch, MonitorConfig(every=1, rows=5, signals=("attention",)))
    truth = probabilities(model, batch)
    expected = []
    for p, mask in zip(truth, token_masks(batch, len(truth)), strict=True):
        weights = mask[:, strata.rows] * strata.weights  # [B, R]
        expected.append((entropy(p)[:, :, strata.rows] * weights[:, None]).sum((0, 2)) / weights.sum())
    torch.testing.assert_close(torch.from_numpy(timeline.entropy[0]), torch.stack(expected), rtol=2e-5, atol=2e-5)
