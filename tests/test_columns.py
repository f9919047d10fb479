"""Timelines that describe themselves, and those of formats that did not."""

from pathlib import Path

import numpy as np
import pytest

from inflection_fast.timeline import AlertRule, Column, Timeline, TimelineWriter
from inflection_fast.timeline.older import STANDARD

OLD = Path(__file__).parent / "timelines" / "format3.arrows"  # written by the version of that format
OLD_LOSS = [1.70859289, 0.64090472, 0.63917869]
OLD_ENTROPY = [1.49808347, 1.95646477, 1.76276946, 1.05745101]  # of the first block at the first step


def of_format_2(path):
    """The same as the version before wrote it, without a column for lost ranks."""
    pa = pytest.importorskip("pyarrow")
    stream = pa.ipc.open_stream(OLD.read_bytes())
    at = stream.schema.get_field_index("missing_ranks")
    meta = {key: value.replace(b'"format": 3', b'"format": 2') for key, value in stream.schema.metadata.items()}
    schema = stream.schema.remove(at).with_metadata(meta)
    with pa.ipc.new_stream(path, schema) as old:
        for batch in stream:
            columns = [column for i, column in enumerate(batch.columns) if i != at]
            old.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


@pytest.mark.parametrize("version", [2, 3])
def test_a_timeline_of_an_older_format_loads_and_is_continued(tmp_path, version):
    path = tmp_path / "timeline.arrows"
    path.write_bytes(OLD.read_bytes()) if version == 3 else of_format_2(path)
    loaded = Timeline.load(path)
    assert loaded.meta["format"] == version and loaded.steps.tolist() == [0, 2, 4] and loaded.heads == 4
    assert loaded.columns["entropy"].axes == ("layer", "head") and loaded.columns["entropy"].quantity == "attention"
    assert ("missing_ranks" in loaded.columns) == (version == 3)
    assert (loaded.missing_ranks == 0).all() if version == 3 else np.isnan(loaded.missing_ranks).all()
    np.testing.assert_allclose(loaded.loss, OLD_LOSS, rtol=1e-8)
    np.testing.assert_allclose(loaded.entropy[0, 0], OLD_ENTROPY, rtol=1e-7)
    assert np.isfinite(loaded.delta_cka).all() and np.isnan(loaded.delta_cka_se).all()
    own = Column("1", ("layer",), "own", "A column of its own.")
    settings = {"layers": loaded.layers, "heads": 4, "meta": {"model": loaded.meta["model"]}}
    columns = {name: STANDARD[name] for name in ("entropy", "missing_ranks")} | {"own": own}
    with TimelineWriter(tmp_path, **settings, columns=columns, resume_at=4) as out:
        out.append(4, own=np.arange(3.0), missing_ranks=2)
    again = Timeline.load(path)
    assert again.meta["format"] == 4 and again.steps.tolist() == [0, 2, 4]
    for name in loaded.columns:
        np.testing.assert_array_equal(getattr(again, name)[:2], getattr(loaded, name)[:2], err_msg=name)
    assert again.own[2].tolist() == [0, 1, 2] and np.isnan(again.own[:2]).all() and again.missing_ranks[2] == 2
    assert np.isnan(again.loss[2]) and again.columns["own"] == own


def test_columns_describe_themselves_and_what_nobody_measured_is_told_from_no_number(tmp_path):
    columns = {
        "share": Column(
            "1", ("layer", "expert"), "load", "Share of tokens.", "router", alerts=[AlertRule("above", 0.9)]
        ),
        "places": Column("1", ("adapter",), "places", "One number per adapter."),
        "whole": Column("s", (), "whole", "One number.", scale="log"),
    }
    axes = {"expert": 4, "adapter": ["q", "v"]}
    load = np.ma.array(np.arange(12.0).reshape(3, 4), mask=False)
    load[1, 2], load[2] = np.nan, np.ma.masked
    with TimelineWriter(tmp_path, layers=["a", "b", "c"], heads=2, meta={}, columns=columns, axes=axes) as out:
        out.append(0, share=load, places=[1.0, np.inf], whole=np.ma.array(np.nan, mask=False))
        out.append(5, share=np.ones((3, 4)))
        with pytest.raises(ValueError, match=r"share: expected shape \(3, 4\), got \(3, 2\)"):
            out.append(6, share=np.ones((3, 2)))
        with pytest.raises(ValueError, match="unknown signals"):
            out.append(6, entropy=np.ones((3, 2)))
    for timeline in (Timeline.load(tmp_path), out.timeline):
        assert timeline.columns == columns and timeline.axes == axes
        assert timeline.share.shape == (2, 3, 4) and timeline.places.shape == (2, 2) and timeline.whole.shape == (2,)
        assert np.isnan(timeline.share[0, 1, 2]) and np.isnan(timeline.share[0, 2]).all()
        mask = np.ma.getmaskarray(timeline.masked("share"))
        assert not mask[0, :2].any() and mask[0, 2].all() and not mask[1].any()
        assert timeline.places[0, 1] == np.inf and np.ma.getmaskarray(timeline.masked("places")).tolist() == [
            [False, False],
            [True, True],
        ]
        assert np.ma.getmaskarray(timeline.masked("whole")).tolist() == [False, True]
        assert timeline.entropy.shape == (2, 3, 2) and np.isnan(timeline.entropy).all()
        with pytest.raises(AttributeError, match="no column 'router_load'; its columns are"):
            timeline.router_load  # noqa: B018


def test_the_columns_of_older_formats_are_those_that_quantities_declare():
    from inflection_fast.measure import MonitorConfig
    from inflection_fast.measure.panel import Panel

    declared = Panel(MonitorConfig(quantities=tuple(STANDARD_QUANTITIES)).instances()).columns
    for name, column in STANDARD.items():
        now = declared[name]
        assert (now.axes, now.unit, now.quantity, now.alerts) == (
            column.axes,
            column.unit,
            column.quantity,
            column.alerts,
        )


STANDARD_QUANTITIES = dict.fromkeys(c.quantity for c in STANDARD.values() if c.quantity != "step")
