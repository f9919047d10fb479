"""The timeline on disk and in memory: what is measured is neither lost nor mistaken for something else."""

import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from helpers.written_timelines import ALL_SIGNALS, HEADS, LAYERS, META, assert_same, signals_of, writer, written

from inflection_fast.timeline import HEAD_SIGNALS, Timeline


def test_what_is_loaded_is_what_was_appended(tmp_path):
    with writer(tmp_path) as out:
        for step in (0, 10, 20):
            out.append(step, **signals_of(step))
        assert_same(Timeline.load(tmp_path), out.timeline)
    loaded = Timeline.load(tmp_path)
    assert_same(loaded, out.timeline)
    assert loaded.steps.tolist() == [0, 10, 20] and not loaded.truncated and loaded.heads == HEADS
    assert loaded.meta["config"] == {"every": 10, "blocks": [1, 2]}
    for name in ALL_SIGNALS:
        assert getattr(loaded, name).dtype == np.float64
        expected = np.stack([signals_of(step)[name] for step in (0, 10, 20)])
        np.testing.assert_allclose(
            getattr(loaded, name), expected, rtol=1e-7 if name in HEAD_SIGNALS else 0, err_msg=name
        )


def test_a_missing_signal_is_nan_and_infinities_are_kept():
    out = writer(None)
    out.append(3, max_logit=np.full((3, HEADS), -np.inf), loss=None)
    assert np.isnan(out.timeline.entropy).all() and np.isnan(out.timeline.loss).all()
    assert np.isneginf(out.timeline.max_logit).all()


def test_a_timeline_without_rows_has_arrays_of_length_zero(tmp_path):
    writer(tmp_path).close()
    loaded = Timeline.load(tmp_path)
    assert loaded.entropy.shape == (0, 3, HEADS) and loaded.delta_cka.shape == (0, 3) and loaded.loss.shape == (0,)


def test_every_prefix_of_the_file_gives_every_whole_step(tmp_path):
    path, whole = tmp_path / "timeline.arrows", []
    with writer(tmp_path) as out:
        for step in (0, 10, 20):
            whole.append(path.stat().st_size)
            out.append(step, **signals_of(step))
        whole.append(path.stat().st_size)
    data, full = path.read_bytes(), Timeline.load(path)
    cut = tmp_path / "cut.arrows"
    cut.write_bytes(data)
    sizes = {*range(0, len(data), 11), *whole, *range(whole[2], len(data) + 1)}  # the last step bytewise
    for size in sorted(sizes, reverse=True):
        os.truncate(cut, size)
        if size < whole[0]:
            with pytest.raises(ValueError, match="not a timeline"):
                Timeline.load(cut)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part = Timeline.load(cut)
        assert part.truncated == bool(caught) == (size not in (*whole, len(data)))
        assert len(part.steps) == sum(size >= end for end in whole[1:])
        np.testing.assert_array_equal(part.entropy, full.entropy[: len(part.steps)])


def test_a_killed_process_leaves_every_step_that_append_returned_from(tmp_path):
    code = (
        "import os, numpy as np\n"
        "from inflection_fast.timeline import TimelineWriter\n"
        f"out = TimelineWriter({str(tmp_path)!r}, layers={LAYERS}, heads=2, meta={{}})\n"
        "for step in range(5): out.append(step, activation_grad=np.full(3, step))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Timeline.load(tmp_path)
    np.testing.assert_array_equal(loaded.activation_grad[:, 1], np.arange(5))


@pytest.mark.parametrize("closed", [True, False])
def test_arrow_and_pandas_open_the_file(tmp_path, closed):
    pa = pytest.importorskip("pyarrow")
    path = written(tmp_path)
    if not closed:
        path.write_bytes(path.read_bytes()[:-8])
    frame = pa.ipc.open_stream(path).read_pandas()
    assert frame.groupby("step")["layer"].apply(list).to_dict() == {step: [0, 1, 2] for step in (0, 10, 20)}
    assert frame["entropy"][4][1] == Timeline.load(path).entropy[1, 1, 1]


@pytest.mark.parametrize("closed", [True, False])
def test_polars_opens_the_file(tmp_path, closed):
    pl = pytest.importorskip("polars")
    path = written(tmp_path)
    if not closed:
        path.write_bytes(path.read_bytes()[:-8])
    frame = pl.read_ipc_stream(path)
    assert frame["step"].unique().to_list() == [0, 10, 20] and frame["entropy"].dtype == pl.Array(pl.Float32, HEADS)


def arrow_stream(columns, metadata=None):
    import pyarrow as pa

    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        np.random.default_rng(0).bytes(4096),
        b"\xff\xff\xff\xff" + np.random.default_rng(1).bytes(4096),
        pickle.dumps(Bomb()),
        arrow_stream({"a": [1, 2]}),
        arrow_stream({"a": [1, 2]}, {"inflection_fast": '{"format": 2, "layers": ["x"], "heads": 1}'}),
        arrow_stream({"a": [1, 2]}, {"inflection_fast": "[1]"}),
    ],
    ids=["empty", "random", "random after a magic", "pickle", "other Arrow", "other columns", "other metadata"],
)
def test_a_file_that_is_not_a_timeline_is_refused(tmp_path, data):
    path = tmp_path / "timeline.arrows"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a timeline"):
        Timeline.load(tmp_path)
    with pytest.raises(ValueError, match="not a timeline"):
        writer(tmp_path, resume_at=0)
    assert path.read_bytes() == data


