"""Numbers and lists in words."""

import pytest

from inflection_fast.report.words import layer_ranges, setting


@pytest.mark.parametrize(
    "layers, words",
    [
        ([], "no layer"),
        ([3], "layer 3"),
        ([0, 1, 2], "layers 0, 1 and 2"),
        ([3, 2, 1, 0], "layers 0 to 3"),
        ([0, 1, 2, 3, 7, 9, 10, 11, 12], "layers 0 to 3, 7 and 9 to 12"),
    ],
)
def test_layers_in_a_row_are_a_range(layers, words):
    assert layer_ranges(layers) == words


def test_settings_are_words_and_short_numbers():
    values = [True, False, None, 1.42651051, 0.0, 64, "tokens"]
    assert [setting(value) for value in values] == ["yes", "no", "none", "1.427", "0.000", "64", "tokens"]
