import pytest

from inflection_fast.timeline import TimelineWriter, folder_for


def measured(folder):
    with TimelineWriter(folder, layers=["a", "b"], heads=1, meta={}) as writer:
        writer.append(0, loss=1.0)
    return folder


def test_a_folder_without_a_timeline_is_taken_as_it_is(tmp_path):
    (tmp_path / "notes.txt").touch()
    for how in ("error", "overwrite", "new"):
        assert folder_for(tmp_path, how) == tmp_path
    assert (tmp_path / "notes.txt").exists()


def test_a_timeline_that_is_there_is_refused_deleted_or_left_alone(tmp_path):
    out = measured(tmp_path / "run")
    with pytest.raises(ValueError, match=r"exists already: .* if_exists='overwrite' .* if_exists='new'"):
        folder_for(out, "error")
    assert folder_for(out, "new") == tmp_path / "run-2"
    measured(tmp_path / "run-2")
    assert folder_for(str(out), "new") == tmp_path / "run-3"
    (out / "reference.npz").touch()
    (out / "notes.txt").touch()
    assert folder_for(out, "overwrite", also=("reference.npz",)) == out
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="if_exists: expected one of error, overwrite, new, got 'append'"):
        folder_for(out, "append")
