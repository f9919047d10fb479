"""Distances from a null: the robust z-score, in the null's own spreads."""

import numpy as np
import pytest

from inflection_fast.checkpoints.distances import nearest_robust_z, robust_z


def test_a_distance_is_the_robust_z_score():
    rng = np.random.default_rng(0)
    values, draws = rng.normal(3, 1, (31, 4)), rng.normal(0, 2, (2001, 4))
    middle = np.median(draws, 0)
    truth = (np.median(values, 0) - middle) / (1.4826 * np.median(np.abs(draws - middle), 0))
    np.testing.assert_allclose(robust_z(values, draws), truth)
    assert truth == pytest.approx(1.5, abs=0.4)  # three, in spreads of two
    np.testing.assert_allclose(robust_z(7 * values - 2, 7 * draws - 2), truth)  # in no unit
    draws[:5] = 1e9  # and what a few draws are does not matter
    np.testing.assert_allclose(robust_z(values, draws), truth, rtol=0.02)


def test_draws_that_are_mostly_equal_have_their_standard_deviation():
    draws = np.array([[1.0], [1.0], [1.0], [5.0]])
    assert robust_z(np.array([[4.0]]), draws) == pytest.approx(3 / np.std(draws))
    assert robust_z(np.array([[4.0, 1.0]]), np.ones((3, 2))).tolist() == [np.inf, 0.0]


def test_what_has_no_value_has_no_distance():
    values, draws = (
        np.array([[1.0, np.nan, 1.0], [3.0, np.nan, 1.0]]),
        np.array([[0.0, 0.0, np.nan], [1.0, 1.0, np.nan]]),
    )
    found = robust_z(values, draws)
    assert found[0] == pytest.approx(1.5 / (1.4826 * 0.5)) and np.isnan(found[1:]).all()


def test_what_does_not_differ_counts_by_how_far_it_lies_below_the_others():
    to_null = np.array([0.5, 8.0, 9.0, 10.0, 8.5, np.nan])
    spread = 1.4826 * 0.5  # median 8.5, deviations 8, 0.5, 0.5, 1.5, 0
    assert (
        nearest_robust_z(to_null, [0])
        == pytest.approx(8 / spread)
        == nearest_robust_z(to_null, [1, 0])
        == nearest_robust_z(3 * to_null, [0])
    )
    assert nearest_robust_z(to_null, []) == 0.0 == nearest_robust_z(to_null, [5]) and nearest_robust_z(
        to_null, [1]
    ) == pytest.approx(0.5 / spread)
