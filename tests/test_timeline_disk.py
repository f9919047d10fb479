"""A timeline on a disk that refuses: whole steps stay, what waits is written later, and memory does not grow."""

import errno
import warnings

import pytest
from helpers.written_timelines import assert_same, signals_of, writer, written

from inflection_fast.timeline import Timeline


class FullDisk:
    """A file on which only `room` more bytes find place."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = self.file.write(bytes(data[: self.room]))
        self.room -= taken
        if taken == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_whole_steps_and_loses_nothing(tmp_path):
    out = writer(tmp_path)
    out.append(0, **signals_of(0))
    out._file = FullDisk(out._file, room=100)
    with pytest.raises(OSError, match="No space left"):
        out.append(10, **signals_of(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Timeline.load(tmp_path).steps.tolist() == [0]
    assert out.timeline.steps.tolist() == [0, 10]
    with pytest.raises(OSError, match="No space left"):
        out.append(20, **signals_of(20))
    out._file.room = 10**6
    out.close()
    assert Timeline.load(tmp_path).steps.tolist() == [0, 10, 20]
    assert_same(Timeline.load(tmp_path), out.timeline)


def test_rows_that_a_disk_refuses_for_long_are_given_up_oldest_first(tmp_path, caplog):
    out = writer(tmp_path, keep_bytes=20_000)
    out.append(0, **signals_of(0))
    out._file = FullDisk(out._file, room=100)
    for step in range(1, 200):
        with pytest.raises(OSError, match="No space left"):
            out.append(step, **signals_of(step))
    kept = out.timeline.steps.tolist()
    assert 2 < len(kept) < 20 and kept == [0, *range(201 - len(kept), 200)]  # the file's, and the last ones
    assert out.given_up == 200 - len(kept)
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'timeline.arrows'}: too many rows cannot be written; those from step 1 on are dropped"
    ]
    out._file.room = 10**6
    out.close()
    assert Timeline.load(tmp_path).steps.tolist() == kept


def test_a_timeline_in_memory_keeps_all_rows_unless_it_is_told_otherwise():
    whole, part = writer(None), writer(None, keep_bytes=20_000)
    for step in range(200):
        whole.append(step, **signals_of(step))
        part.append(step, **signals_of(step))
    assert whole.timeline.steps.tolist() == list(range(200)) and whole.given_up == 0
    assert part.timeline.steps[-1] == 199 and part.given_up == 200 - len(part.timeline.steps) > 180


def test_a_full_disk_while_resuming_leaves_the_old_file(tmp_path, monkeypatch):
    data = written(tmp_path).read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("inflection_fast.timeline.writer.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer(tmp_path, resume_at=10)
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.arrows"]
    assert (tmp_path / "timeline.arrows").read_bytes() == data
