"""The plan on disk: whole or absent, and never taken for what it is not."""

import errno
import json

import numpy as np
import pytest

from inflection_fast import Plan


def plan(**changes):
    fields = {
        "layers": (0, 2),
        "summary": "2 of 3 blocks: 0, 2. Größer als das Rauschen.",
        "reasons": {0: "first", 2: "last"},
        "scores": np.array([1.0, np.nan, 0.25]),
        "profile": {"entropy": [1.0, float("nan"), float("inf")]},
        "config": {"method": "greedy", "steps": None},
        "model": {"model_type": "bert", "class": "BertModel", "named": False, "layers": ["a.0", "a.1", "a.2"]},
        "found": {"entropy minimum": [0], "gradient cliff": []},
    }
    return Plan(**fields | changes)


def test_the_file_is_plain_json_in_a_stable_order(tmp_path):
    plan().save(tmp_path / "new" / "plan.json")
    text = (tmp_path / "new" / "plan.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert list(document) == [
        "kind",
        "format",
        "layers",
        "summary",
        "reasons",
        "scores",
        "profile",
        "config",
        "model",
        "found",
        "ranks",
        "heads",
        "actions",
    ]
    assert document["scores"] == [1.0, None, 0.25] and document["profile"] == {"entropy": [1.0, None, None]}
    assert document["reasons"] == {"0": "first", "2": "last"} and "Größer" in text
    Plan.load(tmp_path / "new" / "plan.json").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text


def test_a_saved_plan_replaces_the_old_one_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan().save(path)
    before = path.read_bytes()
    with open(path, "rb") as reader:
        plan(layers=(), reasons={}, found={}).save(path)
        assert reader.read() == before != path.read_bytes()
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("inflection_fast.decide.plan.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plan(summary="another").save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_json_cannot_hold_is_refused_before_a_file_is_touched(tmp_path):
    with pytest.raises(ValueError):
        plan(config={"alpha": float("nan")}).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "a recipe"}, 'lacks "kind"'),
        ({"format": 9}, "format 9; this version reads format 2"),
        ({"layers": [True]}, "layers is not a list of integers"),
        ({"layers": [0, 7]}, r"integers from 0 to 2, got \[0, 7\]"),
        ({"layers": [2, 0]}, "sorted and distinct"),
        ({"reasons": {"0": "first"}}, r"reasons: expected one for each of \[0, 2\], got \[0\]"),
        ({"reasons": {"zero": "first"}}, "reasons is not a text for each layer"),
        ({"scores": [1, 2]}, r"scores: expected shape \(3,\), got \(2,\)"),
        ({"scores": ["1", "2", "3"]}, "scores is not a list of numbers"),
        ({"profile": {"entropy": [1.0]}}, "profile: expected 3 values of entropy, got 1"),
        ({"config": []}, "config is not a table"),
        ({"model": {}}, "expected the names of the blocks"),
        ({"model": {"layers": []}}, "integers from 0 to -1"),
        ({"summary": None}, "summary is not a text"),
        ({"found": {"entropy minimum": 0}}, "found is not a list of integers for each thing"),
        ({"found": {"entropy minimum": [1]}}, r"found: expected blocks of \[0, 2\] as entropy minimum, got \[1\]"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused_with_the_reason(tmp_path, change, words):
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as refused:
        Plan.load(path)
    assert str(path) in str(refused.value)


NOT_JSON = {
    "empty": "",
    "deep": "[" * 10**5,
    "binary": "\x00",
    "nan": '{"kind": NaN}',
    "beyond floats": '{"kind": 1e999}',
    "half a character": '{"kind": "\\ud800"}',
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_not_a_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is not a plan: it is not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_does_not_change_with_the_array_it_was_made_from():
    scores = np.zeros(3)
    made = plan(scores=scores)
    scores[:] = 1
    assert (made.scores == 0).all()
