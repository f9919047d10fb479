"""A timeline as a pandas frame and as a table in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from .means import finite_mean

if TYPE_CHECKING:
    import pandas

    from .timeline import Timeline

__all__ = ["frame_of", "html_of", "words_of"]

_INDEX = {"step": 0, "layer": 1, "head": 2}  # number of index columns beside the step


def frame_of(timeline: Timeline, by: str) -> pandas.DataFrame:
    """See `Timeline.to_pandas`."""
    import pandas as pd

    if by not in _INDEX:
        raise ValueError(f"by: expected one of {list(_INDEX)}, got {by!r}")
    axes = ("layer", "head")[: _INDEX[by]]
    sizes = {"layer": len(timeline.layers), "head": timeline.heads}
    shape = (len(timeline.steps), *(sizes[axis] for axis in axes))
    ranges = [timeline.steps, *(np.arange(sizes[axis]) for axis in axes)]
    index = pd.MultiIndex.from_product(ranges, names=["step", *axes]) if axes else pd.Index(timeline.steps, name="step")
    columns = {}
    for name, column in timeline.columns.items():
        values = np.asarray(getattr(timeline, name), float)
        kept = sum(1 for have, want in zip(column.axes, axes, strict=False) if have == want)
        if kept < min(len(column.axes), len(axes)):
            continue  # an axis that is neither layers nor heads
        if rest := tuple(range(1 + kept, values.ndim)):
            values = finite_mean(values, rest)
        values = values.reshape(values.shape + (1,) * (len(shape) - values.ndim))
        columns[name] = np.broadcast_to(values, shape).ravel()
    return pd.DataFrame(columns, index=index)


def words_of(timeline: Timeline) -> str:
    """One line: numbers of steps, layers and columns."""
    steps = timeline.steps
    period = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no step yet"
    names = list(timeline.columns)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    count = f"{len(steps)} measured, {period}; {len(timeline.layers)} layers, {timeline.heads} heads; {shown}"
    return f"<Timeline: {count}>"


def html_of(timeline: Timeline) -> str:
    """A table of the columns: unit, meaning, and means over all places of the first and the last measured step."""
    rows = []
    for name, column in timeline.columns.items():
        values = np.asarray(getattr(timeline, name), float).reshape(len(timeline.steps), -1)
        ends = [_mean(values[at]) for at in (0, -1)] if len(values) else ["", ""]
        cells = [name, column.unit, *ends, column.explanation]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("column", "unit", "first", "last", "meaning"))
    caption = escape(words_of(timeline).strip("<>"))
    return f"<table><caption>{caption}</caption><tr>{head}</tr>{''.join(rows)}</table>"


def _mean(values: np.ndarray) -> str:
    there = values[np.isfinite(values)]
    return f"{there.mean():.4g}" if len(there) else ""
