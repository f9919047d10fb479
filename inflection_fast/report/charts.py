"""Charts by layer and by stage: the profile of the choice, SKI, the drift of layers, and the results of stages."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report import canvas
from inflection_fast.report.folder import Stage
from inflection_fast.report.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["drift_chart", "index_chart", "profile_chart", "stage_chart"]

WIDTH = 7.0


def index_chart(scores: np.ndarray, components: dict[str, np.ndarray], chosen: Sequence[int]) -> Figure:
    """SKI by layer with the chosen layers marked, and below it the components it is the weighted mean of."""
    from matplotlib.lines import Line2D

    drawn = canvas.figure(WIDTH, 4.6)
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    canvas.style_axes(above, "SKI by layer", "", "SKI")
    handles = _line(above, scores, canvas.TEXT_COLOUR, "SKI", "o")
    handles += _marks(above, scores, chosen)
    handles += _gaps(above, scores)
    canvas.legend(above, handles[1:])

    canvas.style_axes(below, "", "layer", "component")
    shown: list[Line2D] = []
    for (name, values), colour, marker in zip(components.items(), (canvas.BLUE, canvas.ORANGE), "s^", strict=True):
        label = name if np.isfinite(values).any() else f"{name} (no values)"
        shown += _line(below, values, colour, label, marker)
    canvas.legend(below, shown)
    _room(above, scores)
    _room(below, np.concatenate(list(components.values())))
    _layers(below, len(scores))
    return drawn


def profile_chart(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray | None]],  # axis label, value by layer, its standard error
    found: Sequence[tuple[int, str] | None],  # by row: the layer that the rule found there, and its name
    chosen: Sequence[int],
) -> Figure:
    """The profile of the choice with standard errors, the extreme in each quantity, and the chosen layers."""
    drawn = canvas.figure(WIDTH, 2.5 * len(rows))
    axes = drawn.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (label, values, error), extreme in zip(axes, rows, found, strict=True):
        title = "Profile that the choice was made from" if ax is axes[0] else ""
        canvas.style_axes(ax, title, "layer" if ax is axes[-1] else "", label)
        _line(ax, values, canvas.TEXT_COLOUR, "", "o", error)
        handles = _marks(ax, values, chosen, labels=False)[: 1 if ax is axes[0] else 0]
        if extreme is not None and np.isfinite(values[extreme[0]]):
            handles += _ring(ax, extreme[0], values[extreme[0]], extreme[1])
        canvas.legend(ax, handles + _gaps(ax, values))
        _room(ax, values, unit_interval=False)
    _layers(axes[-1], len(rows[0][1]))
    return drawn


def stage_chart(stages: Sequence[Stage], highlighted: str) -> Figure:
    """Accuracy with standard error (or the loss) and the number of trained parameters of every stage."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

    language = all(stage.accuracy is None for stage in stages) and any(stage.loss is not None for stage in stages)
    drawn = canvas.figure(WIDTH, 1.3 + 0.38 * len(stages))
    left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    if language:
        canvas.style_axes(left, "Loss by stage", "loss on held-out text, nats per token")
    else:
        canvas.style_axes(left, "Accuracy by stage", "accuracy on held-out examples, %")
    canvas.style_axes(right, "Trainable parameters", "parameters (log scale)")
    for row, stage in enumerate(stages):
        colour = canvas.CHOSEN if stage.stage == highlighted else canvas.BLUE
        point: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "none"}
        point["markerfacecolor"] = "white" if stage.stage == "source" else colour
        value, error = (stage.loss, None) if language else (stage.accuracy, stage.standard_error)
        scale = 1 if language else 100
        if value is None:
            left.text(0.05, row, "not recorded", transform=left.get_yaxis_transform(), **_note())
        else:
            left.errorbar(scale * value, row, xerr=scale * (error or 0), capsize=3, elinewidth=1.2, **point)
        if stage.majority is not None and not language:
            left.plot(100 * stage.majority, row, color=canvas.GREY, marker="|", markersize=13, markeredgewidth=1.8)
        trainable = stage.trainable_parameters
        if trainable:
            right.plot(trainable, row, **point)
            right.annotate(count(trainable), (trainable, row), (7, 0), va="center", **_plain(canvas.TEXT_COLOUR))
        else:
            right.text(0.05, row, count(trainable), transform=right.get_yaxis_transform(), **_note())
    sizes = [stage.trainable_parameters for stage in stages if stage.trainable_parameters]
    if sizes:
        # room on the right for the number beside the last point
        right.set_xscale("log")
        right.set_xlim(10 ** np.floor(np.log10(min(sizes)) - 0.2), 10 ** (np.log10(max(sizes)) + 2.1))
        right.xaxis.set_minor_formatter(NullFormatter())
    left.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    left.set_ylim(len(stages) - 0.4, -0.6)
    left.yaxis.set_major_locator(FixedLocator(range(len(stages))))
    labels = ["\n".join(textwrap.wrap(stage.label, 26, max_lines=2, placeholder=" ...")) for stage in stages]
    left.set_yticklabels(labels, fontsize=canvas.NORMAL)
    left.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    left.set_axisbelow(True)
    left.margins(x=0.08)
    if not language and any(stage.majority is not None for stage in stages):
        mark: dict[str, Any] = {"marker": "|", "markersize": 9, "markeredgewidth": 1.8, "linestyle": "none"}
        canvas.legend(left, [_handle(label="most frequent answer", color=canvas.GREY, **mark)])
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


