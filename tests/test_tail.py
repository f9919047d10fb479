import os

import numpy as np
import pytest

from inflection_fast.timeline import TimelineWriter, tail
from inflection_fast.timeline.tail import TimelineTail

LAYERS = ["a", "b", "c"]


def writer(folder, **options):
    return TimelineWriter(folder, layers=LAYERS, heads=2, meta={"model": {"class": "M"}}, **options)


def add(to, *steps):
    for step in steps:
        to.append(step, loss=step / 10, entropy=np.full((3, 2), step))


def steps_of(reader):
    return [step for step, _ in reader.rows()]


def test_rows_are_given_once_as_they_are_written(tmp_path):
    reader = TimelineTail(tmp_path / "timeline.arrows")
    assert steps_of(reader) == [] and reader.meta is None
    with writer(tmp_path) as out:
        assert steps_of(reader) == [] and reader.meta["layers"] == LAYERS
        add(out, 0, 5)
        rows = list(reader.rows())
        assert [step for step, _ in rows] == [0, 5]
        assert rows[1][1]["loss"] == 0.5 and (rows[1][1]["entropy"] == 5).all()
        assert np.ma.getmaskarray(rows[1][1]["activation_grad"]).all()  # nobody measured it
        add(out, 6)
        assert steps_of(reader) == [6]
    assert steps_of(reader) == [] and not reader.torn and reader.restarts == 0


def test_every_cut_of_the_file_gives_whole_rows_only_and_the_rest_later(tmp_path):
    with writer(tmp_path / "whole") as out:
        add(out, 0, 1, 2)
    whole = (tmp_path / "whole" / "timeline.arrows").read_bytes()
    path = tmp_path / "grows.arrows"
    path.touch()
    reader, seen = TimelineTail(path), []
    for size in range(0, len(whole) + 1, 97):
        with open(path, "ab") as file:
            file.write(whole[file.tell() : size])
        seen += steps_of(reader)
    with open(path, "ab") as file:
        file.write(whole[file.tell() :])
    seen += steps_of(reader)
    assert seen == [0, 1, 2] and reader.restarts == 0 and not reader.torn


def test_small_pieces_give_the_same_rows(tmp_path, monkeypatch):
    with writer(tmp_path) as out:
        add(out, *range(20))
    monkeypatch.setattr(tail, "_PIECE", 3000)
    assert steps_of(TimelineTail(tmp_path / "timeline.arrows")) == list(range(20))


def test_a_torn_end_is_said_to_be_torn(tmp_path):
    with writer(tmp_path) as out:
        add(out, 0, 1)
    path = tmp_path / "timeline.arrows"
    os.truncate(path, path.stat().st_size - 100)
    reader = TimelineTail(path)
    assert steps_of(reader) == [0] and reader.torn


def test_a_resumed_run_is_read_again_from_its_beginning(tmp_path):
    with writer(tmp_path) as out:
        add(out, 0, 1, 2, 3)
    reader = TimelineTail(tmp_path / "timeline.arrows")
    assert steps_of(reader) == [0, 1, 2, 3]
    with writer(tmp_path, resume_at=2) as out:
        add(out, 2)
        assert steps_of(reader) == [0, 1, 2] and reader.restarts == 1


def test_another_file_in_its_place_is_not_a_timeline(tmp_path):
    path = tmp_path / "timeline.arrows"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="is not a timeline: it does not begin like an Arrow stream"):
        steps_of(TimelineTail(path))
