"""The file between measuring and deciding: what is written comes back, whatever happens to the file."""

import contextlib
import os
import pickle
import random
import signal
import warnings

import numpy as np
import pyarrow as pa
import pytest

from inflection_fast import Timeline
from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS, TimelineWriter

LAYERS, HEADS = ["m.layer.0", "m.layer.1", "m.layer.2"], 4
META = {"model": {"class": "M", "model_type": "m", "parameters": 5}, "config": {"every": 10}}


def row(step, seed=0):
    rng = np.random.default_rng(seed + step)
    signals = {name: rng.normal(size=(len(LAYERS), HEADS)).astype(np.float32) for name in HEAD_SIGNALS}
    signals |= {name: rng.normal(size=len(LAYERS)).astype(np.float32) for name in LAYER_SIGNALS}
    signals |= {name: np.float32(rng.normal()) for name in STEP_SIGNALS}
    return signals


def written(folder, steps):
    with TimelineWriter(folder, layers=LAYERS, heads=HEADS, meta=META) as writer:
        for step in steps:
            writer.append(step, **row(step))
    return folder / "timeline.arrows"


def assert_holds(timeline, steps):
    assert timeline.steps.tolist() == list(steps)
    for name in (*HEAD_SIGNALS, *LAYER_SIGNALS, *STEP_SIGNALS):
        value = getattr(timeline, name)
        tail = (len(LAYERS), HEADS) if name in HEAD_SIGNALS else (len(LAYERS),) if name in LAYER_SIGNALS else ()
        assert isinstance(value, np.ndarray) and value.dtype == np.float64 and value.shape == (len(steps), *tail), name
        for i, step in enumerate(steps):
            assert np.array_equal(value[i].astype(np.float32), row(step)[name]), name


def test_what_is_written_is_read_back_from_the_folder_and_from_the_file(tmp_path):
    file = written(tmp_path / "run", [0, 10, 20, 45])
    for path in (tmp_path / "run", file, str(tmp_path / "run")):
        timeline = Timeline.load(path)
        assert_holds(timeline, [0, 10, 20, 45])
        assert list(timeline.layers) == LAYERS and not timeline.truncated
        assert timeline.meta["model"] == META["model"] and timeline.meta["config"] == META["config"]


def test_a_timeline_in_memory_needs_no_folder_and_equals_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with TimelineWriter(None, layers=LAYERS, heads=HEADS, meta=META) as writer:
        assert writer.timeline.steps.shape == (0,)
        for step in (0, 1):
            writer.append(step, **row(step))
        assert_holds(writer.timeline, [0, 1])
    assert not os.listdir(tmp_path)


def test_a_signal_that_is_not_given_is_nan(tmp_path):
    with TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META) as writer:
        writer.append(3, entropy=row(3)["entropy"])
    timeline = Timeline.load(tmp_path)
    assert np.isfinite(timeline.entropy).all()
    for name in (*HEAD_SIGNALS[1:], *LAYER_SIGNALS, *STEP_SIGNALS):
        assert np.isnan(getattr(timeline, name)).all(), name


def test_nan_and_infinity_survive(tmp_path):
    odd = row(0)
    odd["entropy"][1, 2], odd["activation_grad"][0], odd["loss"] = np.nan, np.inf, np.float32("nan")
    with TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META) as writer:
        writer.append(0, **odd)
    timeline = Timeline.load(tmp_path)
    assert np.isnan(timeline.entropy[0, 1, 2]) and np.isnan(timeline.entropy).sum() == 1
    assert np.isinf(timeline.activation_grad[0, 0]) and np.isnan(timeline.loss[0])


def test_every_step_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    writer = TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META)
    for step in range(5):
        writer.append(step, **row(step))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert Timeline.load(tmp_path).steps.tolist() == list(range(step + 1))
    writer.close()
    writer.close()


def test_other_tools_open_the_file(tmp_path):
    file = written(tmp_path, [0, 10])
    with pa.ipc.open_stream(file) as reader:
        batches = list(reader)
        table = pa.Table.from_batches(batches)
    assert len(batches) == 2 and table.num_rows == 6
    frame = table.to_pandas()
    assert frame["step"].tolist() == [0, 0, 0, 10, 10, 10] and frame["layer"].tolist() == [0, 1, 2] * 2
    assert str(table.schema.field("step").type) == "int64" and str(table.schema.field("layer").type) == "int32"
    for name in HEAD_SIGNALS:
        assert table.schema.field(name).type.list_size == HEADS, name
        assert np.array_equal(np.stack(frame[name][:3]), row(0)[name]), name
    for name in LAYER_SIGNALS:
        assert np.array_equal(frame[name][3:].to_numpy(np.float32), row(10)[name]), name
    assert frame["loss"].nunique() == 2
    assert b"inflection_fast" in table.schema.metadata


