"""Comparing two models: against float64 truth, by different widths and depths, and without a trace."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.tiny_models import HEADS, VOCAB, WIDTH, in_float64, model_and_batch, one_thread  # noqa: F401

from inflection_fast import Comparison, compare
from inflection_fast.checkpoints.comparison_views import comparison_page, moved_layers
from inflection_fast.ops import reference


@pytest.fixture(scope="module")
def pair():
    """A model, the same moved, two batches, and their comparison."""
    model, batch = model_and_batch("bert")
    moved = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.bert.encoder.layer[1:].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batches = [batch, model_and_batch("bert", seed=1)[1]]
    return model, moved, batches, compare(model, moved, batches)


def features(model, batches):
    """[L, N, D] in float64: outputs of the blocks at tokens, and the sequence of each row."""
    rows, sequences = [], []
    for number, batch in enumerate(batches):
        model, wide = in_float64(model.eval(), batch)
        with torch.no_grad():
            states = model(**wide, output_hidden_states=True).hidden_states[1:]
        mask = batch["attention_mask"].bool()
        rows.append(torch.stack([state[mask] for state in states]))
        sequences.append((len(mask) * number + torch.arange(len(mask)))[:, None].expand_as(mask)[mask])
    return torch.cat(rows, 1), torch.cat(sequences)


def test_cka_and_both_forms_of_delta_equal_the_truth(pair):
    model, moved, batches, found = pair
    (x, sequences), (y, _) = features(model, batches), features(moved, batches)
    truth = torch.stack([torch.stack([reference.linear_cka(a, b) for b in y]) for a in x])
    np.testing.assert_allclose(np.array(found.matrix), truth, atol=2e-5)
    own = truth.diagonal()
    np.testing.assert_allclose(found.delta, 1 - own, atol=2e-5)
    np.testing.assert_allclose(found.angle[1:], own[1:].arccos(), atol=5e-4)
    assert found.delta[0] == pytest.approx(0, abs=1e-6) and min(found.delta[1:]) > 1e-3  # block 0 has not moved
    assert found.nearest == truth.argmax(1).tolist()
    units = sequences.unique()
    left_out = torch.stack([reference.linear_cka(x[2][sequences != s], y[2][sequences != s]) for s in units])
    error = ((left_out - left_out.mean()).square().sum() * (len(units) - 1) / len(units)).sqrt()
    assert found.delta_error[2] == pytest.approx(float(error), rel=1e-3)
    assert found.angle_error[2] == pytest.approx(float(error / (1 - own[2] ** 2).sqrt()), rel=1e-3)
    assert found.settings["sequences"] == 6 and found.settings["rows"] == len(sequences)


def test_weights_that_have_changed(pair):
    model, moved, _, found = pair
    names = [f"bert.encoder.layer.{i}" for i in range(3)]
    assert list(found.weights) == names and found.weights[names[0]] == 0
    before, after = (m.get_submodule(names[2]).state_dict() for m in (model, moved))
    change = math.sqrt(sum(float((after[k] - before[k]).double().square().sum()) for k in before))
    norm = math.sqrt(sum(float(before[k].double().square().sum()) for k in before))
    assert found.weights[names[2]] == pytest.approx(change / norm, rel=1e-5)
    name = f"{names[1]}.output.dense.weight"
    a, b = model.get_parameter(name), moved.get_parameter(name)
    assert found.modules[name] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)


def test_drift_is_paired_by_batch(pair):
    _, _, batches, found = pair
    for name in ("entropy", "sink", "residual_rms", "activation_grad"):
        one = found.drift[name]
        np.testing.assert_allclose(one.difference, np.subtract(one.b, one.a), rtol=1e-4, atol=1e-9)
    assert found.drift["entropy"].difference[0] == 0 and found.drift["entropy"].error[0] == 0
    apart = [compare(*pair[:2], [batch]).drift["entropy"].difference[2] for batch in batches]
    assert found.drift["entropy"].difference[2] == pytest.approx(np.mean(apart), rel=1e-6)
    assert found.drift["entropy"].error[2] == pytest.approx(abs(apart[0] - apart[1]) / 2, rel=1e-6)


def test_only_what_batches_do_not_explain_has_moved(pair):
    one = copy.copy(pair[3].drift["entropy"])
    steady = type(one)(**{**vars(one), "difference": [0.5, 0.5, -0.5], "error": [0.5, 1e-6, 1e-6]})
    assert moved_layers(steady, 8) == [1, 2] and moved_layers(steady, 1) == []


def bert_of(width, layers):
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=24
    )
    torch.manual_seed(width + layers)
    return hf.BertModel(config)


def test_models_of_other_width_and_depth():
    batch = model_and_batch("bert")[1]
    inputs = [{name: batch[name] for name in ("input_ids", "attention_mask")}]
    wide, deep = compare(bert_of(WIDTH, 3), bert_of(24, 3), inputs), compare(bert_of(WIDTH, 3), bert_of(24, 2), inputs)
    assert len(wide.delta) == 3 and np.isfinite(wide.delta).all() and not wide.weights
    assert np.shape(deep.matrix) == (3, 2) and np.isfinite(deep.matrix).all()
    assert deep.delta == [] and deep.drift["entropy"].difference == [] and len(deep.drift["entropy"].b) == 2
    assert "activation_grad" not in deep.drift  # without labels there is no loss
    page = comparison_page(deep, ("a", "b"), ".", "texts")
    assert page.missing[0].startswith("The models have different numbers of layers")
    with pytest.raises(ValueError, match="same width"):
        compare(bert_of(WIDTH, 2), bert_of(24, 2), inputs, rank=4)


def test_a_shared_basis_is_that_of_delta_cka(pair):
    model, moved, batches, _ = pair
    (x, _), (y, _) = features(model, batches), features(moved, batches)
    found = compare(model, moved, batches, rank=5)
    truth = [float(reference.delta_cka(x[i], y[i], rank=5)) for i in range(3)]
    np.testing.assert_allclose(found.delta, truth, atol=5e-5)
    assert found.settings["rank"] == 5


def test_models_are_left_as_they_were(pair):
    model, moved = (copy.deepcopy(one).train() for one in pair[:2])
    model.bert.pooler.requires_grad_(False)
    moved.classifier.weight.grad = torch.ones_like(moved.classifier.weight)
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (model, moved)]
    flags = [p.requires_grad for p in model.parameters()]
    compare(model, moved, pair[2])
    for one, kept in zip((model, moved), before, strict=True):
        assert one.training and all(torch.equal(value, kept[name]) for name, value in one.state_dict().items())
        assert not any(module._forward_hooks for module in one.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(moved.classifier.weight.grad, torch.ones(2, WIDTH)) and model.classifier.weight.grad is None


def test_other_tokens_are_compared_by_sequence(pair):
    model, moved, batches, _ = pair
    longer = [batch | {"attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches]
    with pytest.raises(ValueError, match="pooling='mean'"):
        compare(model, moved, batches, loader_b=longer)
    found = compare(model, moved, batches, loader_b=longer, pooling="mean")
    assert found.settings["rows"] == 6 and np.isfinite(found.delta).all()


def test_a_file_gives_back_what_was_saved(pair, tmp_path):
    pair[3].save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == pair[3]
    (tmp_path / "x.json").write_text('{"kind": "another"}')
    with pytest.raises(ValueError, match="is no comparison"):
        Comparison.load(tmp_path / "x.json")


@pytest.mark.parametrize("loader, says", [([], "got none"), ([1], "got one of int"), ({"input_ids": 1}, "got dict")])
def test_a_loader_that_is_none(pair, loader, says):
    with pytest.raises(TypeError, match=says):
        compare(*pair[:2], loader)
