"""Scans of models of every kind: masked tokens, a decoder beside an encoder, a GGUF file, blocks computed again."""

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast.checkpoints import on_texts
from inflection_fast.checkpoints import texts as batching
from inflection_fast.checkpoints.files import find
from inflection_fast.checkpoints.loading import load, tokenizer_of
from inflection_fast.checkpoints.scanning import scan
from inflection_fast.timeline import Timeline

TEXTS = [row["text"] for row in tiny.reviews(16)]


def masked(folder):
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(tiny.bert_config()).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    return folder


def translated(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def gguf(folder):
    pytest.importorskip("gguf")
    tiny.gguf(folder)
    return folder


def truth(folder):
    """Losses and gradient norms at the blocks, batch by batch, without a monitor."""
    source = find(str(folder))
    loaded = load(source)
    made = batching.batches_of(TEXTS, tokenizer_of(source), loaded, tokens=128, budget=batching.token_budget(loaded))
    model, outputs = loaded.model.requires_grad_(True), []
    for block in on_texts.find_blocks(model):
        block.module.register_forward_hook(lambda _m, _i, out: outputs.append(out if torch.is_tensor(out) else out[0]))
    losses, norms = [], []
    for batch in made:
        outputs.clear()
        loss = model(**batch.inputs).loss
        losses.append(loss.item())
        norms.append([gradient.norm().item() for gradient in torch.autograd.grad(loss, outputs)])
    return np.array(losses), np.array(norms)


@pytest.mark.parametrize(
    "make, loss, layers",
    [
        (masked, "15 % of the tokens, masked", ["bert.encoder.layer.0", "bert.encoder.layer.2"]),
        (translated, "the second half of a text from its first", ["encoder.block.0", "decoder.block.2"]),
        (gguf, "the next token", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_a_model_is_scanned_by_its_own_loss(tmp_path, make, loss, layers):
    folder = make(tmp_path / "model")
    found = scan(folder, TEXTS, rank=2, out=tmp_path / "out", weights=False)
    assert found.texts["loss"] == loss and found.texts["texts"] == 16
    assert [found.layers[0], found.layers[-1]] == layers
    timeline = Timeline.load(tmp_path / "out" / "texts")
    losses, norms = truth(folder)
    np.testing.assert_allclose(timeline.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(timeline.activation_grad, norms, rtol=1e-4)
    assert len(found.matrices["texts"]) == len(found.layers) and found.modules
    assert all(value > 0 for value in found.profiles["entropy"].texts)


def test_blocks_that_are_computed_again_give_the_same_numbers(tmp_path, monkeypatch):
    folder = tiny.llama(tmp_path / "llama")
    plain = scan(folder, TEXTS, rank=2, weights=False)
    budget = batching.token_budget
    monkeypatch.setattr(on_texts, "token_budget", lambda loaded, recomputes=False: budget(loaded) if recomputes else 1)
    again = scan(folder, TEXTS, rank=2, weights=False)
    name = "blocks computed again in the backward pass"
    assert (plain.texts[name], again.texts[name]) == (False, True)
    assert again.texts["mean loss"] == pytest.approx(plain.texts["mean loss"], rel=1e-6)
    for profile in ("entropy", "activation_grad", "residual_rms"):
        np.testing.assert_allclose(again.profiles[profile].texts, plain.profiles[profile].texts, rtol=1e-5)
    np.testing.assert_allclose([one.gain for one in again.modules], [one.gain for one in plain.modules], rtol=1e-4)