def test_a_file_cut_at_any_byte_gives_a_prefix_or_says_it_is_no_timeline(tmp_path):
    steps = [0, 1, 2, 3]
    whole = written(tmp_path, steps).read_bytes()
    dice, lengths = random.Random(7), []
    cuts = {0, 1, 7, 8, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(150))}
    for cut in sorted(cuts):
        broken = tmp_path / "broken.arrows"
        broken.write_bytes(whole[:cut])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                timeline = Timeline.load(broken)
            except ValueError:
                lengths.append(-1)
                continue
        n = len(timeline.steps)
        assert_holds(timeline, steps[:n])
        if n < len(steps):
            assert timeline.truncated == bool(caught), "a torn tail comes with a warning, a clean end without"
        lengths.append(n)
    assert lengths == sorted(lengths) and set(lengths) >= {-1, 1, 2, 3}


def test_bytes_that_are_wrong_in_the_middle_never_give_other_steps_or_another_error(tmp_path):
    steps = list(range(6))
    whole, dice = written(tmp_path, steps).read_bytes(), random.Random(3)
    for _ in range(60):
        broken = bytearray(whole)
        at = dice.randrange(len(whole))
        broken[at : at + 16] = b"\xff" * len(broken[at : at + 16])
        (tmp_path / "broken.arrows").write_bytes(broken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                Timeline.load(tmp_path / "broken.arrows")
            except ValueError:
                pass


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def arrow_of_someone_else(path):
    table = pa.table({"step": [1, 2], "layer": [0, 0]})
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "zeros", "numpy", "foreign arrow"])
def test_a_file_that_is_not_a_timeline_is_a_value_error(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "timeline.arrows"
    if content == "foreign arrow":
        arrow_of_someone_else(path)
    elif content == "numpy":
        np.save(open(path, "wb"), np.array([Bomb()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"step,layer\n1,2\n", "pickle": pickle.dumps(Bomb()), "zeros": bytes(4096)}[content]
        )
    with pytest.raises(ValueError, match="timeline"):
        Timeline.load(path)
    assert not (tmp_path / "exploded").exists(), "a pickle was loaded"


def test_the_pickle_would_have_exploded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()


def test_a_missing_timeline_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        Timeline.load(tmp_path / "nowhere")


def test_an_existing_timeline_is_not_overwritten(tmp_path):
    file = written(tmp_path, [0, 1])
    before = file.read_bytes()
    with pytest.raises(ValueError):
        TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META)
    assert file.read_bytes() == before


@pytest.mark.parametrize("torn", [0, 5, 300])
def test_a_resumed_timeline_drops_the_steps_that_are_run_again(tmp_path, torn):
    file = written(tmp_path, [0, 10, 20, 30])
    if torn:
        file.write_bytes(file.read_bytes()[:-torn])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META, resume_at=20) as writer:
            assert_holds(writer.timeline, [0, 10])
            writer.append(20, **row(20))
            writer.append(25, **row(25))
            assert_holds(writer.timeline, [0, 10, 20, 25])
    timeline = Timeline.load(tmp_path)
    assert_holds(timeline, [0, 10, 20, 25])
    assert not timeline.truncated
    assert sorted(os.listdir(tmp_path)) == ["timeline.arrows"]


def test_resuming_a_timeline_of_other_layers_is_refused_and_loses_nothing(tmp_path):
    file = written(tmp_path, [0, 1])
    before = file.read_bytes()
    for layers, heads in ((["other"] * 3, HEADS), (LAYERS[:2], HEADS), (LAYERS, HEADS + 1)):
        with pytest.raises(ValueError):
            TimelineWriter(tmp_path, layers=layers, heads=heads, meta=META, resume_at=1)
        assert file.read_bytes() == before


@pytest.mark.parametrize("wrong", [
    {"entropi": np.zeros((3, 4))}, {"entropy": np.zeros((3, 5))}, {"entropy": np.zeros((2, 4))},
    {"entropy": np.zeros(3)},
    {"activation_grad": np.zeros(2)}, {"activation_grad": np.zeros((3, 4))}, {"loss": np.zeros(3)},
])  # fmt: skip
def test_a_wrong_signal_is_refused_and_nothing_half_written(tmp_path, wrong):
    with TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META) as writer:
        writer.append(0, **row(0))
        with pytest.raises(ValueError, match=next(iter(wrong))):
            writer.append(1, **wrong)
        writer.append(1, **row(1))
    assert_holds(Timeline.load(tmp_path), [0, 1])


def test_steps_only_go_forward(tmp_path):
    with TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META) as writer:
        writer.append(5, **row(5))
        for step in (4, 0, -1):
            with pytest.raises(ValueError, match="step"):
                writer.append(step, **row(1))
    assert_holds(Timeline.load(tmp_path), [5])


@pytest.mark.parametrize("recovers", [True, False])
def test_a_full_disk_loses_nothing_that_was_measured_before(tmp_path, recovers):
    resource = pytest.importorskip("resource")
    writer = TimelineWriter(tmp_path, layers=LAYERS, heads=HEADS, meta=META)
    writer.append(0, **row(0))
    size = (tmp_path / "timeline.arrows").stat().st_size
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))
        with pytest.raises(OSError):
            for step in range(1, 20):
                writer.append(step, **row(step))
        if not recovers:
            with contextlib.suppress(OSError):
                writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    writer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timeline = Timeline.load(tmp_path)
    assert_holds(timeline, [0, 1][: len(timeline.steps)])
    assert len(timeline.steps) >= 1
