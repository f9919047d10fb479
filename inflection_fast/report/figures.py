"""Pictures for papers: functions that draw on a given axis, and every chart of the page as SVG and PDF.

    fig, (left, right) = plt.subplots(1, 2)
    timeline = Timeline.load("runs/a")
    signal_map(timeline, "entropy", left)
    signal_lines(timeline, "activation_grad", right, layers=[0, 5])

Every function returns the axis that it drew on; without a given one it creates a figure (`ax.figure`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.decide import Plan
from inflection_fast.report import canvas
from inflection_fast.report.content import PAIRS, Content, Series
from inflection_fast.report.folder import Run
from inflection_fast.report.heatmap import draw_heat_map, edges
from inflection_fast.report.pictures import layer_means, safe_name
from inflection_fast.report.profile import by_name
from inflection_fast.report.words import capitalised
from inflection_fast.timeline import Column, Timeline, columns_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["difference_map", "head_map", "score_line", "signal_lines", "signal_map", "write_figures"]

DIFFERENCE = "RdBu_r"


def signal_map(timeline: Timeline, name: str, ax: Axes | None = None, *, chosen: Sequence[int] = ()) -> Axes:
    """A column by layer and step, mean over all its other axes; `chosen` layers are marked.

    ValueError for a column that the timeline does not have or that is not by layer.
    """
    column, steps, values = _by_layer(timeline, name)
    return _map_of(column, values.T, steps, chosen, _axis(ax, 7.0, 3.2))


def signal_lines(timeline: Timeline, name: str, ax: Axes | None = None, *, layers: Sequence[int] | None = None) -> Axes:
    """A column over the steps, a line for each of `layers` (None: six of them), with its standard error as a band.

    ValueError as in `signal_map`, and for a layer that does not exist.
    """
    column, steps, values = _by_layer(timeline, name)
    count = values.shape[1]
    if layers is None:
        layers = canvas.spread_layers(count)
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {wrong}")
    ax = _axis(ax, 7.0, 3.0)
    canvas.style_axes(ax, capitalised(column.label), "optimizer step", column.unit)
    errors = getattr(timeline, f"{name}_se", None) if np.ndim(getattr(timeline, name)) == 2 else None
    handles = []
    for place, layer in enumerate(layers):
        colour = canvas.layer_colour(place / max(len(layers) - 1, 1))
        handles += ax.plot(steps, values[:, layer], color=colour, linewidth=1.3, label=f"layer {layer}")
        if errors is not None:
            error = np.nan_to_num(errors[np.isin(timeline.steps, steps), layer])
            low, high = values[:, layer] - error, values[:, layer] + error
            ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if column.scale == "log":
        ax.set_yscale("log")
    canvas.legend(ax, handles)
    return ax


def head_map(timeline: Timeline, name: str, layer: int, ax: Axes | None = None) -> Axes:
    """A column by head (or whatever its second axis is) and step, of one layer.

    ValueError for a column that has no such axis, or a layer that does not exist.
    """
    column = _column(timeline, name)
    values = np.asarray(getattr(timeline, name), float)
    if column.axes[:1] != ("layer",) or values.ndim < 3:
        raise ValueError(f"name: expected a column by layer and another axis, and {name} is by {column.axes or 'step'}")
    if not 0 <= layer < values.shape[1]:
        raise ValueError(f"layer: expected a number from 0 to {values.shape[1] - 1}, got {layer}")
    part = values[:, layer].reshape(len(values), -1)
    there = np.isfinite(part).any(1)
    ax = _axis(ax, 7.0, 3.2)
    axis = " x ".join(column.axes[1:])
    title = f"{capitalised(column.label)}, layer {layer}"
    borders = edges(timeline.steps[there])
    draw_heat_map(ax, part[there].T, borders, title=title, unit=column.unit, x="optimizer step", y=axis)
    return ax


def score_line(plan: Plan, ax: Axes | None = None, *, name: str = "SKI") -> Axes:
    """SKI by layer with the chosen layers marked, or another quantity of the plan's profile with its standard error.

    ValueError for a quantity that the plan does not have.
    """
    if name != "SKI" and name not in plan.profile:
        raise ValueError(f"name: expected 'SKI' or one of {sorted(plan.profile)}, got {name!r}")
    values = np.asarray(plan.scores, float) if name == "SKI" else by_name(plan, name)
    error = by_name(plan, f"{name}_se")
    ax = _axis(ax, 7.0, 2.8)
    canvas.style_axes(ax, f"{name} by layer", "layer", name)
    layers = np.arange(len(values))
    ax.errorbar(
        layers, values, yerr=error, color=canvas.TEXT_COLOUR, marker="o", markersize=3.5, linewidth=1.2, capsize=2.5
    )
    chosen = [layer for layer in plan.layers if np.isfinite(values[layer])]
    style: dict[str, Any] = {"color": canvas.CHOSEN, "marker": "o", "linestyle": "none", "markersize": 7, "zorder": 5}
    handles = ax.plot(chosen, values[chosen], label="chosen layer", **style) if chosen else []
    canvas.legend(ax, handles)
    canvas.layer_axis(ax.xaxis, len(values))
    return ax


def difference_map(
    values: np.ndarray, steps: np.ndarray, ax: Axes | None = None, *, title: str = "", unit: str = ""
) -> Axes:
    """A difference [S, L] by layer and step, white where it is 0, red above and blue below; NaN is hatched."""
    values = np.asarray(values, float)
    finite = np.abs(values[np.isfinite(values)])
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    ax = _axis(ax, 7.0, 3.2)
    options: dict[str, Any] = {"x": "optimizer step", "limits": (-reach, reach), "colours": DIFFERENCE}
    draw_heat_map(ax, values.T, edges(steps), title=title, unit=unit, **options)
    return ax


# ---- every chart of a run --------------------------------------------------------------------------------------------


def write_figures(content: Content, run: Run | None, folder: Path) -> list[Path]:
    """Every chart of a run as SVG and PDF in `folder`, which is made; their paths without the ending."""
    from inflection_fast.report import pictures

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def add(name: str, figure: Any) -> None:
        canvas.save_vectors(figure, folder / name)
        written.append(folder / name)

    if run is not None:
        pictures.charts(run, lambda key, title, caption, figure: add(key, figure))
    chosen = content.run.plan.layers if content.run.plan is not None else ()
    for name, series in content.series.items():
        if not len(series.places.steps):
            continue
        safe = safe_name(name)
        if series.column.axes == PAIRS and series.parts is not None:
            title = capitalised(series.column.label)
            add(f"matrix_{safe}", pictures.matrix_of(name, series.column, series.parts.mean[-1], title))
            continue
        add(f"over_steps_{safe}", _overview(series).figure)
        if series.places.shape:
            add(f"by_layer_{safe}", _reduced_map(series, chosen).figure)
    return written


def _overview(series: Series) -> Axes:
    """Mean over all places, and a band from the lowest to the highest."""
    ax = _axis(None, 5.0, 2.4)
    canvas.style_axes(ax, capitalised(series.column.label), "optimizer step", series.column.unit)
    steps = series.places.steps.mean(1)
    mean, low, high = series.places.over_places().T
    marker = "o" if len(steps) == 1 else ""
    ax.plot(steps, mean, color=canvas.BLUE, linewidth=1.4, marker=marker)
    if (high > low).any():
        ax.fill_between(steps, low, high, color=canvas.BLUE, alpha=0.16, linewidth=0)
    if series.column.scale == "log" and np.nanmin(low) > 0:
        ax.set_yscale("log")
    return ax


def _reduced_map(series: Series, chosen: Sequence[int]) -> Axes:
    ax = _axis(None, 7.0, min(5.2, max(2.2, 1.5 + 0.2 * series.places.shape[0])))
    return _map_of(series.column, series.places.mean.T, series.places.steps.mean(1), chosen, ax)


def _map_of(column: Column, values: np.ndarray, steps: np.ndarray, chosen: Sequence[int], ax: Axes) -> Axes:
    """The map of a column by layer [L, S] and step [S] on an axis."""
    title, log = capitalised(column.label), column.scale == "log"
    draw_heat_map(ax, values, edges(steps), title=title, unit=column.unit, x="optimizer step", chosen=chosen, log=log)
    return ax


def _axis(ax: Axes | None, width: float, height: float) -> Axes:
    return canvas.figure(width, height).add_subplot() if ax is None else ax


def _column(timeline: Timeline, name: str) -> Any:
    columns = columns_in(timeline.meta)
    if name not in columns:
        raise ValueError(f"name: expected one of {sorted(columns)}, got {name!r}")
    return columns[name]


def _by_layer(timeline: Timeline, name: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """The column, the steps [S] where it has a value, and those values [S, L], mean over the axes after the layers."""
    column = _column(timeline, name)
    if column.axes[:1] != ("layer",):
        raise ValueError(f"name: expected a column by layer, and {name} is one number a step")
    values = layer_means(timeline, name)
    there = np.isfinite(values).any(1)
    if not there.any():
        raise ValueError(f"{name} has no value in this timeline")
    return column, timeline.steps[there], values[there]
