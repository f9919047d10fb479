"""The Monitor on attention that is not plain: windows, softcaps, sinks, relative biases, PyTorch's own layers."""

import copy

import numpy as np
import pytest
import torch
from models import Plain, batch, build, expected
from monitored import assert_row
from torch import nn

from inflection_fast import Monitor, MonitorConfig

CONFIG = MonitorConfig(every=1, rows=None)
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def causal_model(kind):
    import transformers as hf

    torch.manual_seed(0)
    if kind == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=3))
    if kind == "gemma2":
        config = hf.Gemma2Config(**SIZES, sliding_window=3, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
        return hf.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    if kind == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES))
    config = hf.GptOssConfig(**SIZES, sliding_window=3, num_local_experts=2, num_experts_per_tok=1)
    return hf.GptOssForCausalLM._from_config(config, attn_implementation="eager")


def sharpened(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(word in name for word in ("q_proj.weight", "k_proj.weight", "query", "in_proj_weight")):
                p.mul_(12.0)
            if name.endswith("sinks"):
                p.normal_()
    return model.train()


def entropy_by_attentions(model, one):
    """From the weights that eager attention returns in float64; what they lack to one is the sink's share."""
    twin = copy.deepcopy(model).eval()
    twin = twin if "GptOss" in type(model).__name__ else twin.double()  # its experts know no float64
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        weights = twin(**one, output_attentions=True).attentions
    valid = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()[:, None, :]
    rows = []
    for p in weights:
        rest = 1 - p.sum(-1, keepdim=True)
        p = torch.cat([p, rest.masked_fill(rest < 1e-6, 0.0)], -1)
        entropy = -torch.xlogy(p, p).sum(-1).masked_fill(~valid, 0.0)
        rows.append(entropy.sum((0, 2)) / valid.sum())
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3", "gpt_oss"])
def test_windows_softcaps_and_sinks_are_seen_as_the_model_uses_them(kind, padded):
    model, one = sharpened(causal_model(kind)), batch("llama", padded=False)
    if padded:  # by less than a window: eager attention of a row without any key is NaN
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        one["attention_mask"][1:, -2:] = 0
    truth = entropy_by_attentions(model, one)
    with Monitor(model, CONFIG) as monitor:
        model(**one).loss.backward()
        monitor.step()
    assert np.allclose(monitor.timeline.entropy[0], truth, rtol=0, atol=5e-5)
    assert truth.std() > 1e-3


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "vit"])
def test_other_encoders_equal_their_attentions(kind):
    import transformers as hf

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "vit":
        calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = hf.ViTForImageClassification(hf.ViTConfig(**size, **calm, image_size=8, patch_size=4))
        one = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 0])}
    elif kind == "roberta":
        calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model, one = (
            hf.RobertaForSequenceClassification(hf.RobertaConfig(vocab_size=50, **size, **calm, num_labels=3)),
            batch("bert"),
        )
    else:
        config = hf.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48, dropout=0.0,
                                     attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3)  # fmt: skip
        model, one = hf.DistilBertForSequenceClassification(config), batch("bert")
    model = sharpened(model)
    if kind == "vit":
        twin = copy.deepcopy(model).double().eval()
        twin.set_attn_implementation("eager")
        with torch.no_grad():
            weights = twin(pixel_values=one["pixel_values"].double(), output_attentions=True).attentions
        truth = torch.stack([-torch.xlogy(p, p).sum(-1).mean((0, 2)) for p in weights]).numpy()
    else:
        truth = entropy_by_attentions(model, one)
    with Monitor(model, CONFIG) as monitor:
        model(**one).loss.backward()
        monitor.step()
    assert monitor.timeline.entropy.shape == (1, 2, 4)
    assert np.allclose(monitor.timeline.entropy[0], truth, rtol=0, atol=5e-5)
    assert np.isfinite(monitor.timeline.activation_grad).all()


def test_pytorchs_own_encoder_layer_is_measured():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = sharpened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x, weights = torch.randn(3, 7, 16), []
    hidden = x.double()
    for block in copy.deepcopy(model).double().layers:
        normed = block.norm1(hidden)
        weights.append(block.self_attn(normed, normed, normed, need_weights=True, average_attn_weights=False)[1])
        hidden = block(hidden)
    truth = torch.stack([-torch.xlogy(p, p).sum(-1).mean((0, 2)) for p in weights]).detach().numpy()
    before = model(x).detach()
    with Monitor(model, CONFIG) as monitor:
        out = model(x)
        out.square().mean().backward()
        monitor.step()
    assert torch.equal(out, before) and torch.equal(model(x), before)
    assert np.allclose(monitor.timeline.entropy[0], truth, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["bert", "plain"])
def test_a_bfloat16_model_is_measured_in_float32(kind):
    model, one = build(kind).bfloat16(), batch(kind)
    truth = expected(model, kind, [one])
    with Monitor(model, CONFIG) as monitor:
        model(**one).loss.backward()
        monitor.step()
    assert np.abs(monitor.timeline.entropy[0] - truth["entropy"]).max() < 0.05
    for name in ("activation_grad", "parameter_grad"):
        assert np.allclose(getattr(monitor.timeline, name)[0], truth[name], rtol=0.1), name
    assert next(model.parameters()).dtype == torch.bfloat16


def test_autocast_is_measured():
    model, one = build("plain"), batch("plain")
    truth = expected(model, "plain", [one])
    with Monitor(model, CONFIG) as monitor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**one).loss
        loss.backward()
        monitor.step()
    assert np.abs(monitor.timeline.entropy[0] - truth["entropy"]).max() < 0.02
    assert np.allclose(monitor.timeline.activation_grad[0], truth["activation_grad"], rtol=0.1)


def test_a_forward_pass_without_gradients_is_not_measured_in_any_mode():
    model, one = build("plain"), batch("plain")
    truth = expected(model, "plain", [one])
    with Monitor(model, CONFIG) as monitor:
        with torch.inference_mode():
            model(**batch("plain", seed=9))
        with torch.no_grad():
            model(**batch("plain", seed=8))
        model(**one).loss.backward()
        with torch.no_grad():
            model(**batch("plain", seed=7))
        monitor.step()
    assert_row(monitor.timeline, 0, truth)


def test_a_model_that_is_not_causal_is_measured_over_all_keys():
    torch.manual_seed(0)
    model, one = Plain(is_causal=False), batch("plain")
    with Monitor(model, CONFIG) as monitor:
        model(**one).loss.backward()
        monitor.step()
    entropy = monitor.timeline.entropy[0]
    assert (entropy > 0.8 * np.log(11)).all() and (entropy <= np.log(11)).all()


def test_a_model_inside_another_is_measured():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model, one = build("bert"), batch("bert")
    truth = expected(model, "bert", [one])
    wrapped = Wrapper(model)
    with Monitor(wrapped, CONFIG) as monitor:
        wrapped(**one).loss.backward()
        monitor.step()
    assert_row(monitor.timeline, 0, truth)
