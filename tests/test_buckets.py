import numpy as np
import pytest

from inflection_fast.report.buckets import Buckets


def filled(values, limit):
    buckets = Buckets(values.shape[1:], limit)
    for step, row in enumerate(values):
        buckets.push(3 * step, row)
    return buckets


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 33, 1000])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_every_bucket_holds_the_exact_mean_and_extremes_of_its_steps(count, shape):
    values = np.random.default_rng(count).standard_normal((count, *shape))
    buckets = filled(values, 8)
    assert len(buckets.steps) <= 8
    seen = 0
    for i, (first, last) in enumerate(buckets.steps):
        part = values[first // 3 : last // 3 + 1]
        seen += len(part)
        assert i == len(buckets.steps) - 1 or len(part) == buckets.length
        np.testing.assert_allclose(buckets.mean[i], part.mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(buckets.low[i], part.min(0))
        np.testing.assert_array_equal(buckets.high[i], part.max(0))
    assert seen == count


def test_one_step_among_a_hundred_thousand_stays_visible():
    buckets = Buckets((1,), 256)
    for step in range(100_000):
        buckets.push(step, np.array([1e6 if step == 77_777 else 0.0]))
    place = int(np.flatnonzero(buckets.high[:, 0] == 1e6)[0])
    first, last = buckets.steps[place]
    assert first <= 77_777 <= last and last - first < 1000
    assert (buckets.low == 0).all()


def test_what_is_not_finite_is_no_value_and_a_step_without_any_leaves_no_trace():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [np.inf, 4.0], [5.0, -np.inf]])
    buckets = filled(values, 2)
    np.testing.assert_array_equal(buckets.steps, [[0, 6], [9, 9]])
    np.testing.assert_array_equal(buckets.mean, [[1.0, 4.0], [5.0, np.nan]])
    np.testing.assert_array_equal(buckets.low, [[1.0, 4.0], [5.0, np.nan]])


def test_values_that_stand_for_several_numbers_weigh_as_many():
    buckets = Buckets((1,), 2)
    for step, row in enumerate([[1.0, 2.0, 3.0], [10.0], [7.0, 8.0]]):
        buckets.push(step, np.array([np.mean(row)]), np.array([len(row)]), np.array([min(row)]), np.array([max(row)]))
    np.testing.assert_allclose(buckets.mean, [[4.0], [7.5]])
    np.testing.assert_array_equal(buckets.over_places(), [[4.0, 1.0, 10.0], [7.5, 7.0, 8.0]])


@pytest.mark.parametrize("limit", [0, 1, 7])
def test_a_limit_that_cannot_be_halved_is_refused(limit):
    with pytest.raises(ValueError, match="limit: expected an even number"):
        Buckets((), limit)
