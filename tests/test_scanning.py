"""Scanning a checkpoint: what is measured equals the truth, what is planted is found, files are read one by one."""

import json

import helpers.tiny_texts as tiny
import numpy as np
import pytest
import torch
from helpers.tiny_models import entropy, one_thread, probabilities  # noqa: F401
from safetensors.torch import save_file

from inflection_fast.checkpoints import texts as batching
from inflection_fast.checkpoints.files import find
from inflection_fast.checkpoints.loading import halves_loss, load, tokenizer_of
from inflection_fast.checkpoints.scan_views import scan_answer, scan_page
from inflection_fast.checkpoints.scanning import Scan, scan
from inflection_fast.checkpoints.weights import spectra
from inflection_fast.decide import SelectConfig
from inflection_fast.report.layer_page import layer_page_state
from inflection_fast.timeline import Timeline

TEXTS = [row["text"] for row in tiny.reviews(24)]
TOP = SelectConfig(method="top", k=1, significance=None)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """A tiny decoder whose middle block attends to all tokens alike, scanned on texts."""
    from transformers import AutoModelForCausalLM

    folder = tiny.llama(tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.model.layers:
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(0.5 * torch.randn_like(parameter))
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    model.save_pretrained(folder)
    out = tmp_path_factory.mktemp("scan")
    return folder, out, scan(folder, TEXTS, out=out, rank=2, select_config=TOP)


def batches_of(folder, count=None):
    source = find(str(folder))
    loaded = load(source)
    made = batching.batches_of(TEXTS, tokenizer_of(source), loaded, tokens=128, budget=batching.token_budget(loaded))
    return loaded, made[:count]


def test_entropy_and_loss_equal_the_truth(scanned):
    folder, out, found = scanned
    loaded, batches = batches_of(folder)
    timeline = Timeline.load(out / "texts")
    assert len(timeline.steps) == len(batches) == found.texts["batches"] == 24
    means = []
    for step, batch in enumerate(batches):
        mask = batch.inputs["attention_mask"].bool()
        truth = torch.stack(
            [entropy(p).transpose(1, 2)[mask].mean(0) for p in probabilities(loaded.model, batch.inputs)]
        )
        np.testing.assert_allclose(timeline.entropy[step], truth.detach(), atol=1e-5)
        means.append(truth.mean(1).detach().numpy())
        with torch.no_grad():
            assert timeline.loss[step] == pytest.approx(float(loaded.model(**batch.inputs).loss), rel=1e-5)
    np.testing.assert_allclose(found.profiles["entropy"].texts, np.mean(means, 0), atol=1e-5)
    error = np.std(means, 0, ddof=1) / np.sqrt(len(means))
    np.testing.assert_allclose(found.profiles["entropy"].error, error, rtol=1e-3, atol=1e-8)


def test_gains_are_those_of_the_first_batch(scanned):
    folder, _, found = scanned
    loaded, batches = batches_of(folder, 1)
    loaded.model.requires_grad_(True)
    loaded.model(**batches[0].inputs).loss.backward()
    for one in found.modules:
        gradient = loaded.model.model.layers[one.layer].get_parameter(f"{one.name}.weight").grad.double()
        squares = torch.linalg.svdvals(gradient).square()
        assert one.gain == pytest.approx(float(squares[:2].sum()), rel=1e-3, abs=1e-12)
    assert len(found.modules) == 3 * 7


def test_gradients_do_not_depend_on_how_batches_are_cut(scanned):
    _, out, _ = scanned
    gradient = Timeline.load(out / "texts").activation_grad
    assert np.isfinite(gradient).all() and (gradient > 0).all()


def test_a_layer_that_attends_to_everything_alike_is_found(scanned):
    _, _, found = scanned
    lazy = [one for one in found.findings if one.kind == "lazy layers"]
    assert len(lazy) == 1 and 1 in lazy[0].layers and "of no higher rank" in lazy[0].words
    empty = [one for one in found.findings if one.kind == "weights of zero"]
    assert empty[0].layers == [1] and "q_proj" in empty[0].words
    assert "lazy layers (layer" in scan_answer(found, ".").verdict


def test_nulls_are_measured_on_the_same_texts(scanned):
    _, out, found = scanned
    texts, mixed, random = (Timeline.load(out / name) for name in ("texts", "shuffled", "random"))
    assert found.texts["texts of the nulls"] == 24 and len(mixed.steps) == len(random.steps) == 24
    assert np.abs(texts.entropy - random.entropy).max() > 0.05
    assert 0 < np.abs(texts.entropy[:, 2] - mixed.entropy[:, 2]).max()
    np.testing.assert_allclose(found.profiles["sink"].random, random.sink.mean((0, 2)), rtol=1e-5)


def test_shuffling_keeps_tokens_padding_and_specials(scanned):
    folder, _, _ = scanned
    _, batches = batches_of(folder)
    specials = tokenizer_of(find(str(folder))).all_special_ids
    for batch in batches:
        mixed = batching.shuffled(batch, specials, 0)
        for name in ("input_ids", "labels"):
            assert torch.equal(mixed.inputs[name].sort(1).values, batch.inputs[name].sort(1).values)
        special = torch.isin(batch.inputs["input_ids"], torch.tensor(specials))
        assert torch.equal(mixed.inputs["input_ids"][special], batch.inputs["input_ids"][special])
        assert torch.equal(mixed.inputs["attention_mask"], batch.inputs["attention_mask"])
    assert any(
        not torch.equal(batching.shuffled(b, specials, 0).inputs["input_ids"], b.inputs["input_ids"]) for b in batches
    )


def test_the_plan_is_of_the_timeline(scanned):
    folder, _, found = scanned
    assert len(found.plan.layers) == 1
    again = scan(folder, TEXTS, rank=2, select_config=TOP, yaml="trl", weights=False)
    assert again.plan.layers == found.plan.layers and again.weights == []
    assert "lora_target_modules" in again.yaml and "lora_r: 2" in again.yaml
    assert f"layers.{found.plan.layers[0]}." in again.yaml.replace("\\", "")


def test_a_file_gives_back_what_was_saved(scanned, tmp_path):
    found = scanned[2]
    found.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == found
    assert "NaN" not in (tmp_path / "scan.json").read_text()
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="is no scan"):
        Scan.load(tmp_path / "x.json")


