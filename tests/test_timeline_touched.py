"""A timeline whose file is touched by somebody else while it is written."""

import shutil

import pytest
from helpers.written_timelines import assert_same, signals_of, writer, written

from inflection_fast.timeline import Timeline


def test_a_deleted_folder_is_written_again_as_a_whole(tmp_path, caplog):
    folder = tmp_path / "run"
    with writer(folder) as out:
        out.append(0, **signals_of(0))
        shutil.rmtree(folder)
        assert out.timeline.steps.tolist() == [0]
        out.append(10, **signals_of(10))
        out.append(20, **signals_of(20))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'timeline.arrows'} was deleted; all rows so far were written to it again"
    ]
    assert_same(Timeline.load(folder), Timeline.load(written(tmp_path / "other")))
    shutil.rmtree(folder)
    assert out.timeline.steps.tolist() == [0, 10, 20]  # closed, and deleted again


def test_a_file_that_another_process_replaced_is_left_alone(tmp_path):
    out = writer(tmp_path)
    out.append(0, **signals_of(0))
    other = writer(tmp_path, resume_at=0)
    other.append(5, **signals_of(5))
    with pytest.raises(OSError, match="replaced by another process"):
        out.append(10, **signals_of(10))
    assert out.timeline.steps.tolist() == [0, 10]
    assert Timeline.load(tmp_path).steps.tolist() == [5]


def test_rows_that_the_file_holds_are_not_kept_in_memory(tmp_path):
    out = writer(tmp_path)
    for step in range(5):
        out.append(step, **signals_of(step))
    assert not out._pending and out.timeline.steps.tolist() == [0, 1, 2, 3, 4]
