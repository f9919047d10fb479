"""Maps: layers upwards; steps, heads or layers to the right; values as colours, hatched without a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report import canvas

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["cka_map", "draw_heat_map", "edges", "heat_map"]

WRITTEN = 12  # a map of at most so many layers of layers has its numbers written into it


def heat_map(
    values: np.ndarray,  # [layers, columns]
    columns: np.ndarray,  # [columns], increasing: steps or heads
    *,
    title: str,
    unit: str,
    x: str,
    chosen: Sequence[int] = (),
    log: bool = False,
) -> Figure:
    """A figure with a map, see `draw_heat_map`."""
    drawn = canvas.figure(7.0, min(5.2, max(2.2, 1.5 + 0.2 * values.shape[0])))
    draw_heat_map(drawn.add_subplot(), values, edges(columns), title=title, unit=unit, x=x, chosen=chosen, log=log)
    if len(columns) <= canvas.MAX_LABELS and len(set(np.diff(columns))) <= 1:
        drawn.axes[0].set_xticks(columns)
    return drawn


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
    values = np.asarray(values, float)
    rows, columns = values.shape
    side = min(5.4, max(2.2, 1.2 + 0.32 * max(rows, columns)))
    drawn = canvas.figure(side * columns / max(rows, columns) + 1.4, side * rows / max(rows, columns) + 0.6)
    ax = drawn.add_subplot()
    low, high = draw_heat_map(
        ax, values, np.arange(columns + 1) - 0.5, title=title, unit=unit, x=x, y=y, limits=limits, pad=0.03
    )
    ax.set_aspect("equal")
    canvas.layer_axis(ax.xaxis, columns)
    if max(rows, columns) <= WRITTEN:
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
            colour = "white" if values[i, j] < low + 0.6 * (high - low) else canvas.TEXT_COLOUR
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return drawn


def draw_heat_map(
    ax: Axes,
    values: np.ndarray,  # [rows, columns]
    borders: np.ndarray,  # [columns + 1] borders of the columns, increasing
    *,
    title: str = "",
    unit: str = "",
    x: str = "",
    y: str = "layer",
    chosen: Sequence[int] = (),
    log: bool = False,
    limits: tuple[float, float] | None = None,
    colours: str = canvas.MAP,
    pad: float = 0.035,
) -> tuple[float, float]:
    """Draw `values` on an axis, row 0 at the bottom, with a colour bar.

    With `log`, colours are logarithmic, and values at or below zero count as missing. NaN is hatched. `limits` is the
    range of the colours (None: that of the values), which is returned; `colours` is a colour map of
    matplotlib, `pad` the space before the colour bar.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator

    layers = values.shape[0]
    there = np.isfinite(values) & ((values > 0) if log else True)
    shown = np.ma.masked_where(~there, values)
    if limits is None:  # equal values: the colour bar widens their range
        limits = (float(shown.min()), float(shown.max())) if there.any() else (1.0, 10.0) if log else (0.0, 1.0)
    low, high = limits
    canvas.hatch(ax)
    norm = LogNorm(low, high) if log else Normalize(low, high)
    mesh = ax.pcolormesh(borders, np.arange(layers + 1) - 0.5, shown, cmap=colours, norm=norm, zorder=1)
    mesh.set_rasterized(True)
    canvas.style_axes(ax, title, x, y)
    canvas.layer_axis(ax.yaxis, layers)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))

    handles: list[Artist] = []
    if chosen:
        mark: dict[str, Any] = {"marker": "<", "color": canvas.CHOSEN, "linestyle": "none", "markersize": 5}
        ax.plot([1.012] * len(chosen), list(chosen), transform=ax.get_yaxis_transform(), clip_on=False, **mark)
        handles.append(Line2D([], [], label="chosen layer", **mark))
    if not there.all():
        handles.append(Patch(label="no value", **canvas.NO_VALUE))
    canvas.legend(ax, handles)
    if there.any():
        bar = canvas.colour_bar(mesh, ax, unit, pad)
        if log:
            bar.ax.minorticks_off()
            bar.ax.yaxis.set_major_locator(_log_ticks(low, high))
            bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        canvas.no_values(ax)
    return limits


def _log_ticks(low: float, high: float) -> Any:
    """Ticks on round numbers, also in a range of less than a decade without a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if high / low < 10:
        return MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,))


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders halfway between the columns, so that unevenly spaced steps keep their positions."""
    centres = np.asarray(centres, float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])
