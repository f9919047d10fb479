from collections import Counter

import pytest

pytest.importorskip("datasets")

from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError
from inflection_fast.run.files import Rows
from inflection_fast.run.labels import clean_labels, label_names, numbered


def rows_of(values, names=None):
    columns = {"text": [f"text {i}" for i in range(len(values))], "label": list(values)}
    declared = {} if names is None else {"label": names}
    return Rows("a.csv", columns, "line", list(range(2, len(values) + 2)), declared)


def read(values, names=None, **settings):
    """Names, integers and counts of what was dropped."""
    config, dropped = DataConfig("a.csv", **settings), Counter()
    rows = clean_labels(rows_of(values, names), config, dropped)
    found = config.labels or label_names(rows, config)
    return found, numbered(rows, found), dropped


@pytest.mark.parametrize(
    ("values", "names", "integers"),
    [
        (["pos", "neg ", " pos"], ("neg", "pos"), [1, 0, 1]),
        (["10", "2", "10"], ("2", "10"), [1, 0, 1]),
        ([10, 2, 10], ("2", "10"), [1, 0, 1]),
        (["01", "1", "10"], ("01", "1", "10"), [0, 1, 2]),
        ([True, False], ("False", "True"), [1, 0]),
        (["1", "b"], ("1", "b"), [0, 1]),
    ],
)
def test_names_are_the_sorted_values(values, names, integers):
    assert read(values) == (names, integers, {})


@pytest.mark.parametrize("missing", [None, "", "  ", "\t", float("nan")])
def test_a_row_without_a_label_is_refused_or_dropped_and_counted(missing):
    values = ["pos", missing, "neg", missing]
    with pytest.raises(UserError, match=r"2 of 4 rows have no label in column 'label' \(lines 3, 5\).*drop_missing"):
        read(values)
    assert read(values, drop_missing=True) == (("neg", "pos"), [1, 0], {"without a label": 2})


def test_the_integer_that_stands_for_no_label_is_missing():
    with pytest.raises(UserError, match="1 of 3 rows have no label"):
        read([0, -1, 1], names=("no", "yes"))
    assert read([0, -1, 1], names=("no", "yes"), drop_missing=True)[1] == [0, 1]


def test_labels_that_differ_by_case_only_are_named():
    values = ["Pos", "pos", "neg", "NEG ", "other"]
    with pytest.raises(UserError, match="by case only: 'NEG' and 'neg'; 'Pos' and 'pos'"):
        read(values)
    kept = ("Pos", "pos", "neg", "NEG", "other")
    assert read(values, labels=kept)[1] == [0, 1, 2, 3, 4]
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with pytest.raises(UserError, match="by case only"):
        read([composed, decomposed])


@pytest.mark.parametrize(
    ("values", "message", "names"),
    [
        (["-1", "1", "1"], 'negative labels, such as -1: write `labels: ["-1", "1"]`', ("-1", "1")),
        ([-1, 1, 1], 'negative labels, such as -1: write `labels: ["-1", "1"]`', ("-1", "1")),
        (["1.0", "0.0"], 'real numbers; labels are names or integers: write `labels: ["0.0", "1.0"]`', ("0.0", "1.0")),
        ([1.0, 0.0], 'real numbers; labels are names or integers: write `labels: ["0.0", "1.0"]`', ("0.0", "1.0")),
    ],
)
def test_numbers_that_are_no_classes_name_the_line_that_takes_them(values, message, names):
    with pytest.raises(UserError) as caught:
        read(values)
    assert message in str(caught.value)
    assert read(values, labels=names)[1] == [names.index(str(value)) for value in values]


@pytest.mark.parametrize("values", [["0.5", "1"], [0.25, 1.0], ["1e-3", "2"]])
def test_real_numbers_are_no_labels(values):
    with pytest.raises(UserError, match=r"real numbers; labels are names or integers$"):
        read(values)


@pytest.mark.parametrize("value", [["a"], {"b": 1}])
def test_other_values_are_no_labels(value):
    with pytest.raises(UserError, match=f"holds {type(value).__name__}; labels are names or integers"):
        read(["a", value])


def test_names_that_the_source_declares_may_be_ordered_anew():
    assert read([0, 1, 1], names=("no", "yes")) == (("no", "yes"), [0, 1, 1], {})
    assert read([0, 1, 1], names=("no", "yes"), labels=("yes", "no"))[1] == [1, 0, 0]
    assert read([0, 1, 1], names=("no", "yes"), labels=("against", "for"))[1] == [0, 1, 1]
    with pytest.raises(UserError, match="labels outside"):
        read([0, 1, 2], names=("no", "yes", "maybe"), labels=("yes", "no"))


def test_integers_are_positions_in_other_names():
    assert read(["0", "1"], labels=("bad", "good"))[1] == [0, 1]
    with pytest.raises(UserError, match=r"1 rows have labels outside .*: '2' \(line 4"):
        read(["0", "1", "2"], labels=("bad", "good"))
