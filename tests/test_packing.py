import base64
import zlib

import numpy as np

from inflection_fast.report.single_page import DIGITS, pack, pack_text


def unpacked(data, shape):
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1)
    return np.ascontiguousarray(planes.T).view("<f4").reshape(shape)


def test_numbers_come_back_to_four_digits_at_every_size():
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 5000) * 10.0 ** rng.uniform(-30, 30, 5000)).reshape(10, 500)
    back = unpacked(pack(values), values.shape)
    assert np.abs(back / values - 1).max() <= 0.5 * 10.0 ** (1 - DIGITS)


def test_values_that_are_none_stay_none_and_zero_stays_zero():
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0])
    np.testing.assert_array_equal(unpacked(pack(values), 6), values.astype(np.float32))


def test_text_is_the_same_in_base64_and_small_for_smooth_numbers():
    values = np.linspace(1, 2, 100_000)
    assert base64.b64decode(pack_text(values)) == pack(values)
    assert len(pack_text(values)) < values.size
