"""Linear probes: what can be read off features, by cross-validation."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import bert

from inflection_fast.study.config import LoopConfig
from inflection_fast.study.probes import pooled_features, ridge_accuracy
from inflection_fast.study.texts import Tokens


def test_a_planted_direction_is_read_and_noise_is_not():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    noise = rng.standard_normal((300, 500))
    assert ridge_accuracy(noise, labels) < 0.45
    planted = noise + 1.5 * rng.standard_normal((3, 500))[labels]
    assert ridge_accuracy(planted, labels) > 0.95


def test_scale_and_offset_of_features_do_not_matter():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 120)
    features = rng.standard_normal((120, 20)) + 0.4 * labels[:, None]
    assert ridge_accuracy(1000 * features + 50, labels) == ridge_accuracy(features, labels)


def test_too_few_texts_or_labels_are_refused():
    with pytest.raises(ValueError, match="at least two classes and 10 texts, got 1, 20"):
        ridge_accuracy(np.zeros((20, 2)), np.zeros(20))


def test_features_are_means_over_the_tokens_alone():
    torch.manual_seed(0)
    model = bert().eval()
    rng = np.random.default_rng(0)
    lengths = np.array([3, 7, 5], np.int32)
    ids = rng.integers(1, 40, (3, 7)).astype(np.int32)
    found = pooled_features(model, Tokens(ids, lengths, np.array([0, 1, 0])), LoopConfig(eval_batch_size=2))
    for i, length in enumerate(lengths):
        alone = model.bert(input_ids=torch.tensor(ids[i : i + 1, :length].astype(int)), output_hidden_states=True)
        for layer, state in enumerate(alone.hidden_states[1:]):
            np.testing.assert_allclose(found[layer, i], state[0].mean(dim=0).detach().numpy(), atol=1e-5)
