"""SKI: what each option means, to the digit."""

import numpy as np
import pytest

from inflection_fast import ski

ENTROPY = np.array([3.0, 1.0, 2.0, 2.0])
GRADIENT = np.array([1.0, 10.0, 100.0, 1000.0])


def test_the_formula_is_the_weighted_sum_of_the_normalised_inverses():
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 1.0), [0, 1, 0.5, 0.5])
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 0.0), [1, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 0.25), 0.25 * np.array([0, 1, 0.5, 0.5]) + [0.75, 0.5, 0.25, 0])


def test_without_the_logarithm_the_largest_gradient_rules():
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 0.0, log_gradient=False), (1000 - GRADIENT) / 999)


def test_ranks_are_shares_of_the_layers_above_and_ties_count_half():
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 1.0, normalisation="rank"), [0, 1, 0.5, 0.5])
    np.testing.assert_allclose(ski([1, 1, 2], [1, 1, 1], 1.0, normalisation="rank"), [0.75, 0.75, 0])


def test_zscores_are_squashed_by_the_logistic_function():
    z = (ENTROPY - 2) / np.sqrt(0.5)
    np.testing.assert_allclose(ski(ENTROPY, GRADIENT, 1.0, normalisation="zscore"), 1 / (1 + np.exp(z)))


@pytest.mark.parametrize("normalisation", ["minmax", "rank", "zscore"])
def test_a_constant_signal_is_one_half_everywhere_and_changes_no_order(normalisation):
    scores = ski(np.full(4, 2.0), GRADIENT, 0.5, normalisation=normalisation)
    np.testing.assert_allclose(scores, 0.25 + 0.5 * ski(ENTROPY, GRADIENT, 0.0, normalisation=normalisation))
    np.testing.assert_array_equal(ski([2.0], [3.0], normalisation=normalisation), [0.5])


@pytest.mark.parametrize("normalisation", ["minmax", "rank", "zscore"])
@pytest.mark.parametrize("hole", [np.nan, np.inf, 0.0], ids=["nan", "infinite", "zero"])
def test_a_gradient_without_a_logarithm_leaves_its_layer_out_and_the_others_alone(normalisation, hole):
    scores = ski([9.0, *ENTROPY], [hole, *GRADIENT], normalisation=normalisation)
    assert np.isnan(scores[0])
    np.testing.assert_allclose(scores[1:], ski(ENTROPY, GRADIENT, normalisation=normalisation))


def test_a_zero_gradient_counts_where_no_logarithm_is_taken():
    np.testing.assert_allclose(ski([1, 1, 1], [0, 1, 2], 0.0, log_gradient=False), [1, 0.5, 0])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_signal_of_weight_zero_is_not_looked_at(alpha):
    nothing = np.full(4, np.nan)
    entropy, gradient = (ENTROPY, nothing) if alpha else (nothing, GRADIENT)
    np.testing.assert_array_equal(ski(entropy, gradient, alpha), ski(ENTROPY, GRADIENT, alpha))


def test_layers_without_any_value_have_no_score():
    assert np.isnan(ski(np.full(3, np.nan), np.ones(3))).all()


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((ENTROPY, -GRADIENT), {}, "a norm is not negative, got -1000"),
        ((ENTROPY, GRADIENT[:3]), {}, r"got \(4,\) and \(3,\)"),
        ((ENTROPY[None], GRADIENT), {}, r"entropy: expected shape \[L\], got \(1, 4\)"),
        ((ENTROPY, GRADIENT, 1.5), {}, "alpha.*1.5"),
        ((ENTROPY, GRADIENT), {"normalisation": "max"}, "normalisation.*'max'"),
    ],
)
def test_nonsense_is_refused_with_the_value_in_the_message(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        ski(*arguments, **options)
