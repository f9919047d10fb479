"""CKA in pictures: a map of layers by layers, and the drift of each layer with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cka_map", "drift_chart"]

WRITTEN = 12  # a map of at most so many layers has its numbers written into it


def cka_map(
    values: np.ndarray,  # [L1, L2]
    *,
    title: str = "CKA of layers",
    x: str = "layer",
    y: str = "layer",
    unit: str = "CKA",
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> Figure:
    """Draws what `cka_matrix` gives, layers of the first model upwards.

    Colours run between `limits` whatever the values are, so that two maps compare (None: between the least and the
    largest); debiased values below 0 have the colour of 0 and keep their number. NaN is hatched.
    """
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    values = np.asarray(values, float)
    rows, columns = values.shape
    side = min(5.4, max(2.2, 1.2 + 0.32 * max(rows, columns)))
    drawn = canvas.figure(side * columns / max(rows, columns) + 1.4, side * rows / max(rows, columns) + 0.6)
    ax = drawn.add_subplot()
    canvas.hatch(ax)
    shown = np.ma.masked_invalid(values)
    edges = [np.arange(count + 1) - 0.5 for count in (columns, rows)]
    low, high = limits or ((float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0))
    mesh = ax.pcolormesh(*edges, shown, cmap=canvas.MAP, norm=Normalize(low, high), zorder=1, rasterized=True)
    ax.set_aspect("equal")
    canvas.style_axes(ax, title, x, y)
    canvas.layer_axis(ax.xaxis, columns)
    canvas.layer_axis(ax.yaxis, rows)
    if max(rows, columns) <= WRITTEN:
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
            colour = "white" if values[i, j] < low + 0.6 * (high - low) else canvas.TEXT_COLOUR
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6, color=colour)
    if not np.isfinite(values).all():
        canvas.legend(ax, [Patch(label="no value", **canvas.NO_VALUE)])
    canvas.colour_bar(mesh, ax, unit, 0.03)
    return drawn


def drift_chart(
    steps: np.ndarray,  # [S]
    delta: np.ndarray,  # [S, L]
    error: np.ndarray,  # [S, L] standard errors, NaN where there is none
    chosen: Sequence[int] = (),
) -> Figure:
    """delta-CKA of every layer at the last snapshot, and of a few layers step by step, bars one standard error long."""
    there = np.flatnonzero(np.isfinite(delta).any(1))
    drawn = canvas.figure(7.0, 4.8)
    above, below = drawn.subplots(2, 1, height_ratios=(1, 1.2))
    last = there[-1] if len(there) else -1
    layers = np.arange(delta.shape[1])
    canvas.style_axes(above, f"Representation drift at step {steps[last]}", "layer", "1 - CKA")
    _bars(above, layers, delta[last], error[last], canvas.TEXT_COLOUR, linestyle="none")
    if len(chosen):
        style: dict[str, Any] = {"color": canvas.CHOSEN, "marker": "o", "linestyle": "none", "markersize": 7}
        (points,) = above.plot(list(chosen), delta[last][list(chosen)], label="chosen layer", zorder=3, **style)
        canvas.legend(above, [points])
    canvas.layer_axis(above.xaxis, len(layers))
    above.set_xlim(-0.5, len(layers) - 0.5)
    canvas.style_axes(below, "Step by step", "optimizer step", "1 - CKA")
    traced = canvas.spread_layers(len(layers))
    handles = []
    spread = 0.012 * (steps[-1] - steps[0]) / max(len(traced) - 1, 1)  # so that bars do not overlap
    for number, layer in enumerate(traced):
        colour = canvas.layer_colour(number / max(len(traced) - 1, 1))
        name = str(layer) if number else f"layer {layer}"
        place = steps[there] + (number - (len(traced) - 1) / 2) * spread
        handles.append(_bars(below, place, delta[there, layer], error[there, layer], colour, label=name))
    canvas.legend(below, handles)
    for ax in (above, below):
        ax.axhline(0, color=canvas.GREY, linewidth=0.6, zorder=0)
        ax.margins(y=0.12)
    return drawn


def _bars(ax: Axes, x: np.ndarray, values: np.ndarray, error: np.ndarray, colour: Any, **style: Any) -> Any:
    usual: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.1, "elinewidth": 1, "capsize": 2.5}
    error = np.where(np.isfinite(error), error, np.nan)
    return ax.errorbar(x, values, yerr=error, color=colour, zorder=4, **(usual | style))
