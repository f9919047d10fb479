"""Timelines and plans in notebooks."""

import numpy as np
import pandas as pd
import pytest

from inflection_fast import Column, Plan, Timeline
from inflection_fast.timeline.older import STANDARD


@pytest.fixture
def timeline():
    entropy = np.arange(12.0).reshape(2, 3, 2)
    entropy[1, 2] = np.nan
    entropy[0, 0, 0] = np.nan
    values = {"entropy": entropy, "activation_grad": np.arange(6.0).reshape(2, 3), "loss": np.array([0.5, 0.25])}
    odd = Column("<&>", ("part",), "odd", "An axis of its own & a sign.")
    meta = {"heads": 2, "layers": ["a", "b", "c"], "format": 4, "columns": {}, "axes": {"part": 4}}
    columns = {name: STANDARD[name] for name in values} | {"odd": odd}
    return Timeline(
        np.array([0, 10]), layers=["a", "b", "c"], meta=meta, columns=columns, **values, odd=np.ones((2, 4))
    )


def test_frames_have_a_row_per_step_layer_or_head(timeline):
    by_layer = timeline.to_pandas()
    assert by_layer.index.names == ["step", "layer"] and len(by_layer) == 6 and "odd" not in by_layer
    assert by_layer.loc[(0, 0), "entropy"] == 1.0  # of the head that has a value
    assert by_layer.loc[(10, 1), "entropy"] == 8.5 and np.isnan(by_layer.loc[(10, 2), "entropy"])
    assert by_layer.loc[(10, 1), "activation_grad"] == 4.0 and by_layer.loc[(10, 2), "loss"] == 0.25
    by_head = timeline.to_pandas("head")
    assert len(by_head) == 12 and by_head.loc[(10, 1, 1), "entropy"] == 9.0
    assert by_head.loc[(10, 1, 1), "activation_grad"] == 4.0
    by_step = timeline.to_pandas("step")
    assert by_step.index.tolist() == [0, 10] and by_step.loc[10, "activation_grad"] == 4.0
    pd.testing.assert_series_equal(by_step["loss"], pd.Series([0.5, 0.25], index=by_step.index, name="loss"))
    with pytest.raises(ValueError, match="by: expected one of"):
        timeline.to_pandas("heads")


def test_a_timeline_shows_itself_in_a_line_and_in_a_table(timeline):
    expected = "<Timeline: 2 measured, steps 0 to 10; 3 layers, 2 heads; entropy, activation_grad, loss, odd>"
    assert repr(timeline) == expected
    page = timeline._repr_html_()
    assert "&lt;&amp;&gt;" in page and "<&>" not in page and "An axis of its own &amp; a sign." in page
    assert page.count("<tr>") == 1 + 4


def test_plot_draws_a_map_or_lines(timeline):
    meta = timeline.meta | {"columns": {name: column.as_dict() for name, column in timeline.columns.items()}}
    timeline.meta = meta
    ax = timeline.plot("entropy")
    assert "entropy" in ax.get_title(loc="left").lower()
    assert len(timeline.plot("entropy", layers=[0, 1]).lines) == 2
    with pytest.raises(ValueError, match="name: expected one of"):
        timeline.plot("entrpy")


def test_a_plan_shows_itself():
    plan = Plan(
        layers=(1,), summary="One <b>layer</b>.", reasons={1: "It is < the others."}, scores=[0.0, 1.0], profile={},
        config={}, model={"layers": ["a", "b"]},
    )  # fmt: skip
    assert repr(plan) == "<Plan: 1 of 2 layers, [1]>"
    assert "One &lt;b&gt;layer&lt;/b&gt;." in plan._repr_html_() and "It is &lt; the others." in plan._repr_html_()