def _line(
    ax: Axes, values: np.ndarray, colour: str, label: str, marker: str, error: np.ndarray | None = None
) -> list[Any]:
    size = 4 if len(values) <= 64 else 0  # more points than that are a line
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size, "linewidth": 1.2}
    ax.plot(np.arange(len(values)), values, zorder=2, **style)
    if error is not None:
        bars: dict[str, Any] = {"elinewidth": 1, "capsize": 4 if size else 0, "fmt": "none", "ecolor": colour}
        ax.errorbar(np.arange(len(values)), values, yerr=np.where(np.isfinite(error), error, np.nan), zorder=4, **bars)
    return [_handle(label=label, **(style | {"markersize": 4}))]


def _room(ax: Axes, values: np.ndarray, unit_interval: bool = True) -> None:
    """Margins above and below; a fixed scale for values in [0, 1]; no scale without values."""
    if not np.isfinite(values).any():
        ax.set_yticks([])
        canvas.no_values(ax)
    elif unit_interval and np.nanmin(values) >= 0 and np.nanmax(values) <= 1:
        ax.set_ylim(-0.06, 1.14)
    else:
        ax.margins(y=0.15)


def _marks(ax: Axes, values: np.ndarray, chosen: Sequence[int], labels: bool = True) -> list[Any]:
    """The chosen layers as points on the line, numbered if there is room; those without a value at the bottom."""
    if not chosen:
        return []
    size = 7 if len(values) <= 64 else 4
    style: dict[str, Any] = {"color": canvas.CHOSEN, "marker": "o", "linestyle": "none", "markersize": size}
    having = [layer for layer in chosen if np.isfinite(values[layer])]
    ax.plot(having, values[having], zorder=3, **style)
    if labels and len(having) <= canvas.MAX_LABELS:
        for layer in having:
            ax.annotate(str(layer), (layer, values[layer]), (0, 6), ha="center", va="bottom", **_plain(canvas.CHOSEN))
    for layer in set(chosen) - set(having):
        ax.plot(layer, 0.04, transform=ax.get_xaxis_transform(), zorder=3, **style)
    return [_handle(label="chosen layer", **(style | {"markersize": 6}))]


def _ring(ax: Axes, layer: int, value: float, name: str) -> list[Any]:
    style: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgewidth": 1.2, "linestyle": "none"}
    style["markeredgecolor"] = canvas.TEXT_COLOUR
    ax.plot(layer, value, markersize=12, zorder=4, **style)
    return [_handle(label=name, markersize=8, **style)]


def _gaps(ax: Axes, values: np.ndarray) -> list[Any]:
    """Layers without a value as hatched bands."""
    from matplotlib.patches import Patch

    missing = np.flatnonzero(~np.isfinite(values))
    for run in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1) if len(missing) else ():
        ax.axvspan(run[0] - 0.5, run[-1] + 0.5, zorder=0, **canvas.NO_VALUE)
    return [Patch(label="no value", **canvas.NO_VALUE)] if len(missing) else []


def _layers(ax: Axes, layers: int) -> None:
    canvas.layer_axis(ax.xaxis, layers)
    ax.set_xlim(-0.5, layers - 0.5)


def _handle(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def _plain(colour: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "fontsize": canvas.SMALL, "color": colour}


def _note() -> dict[str, Any]:
    return {"va": "center", "fontsize": canvas.SMALL, "color": canvas.GREY, "style": "italic", "bbox": canvas.TEXT_BOX}


def _bars(ax: Axes, x: np.ndarray, values: np.ndarray, error: np.ndarray, colour: Any, **style: Any) -> Any:
    usual: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.1, "elinewidth": 1, "capsize": 2.5}
    error = np.where(np.isfinite(error), error, np.nan)
    return ax.errorbar(x, values, yerr=error, color=colour, zorder=4, **(usual | style))
