import dataclasses
import json

import pytest

from inflection_fast import atomic
from inflection_fast.atomic import replacing, write_json
from inflection_fast.records import DataRecord, Metrics, OverheadRecord, RunRecord, StageRecord

STAGE = StageRecord(
    stage="measure",
    label="shallow",
    task="sequence-classification",
    data=DataRecord(8, 2, 1, ("no", "yes"), {"duplicates": 3}),
    majority=0.5,
    metrics=Metrics(n=2, loss=0.5, accuracy=0.5, correct=1, right="10"),
    trainable_parameters=10,
    total_parameters=100,
    layers=(0, 2),
    steps=6,
    train_seconds=1.5,
    evaluate_seconds=0.5,
    overhead=OverheadRecord(1.0, 2.0, 0.1, 1.1),
    on_target=Metrics(n=2, loss=1.0, perplexity=2.7),
)


@pytest.mark.parametrize(
    "record",
    [
        STAGE,
        dataclasses.replace(STAGE, layers=None, metrics=None, overhead=None, on_target=None, draws=3, data=None),
        RunRecord(("source", "plan"), {"torch": "2"}, 7),
        RunRecord(),
    ],
)
def test_a_record_is_read_as_it_was_written(tmp_path, record):
    path = tmp_path / "deep" / "record.json"
    record.save(path)
    assert type(record).load(path) == record
    assert json.loads(path.read_text())["format"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=1), "has format 1; this version reads format 2"),
        (lambda tree: tree.pop("format"), "has format None"),
        (lambda tree: tree.pop("steps"), "steps is missing"),
        (lambda tree: tree.update(stepz=1), "stepz is not known"),
        (lambda tree: tree["metrics"].update(accuracy="high"), "metrics.accuracy must be a number; it is 'high'"),
        (lambda tree: tree["metrics"].update(n=3), "right must be a string with one 0 or 1 per text"),
        (lambda tree: tree["metrics"].update(n=True), "metrics.n must be a whole number; it is True"),
        (lambda tree: tree.update(steps=1.5), "steps must be a whole number; it is 1.5"),
        (lambda tree: tree.update(layers=[0, "1"]), r"layers\[1\] must be a whole number; it is '1'"),
        (lambda tree: tree.update(layers=3), "layers must be a list; it is 3"),
        (lambda tree: tree.update(label=None), "label must be a text; it is None"),
        (lambda tree: tree["data"].update(dropped=[1]), r"data.dropped must be an object; it is \[1\]"),
        (lambda tree: tree["data"]["dropped"].update(empty="x"), "data.dropped.empty must be a whole number"),
        (lambda tree: tree.update(overhead=2), "overhead must be an object; it is 2"),
    ],
)
def test_what_a_damaged_record_lacks_is_named(tmp_path, change, message):
    path = tmp_path / "stage.json"
    STAGE.save(path)
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message) as caught:
        StageRecord.load(path)
    assert str(caught.value).startswith(str(path))


def test_infinity_is_no_number(tmp_path):
    path = tmp_path / "stage.json"
    STAGE.save(path)
    path.write_text(path.read_text().replace('"majority": 0.5', '"majority": Infinity'))
    with pytest.raises(ValueError, match="Infinity is not JSON"):
        StageRecord.load(path)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_json(path, {"a": 2})
    with pytest.raises(KeyboardInterrupt), replacing(path) as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1} and [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_at_once(tmp_path):
    """As two workers of a study that take over the same published cell."""
    path = tmp_path / "a.json"
    with replacing(path) as fresh:
        fresh.write_text("1")
        write_json(path, 2)
        assert json.loads(path.read_text()) == 2
    assert json.loads(path.read_text()) == 1 and [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 10**5, "nested too deep"),
        ('{"seed": 1e999}', "Out of range"),
        ('{"a": "\\ud800"}', "surrogates"),
    ],
    ids=["deep", "beyond floats", "half a character"],
)
def test_what_could_not_be_written_again_is_not_read(tmp_path, text, reason):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"run.json is not JSON: .*{reason}"):
        RunRecord.load(path)
