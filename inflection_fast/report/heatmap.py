"""A signal as a map: layers upwards, steps or heads to the right, the value as colour, hatched where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report import canvas

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_heat_map", "edges", "heat_map"]


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
    """A figure of its own with what `draw_heat_map` draws."""
    drawn = canvas.figure(7.0, min(5.2, max(2.2, 1.5 + 0.2 * values.shape[0])))
    draw_heat_map(drawn.add_subplot(), values, edges(columns), title=title, unit=unit, x=x, chosen=chosen, log=log)
    _column_ticks(drawn.axes[0], columns)
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
) -> None:
    """Draws `values` on an axis, row 0 at the bottom, with a bar of colours beside it.

    With `log`, colours follow the logarithm and values at or below zero count as none. NaN is hatched. `limits` are the
    ends of the colours (None: of the values), `colours` the name of a colour map of matplotlib.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator

    layers = values.shape[0]
    there = np.isfinite(values) & ((values > 0) if log else True)
    shown = np.ma.masked_where(~there, values)
    low, high = limits or _limits(values[there], log)
    ax.add_patch(Rectangle((0, 0), 1, 1, transform=ax.transAxes, zorder=0, **canvas.NO_VALUE))
    norm = LogNorm(low, high) if log else Normalize(low, high)
    mesh = ax.pcolormesh(borders, np.arange(layers + 1) - 0.5, shown, cmap=colours, norm=norm, zorder=1)
    mesh.set_rasterized(True)
    canvas.dress(ax, title, x, y)
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
        bar = ax.figure.colorbar(mesh, ax=ax, pad=0.035, fraction=0.05)
        bar.set_label(unit, fontsize=canvas.NORMAL, color=canvas.INK)
        bar.ax.tick_params(labelsize=canvas.SMALL, width=0.6, length=3)
        if log:
            bar.ax.minorticks_off()
            bar.ax.yaxis.set_major_locator(_log_ticks(low, high))
            bar.ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        bar.outline.set_visible(False)
    else:
        ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center", bbox=canvas.PLATE)


def _column_ticks(ax: Axes, columns: np.ndarray) -> None:
    """Every column named while there is room."""
    if len(columns) <= canvas.MAX_LABELS and len(set(np.diff(columns))) <= 1:
        ax.set_xticks(columns)


def _limits(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The range of the colours. That of equal values is empty, and widened by the colour bar."""
    if not values.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    return float(values.min()), float(values.max())


def _log_ticks(low: float, high: float) -> Any:
    """Ticks on round numbers also where the range is less than a decade and holds no power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if high / low < 10:
        return MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,))


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders halfway between the columns, so that steps measured at uneven distances keep their places."""
    centres = np.asarray(centres, float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middles[0]], middles, [2 * centres[-1] - middles[-1]]])
