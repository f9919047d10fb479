import errno

import pytest

pytest.importorskip("datasets")

from inflection_fast.run.config import (
    DataConfig,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
    differences,
)
from inflection_fast.run.errors import disk_full, refused_path


def test_a_full_disk_is_recognised():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        assert disk_full(error)
    assert disk_full(RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file"))
    assert disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not disk_full(OSError(errno.EACCES, "Permission denied")) and not disk_full(None)


def test_a_refused_path_is_named_with_the_reason():
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "a/b")
        except OSError as error:
            raise RuntimeError("reading failed") from error
    except RuntimeError as error:
        assert refused_path(error) == "a/b: permission denied"
    assert refused_path(OSError(errno.EROFS, "Read-only file system", "c")) == "c: read-only file system"
    assert refused_path(OSError(errno.ENOENT, "No such file or directory", "d")) is None
    assert refused_path(PermissionError("no errno")) is None and refused_path(None) is None


def test_differences_are_named_with_both_values():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 2, "c": [1, 2]}, "d": "x", "e": 3}
    assert differences(old, new) == ["a.b (1 -> 2)", "d (null -> x)", "e (null -> 3)"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelConfig(""),
        lambda: ModelConfig("m", max_length=1),
        lambda: DataConfig(""),
        lambda: DataConfig("d", test_share=1.0),
        lambda: DataConfig("d", labels=("a", "a")),
        lambda: DataConfig("d", test="t", group="g"),
        lambda: DataConfig("d", train_limit=0),
        lambda: TrainConfig(steps=0),
        lambda: TrainConfig(learning_rate=0),
        lambda: TrainConfig(warmup_share=1.0),
        lambda: MeasureConfig(overhead_pairs=2),
        lambda: TuneConfig(top=0),
        lambda: RunConfig(ModelConfig("m"), DataConfig("d"), "o", baselines=("best",)),
        lambda: RunConfig(ModelConfig("m"), DataConfig("d"), "o", baselines=("last", "last")),
        lambda: RunConfig(ModelConfig("m"), DataConfig("d"), "o", seed=-1),
        lambda: RunConfig(ModelConfig("m"), DataConfig("d"), ""),
    ],
)
def test_settings_refuse_nonsense(make):
    with pytest.raises(ValueError, match=r"got|give one"):
        make()