def test_the_page_names_what_is_measured(scanned):
    made = layer_page_state(scan_page(scanned[2], ".", "24 texts"))
    labels = {profile["label"] for profile in made.manifest["profiles"]}
    assert {"Attention entropy", "RMS of block outputs", "First-order gain of adapters"} <= labels
    assert made.manifest["matrices"][0]["shape"] == [3, 3] and made.manifest["plan"]["layers"]
    marked = {profile["label"]: profile["marked"] for profile in made.manifest["profiles"]}
    lazy = next(one.layers for one in scanned[2].findings if one.kind == "lazy layers")
    assert marked["Rank k* of attention"] == lazy and marked["RMS of block outputs"] == []  # which does not tell it
    json.dumps(made.manifest, allow_nan=False)


def test_an_encoder_is_scanned_by_the_halves_of_its_texts(tmp_path):
    found = scan(tiny.bert(tmp_path / "bert"), TEXTS, rank=2, weights=False)
    assert found.texts["loss"] == "which two halves belong to one text"
    assert all(value > 0 for value in found.profiles["activation_grad"].texts)
    first, second = torch.eye(4, 6)[:, None], torch.eye(4, 6)[:, None]
    tokens = torch.ones(8, 1)
    exact = float(halves_loss(torch.cat([first, second]), tokens))
    assert exact == pytest.approx(float(torch.tensor(3 * np.exp(-20.0)).log1p()), abs=1e-6)
    assert float(halves_loss(torch.cat([first, second.flip(0)]), tokens)) == pytest.approx(20, rel=1e-3)


# ---- weights alone ---------------------------------------------------------------------------------------------------


def planted(folder):
    """Two shards: pure noise, and noise with one strong direction."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(48, 96, generator=generator)
    u, v = torch.randn(96, 1, generator=generator), torch.randn(1, 48, generator=generator)
    save_file({"h.0.w": noise, "h.0.bias": torch.zeros(96)}, folder / "model-00001-of-00002.safetensors")
    save_file({"h.1.w": noise.mT.contiguous() + 3 * u @ v / 10}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_weights_alone_tell_noise_from_signal(tmp_path):
    found = scan(planted(tmp_path))
    assert [(one.name, one.layer, one.kind, one.outliers) for one in found.weights] == [
        ("h.0.w", 0, "h.w", 0),
        ("h.1.w", 1, "h.w", 1),
    ]
    noise = found.weights[0]
    assert noise.effective_rank == pytest.approx(noise.random_effective_rank, rel=0.02)
    assert found.weights[1].random_effective_rank == noise.random_effective_rank  # one random matrix for a size
    assert [one.kind for one in found.findings if one.unusual] == ["weights like noise"]
    assert found.texts == {} and found.plan is None and "h.0.w" in scan_answer(found, ".").why


def test_progress_is_reported_under_its_name_and_the_earlier_one(tmp_path):
    said, before = [], []
    planted(tmp_path)
    scan(tmp_path, progress=said.append)
    with pytest.warns(DeprecationWarning, match="told is now called progress"):
        scan(tmp_path, told=before.append)
    assert said == before and said[0] == "reading the weights"
    with pytest.raises(TypeError, match="two names of one argument"):
        scan(tmp_path, progress=said.append, told=before.append)


def test_gguf_matrices_are_those_that_were_quantised(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr("inflection_fast.quantities.spectrum.GGUF_ROWS", 10)  # no matrix has a multiple of it
    plain = tiny.gguf(tmp_path)
    found = {one.name: one for one in spectra(find(str(tmp_path)))}
    assert found.keys() == plain.keys()
    for name in ("blk.0.attn_q.weight", "token_embd.weight"):
        largest = float(torch.linalg.svdvals(torch.tensor(plain[name]).double())[0])
        assert found[name].norm == pytest.approx(largest, rel=1e-5)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    save_file({"h.3.w": torch.full((20, 20), torch.nan)}, tmp_path / "model.safetensors")
    found = scan(tmp_path)
    assert found.findings[0].kind == "weights not finite" and found.findings[0].layers == [3]
    found.save(tmp_path / "scan.json")
    assert Scan.load(tmp_path / "scan.json") == found
