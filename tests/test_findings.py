"""The order in which findings are told: by their distance from the null, which is computed again here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inflection_fast.checkpoints.files import find
from inflection_fast.checkpoints.findings import Nulls, findings
from inflection_fast.checkpoints.on_texts import Module
from inflection_fast.checkpoints.scanning import scan
from inflection_fast.checkpoints.weights import spectra

BATCHES, LAYERS = 16, 5


def z(values, draws):
    """The robust z-score."""
    middle = np.median(draws, 0)
    return (np.median(values, 0) - middle) / (1.4826 * np.median(np.abs(draws - middle), 0))


def measured(**columns):
    return SimpleNamespace(columns=dict.fromkeys(columns), steps=np.arange(BATCHES), **columns)


@pytest.fixture
def nulls():
    """One sink far beyond chance, massive activations a little, a layer that does not notice the order of words."""
    rng = np.random.default_rng(0)
    noise = lambda mean, spread: rng.normal(mean, spread, (BATCHES, LAYERS))  # noqa: E731
    texts = {"sink": noise(0.1, 0.01), "entropy": noise(2.0, 0.1), "residual_rms": noise(1.0, 0.01)}
    texts |= {"residual_max": np.exp(noise(3.0, 0.1)), "massive_activations": np.zeros((BATCHES, LAYERS))}
    random = {name: values + noise(0, 1e-3) for name, values in texts.items()}
    random["massive_activations"][:] = 0.0
    texts["sink"][:, 3] += 0.8
    texts["residual_max"][:, 2] *= np.exp(1.0)
    texts["massive_activations"][:, 2] = 1.0
    shuffled = {**texts, "entropy": texts["entropy"] + 0.5 + noise(0, 0.02)}
    shuffled["entropy"][:, 4] = texts["entropy"][:, 4] + rng.normal(0, 0.02, BATCHES)
    return Nulls(*(measured(**one) for one in (texts, shuffled, random)))


def test_the_furthest_from_its_null_comes_first(nulls):
    found = {one.kind: one for one in findings(nulls, [], [], 4) if one.unusual}
    assert list(found) == ["sinks", "massive activations", "blind to order"]
    assert found["sinks"].distance == pytest.approx(z(nulls.texts.sink, nulls.random.sink)[3])
    logs = (np.log(of.residual_max) for of in (nulls.texts, nulls.random))
    assert found["massive activations"].distance == pytest.approx(z(*logs)[2])
    apart = np.abs(z(nulls.texts.entropy, nulls.shuffled.entropy))
    assert found["blind to order"].layers == [4]
    assert found["blind to order"].distance == pytest.approx(z(-apart[4:], -apart))
    nulls.texts.residual_max[:, 2] *= np.exp(20.0)
    assert [one.kind for one in findings(nulls, [], [], 4)][:2] == ["massive activations", "sinks"]


def test_what_is_no_number_comes_before_all_and_what_is_usual_last(nulls):
    nulls.texts.residual_rms[3, 1] = np.inf
    modules = [Module(i, "w", 1.0, share, 0.2) for i, share in enumerate([0.9, 0.8, 0.1, 0.7])]
    found = findings(nulls, modules, [], 4)
    assert found[0].kind == "not finite" and found[0].distance is None and found[0].layers == [1]
    assert [one.unusual for one in found] == sorted((one.unusual for one in found), reverse=True)
    full = next(one for one in found if one.kind == "gradients of full rank")
    assert full.layers == [2] and full.distance > 0


def test_a_matrix_of_noise_is_held_against_the_others(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {f"h.{i}.w": torch.randn(64, 96, generator=generator) for i in range(4)}
    for i in range(1, 4):
        weights[f"h.{i}.w"][:, 0] *= 9.0 + i
    save_file(weights, tmp_path / "model.safetensors")
    ratio = np.array([one.random_stable_rank / one.stable_rank for one in spectra(find(str(tmp_path)))])
    assert abs(ratio[0] - 1) < 0.1 and ratio[1:].min() > 3
    told = scan(tmp_path).findings[0]
    assert told.kind == "weights like noise" and told.layers == [0]
    assert told.distance == pytest.approx(z(-ratio[:1], -ratio))