def test_a_step_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "timeline.arrows"
    out = writer(tmp_path)
    start = path.stat().st_size
    out.append(0, **signals_of(0))
    data = path.read_bytes()
    path.write_bytes(data + data[start:])
    with pytest.raises(ValueError, match="steps increasing"):
        Timeline.load(path)


def test_resuming_never_writes_into_the_file_that_others_read(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    with open(path, "rb") as reader:
        writer(tmp_path, resume_at=10).close()
        assert reader.read() == data != path.read_bytes()


def test_another_format_is_named(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format": 4', b'"format": 7'))
    with pytest.raises(ValueError, match="format 7; this version reads format 4"):
        Timeline.load(path)


def test_metadata_nested_too_deep_are_no_timeline(tmp_path):
    path = written(tmp_path)
    source = pyarrow.BufferReader(path.read_bytes())
    schema = pyarrow.ipc.read_schema(pyarrow.ipc.read_message(source))
    path.write_bytes(schema.with_metadata({b"inflection_fast": b"[" * 10**5}).serialize().to_pybytes())
    with pytest.raises(ValueError, match="no timeline metadata"):
        Timeline.load(path)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no timeline"):
        Timeline.load(tmp_path)


def test_flipped_bytes_never_give_a_timeline_of_another_shape(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = Timeline.load(path)
            except ValueError:
                continue
        assert loaded.entropy.shape == (len(loaded.steps), 3, HEADS) and (np.diff(loaded.steps) > 0).all()


def test_an_existing_timeline_is_not_overwritten(tmp_path):
    data = written(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        writer(tmp_path)
    assert (tmp_path / "timeline.arrows").read_bytes() == data


@pytest.mark.parametrize("torn", [0, 8, 50], ids=["closed", "killed", "torn"])
def test_resuming_drops_later_rows_and_a_torn_end_and_goes_on(tmp_path, torn):
    path = written(tmp_path / "a", (0, 10, 20, 30))
    path.write_bytes(path.read_bytes()[: -torn or None])
    with writer(tmp_path / "a", resume_at=20) as out:
        assert out.timeline.steps.tolist() == [0, 10]
        for step in (20, 30):
            out.append(step, **signals_of(step))
    written(tmp_path / "b", (0, 10, 20, 30))
    assert_same(Timeline.load(tmp_path / "a"), Timeline.load(tmp_path / "b"))
    assert_same(Timeline.load(tmp_path / "a"), out.timeline)


def test_resuming_where_nothing_is_starts_a_timeline(tmp_path):
    with writer(tmp_path / "new", resume_at=50) as out:
        out.append(50)
    assert Timeline.load(tmp_path / "new").steps.tolist() == [50]


def test_resuming_under_another_configuration_records_the_earlier_one(tmp_path):
    written(tmp_path)
    with writer(tmp_path, resume_at=20, meta=META | {"config": {"every": 5}}) as out:
        out.append(25)
    meta = Timeline.load(tmp_path).meta
    assert meta["config"] == {"every": 5}
    assert meta["earlier"] == [{"last_step": 10, "config": {"every": 10, "blocks": [1, 2]}}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["a", "b", "c"]}, r"encoder\.layer\.0.*'a'"),
        ({"heads": 4}, "heads = 2.*heads = 4"),
        ({"meta": META | {"model": {"class": "GPT2Model"}}}, "BertModel.*GPT2Model"),
    ],
)
def test_resuming_the_timeline_of_another_model_is_refused_naming_both(tmp_path, options, words):
    data = written(tmp_path).read_bytes()
    with pytest.raises(ValueError, match=words):
        writer(tmp_path, resume_at=10, **options)
    assert (tmp_path / "timeline.arrows").read_bytes() == data


@pytest.mark.parametrize(
    ("step", "signals", "words"),
    [
        (5, {}, r"above the last \(5\), got 5"),
        (4, {}, r"above the last \(5\), got 4"),
        (6, {"entropie": 1.0}, "unknown signals.*entropie"),
        (6, {"entropy": np.zeros((3, 3))}, r"entropy: expected shape \(3, 2\), got \(3, 3\)"),
        (6, {"activation_grad": np.zeros((1, 3))}, r"activation_grad: expected shape \(3,\)"),
        (6, {"loss": np.zeros(1)}, r"loss: expected shape \(\)"),
        (6, {"loss": "low"}, "loss: expected numbers, got str"),
    ],
)
def test_a_wrong_row_is_refused_and_nothing_is_added(tmp_path, step, signals, words):
    out = writer(tmp_path)
    out.append(5)
    with pytest.raises(ValueError, match=words):
        out.append(step, **signals)
    out.append(6)
    assert Timeline.load(tmp_path).steps.tolist() == out.timeline.steps.tolist() == [5, 6]


def test_a_closed_writer_can_be_closed_again_but_not_appended_to(tmp_path):
    out = writer(tmp_path)
    out.close()
    out.close()
    with pytest.raises(ValueError, match="closed"):
        out.append(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": []}, "layers"),
        ({"layers": ["a", "a"]}, "distinct"),
        ({"heads": 0}, "heads"),
        ({"resume_at": -1}, "resume"),
    ],
)
def test_a_writer_refuses_nonsense_before_it_makes_a_folder(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        writer(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_importing_the_module_does_not_import_pyarrow():
    code = "import sys, inflection_fast.timeline; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
