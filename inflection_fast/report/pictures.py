"""The pictures of a report, with captions that say how to read them, and the reasons for missing ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inflection_fast.report import canvas
from inflection_fast.report.charts import drift_chart, index_chart, profile_chart, stage_chart
from inflection_fast.report.content import PAIRS
from inflection_fast.report.folder import Run
from inflection_fast.report.heatmap import cka_map, heat_map
from inflection_fast.report.profile import by_name, components, found, last_part, log_gradient
from inflection_fast.report.words import capitalised
from inflection_fast.timeline import Column, Timeline
from inflection_fast.timeline.means import finite_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "Picture", "Pictures", "charts", "draw", "drawn_columns", "file_of", "safe_name"]


@dataclass(frozen=True)
class Picture:
    """One file of a report, and what the page says beside it."""

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Everything that was drawn, by what it is about, and what could not be drawn, with the reason."""

    drawn: dict[str, Picture]
    missing: dict[str, str]


FOUND = ("entropy minimum", "gradient cliff")  # by row of the profile
FILES = {
    "stages": "stages.png",
    "profile": "profile.png",
    "ski": "ski.png",
    "heads": "entropy_by_head.png",
    "drift": "drift_by_layer.png",
}
# Measured at every measured step: a step without a value is a hole.
STANDARD_QUANTITIES = ("attention", "activation_grad", "parameter_grad", "delta_cka")


def drawn_columns(timeline: Timeline) -> dict[str, Column]:
    """The columns of a timeline that have a map: those by layer that their quantity wants drawn, but errors."""
    return {
        name: column
        for name, column in timeline.columns.items()
        if column.axes[:1] == ("layer",) and column.drawn != "none" and not name.endswith("_se")
    }


def file_of(key: str) -> str:
    """Name of the picture with this key; a column's is that of the column."""
    return FILES.get(key, f"{safe_name(key)}.png")


def safe_name(name: str) -> str:
    """A name with "_" for all characters that are no letters, digits, "-" or "_"."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)


def draw(run: Run, folder: Path) -> Pictures:
    """Draws every picture that the run has numbers for into `folder`."""
    drawn = {}

    def add(key: str, title: str, caption: str, figure: Figure) -> None:
        canvas.save(figure, folder / file_of(key))
        drawn[key] = Picture(file_of(key), title, caption)

    return Pictures(drawn, charts(run, add))


def charts(run: Run, add: Callable[[str, str, str, Figure], None]) -> dict[str, str]:
    """Hands every chart to `add`, with its key for `file_of`, title and caption; what is missing, with the reason."""
    missing: dict[str, str] = {}
    _stages(run, add)
    _choice(run, add, missing)
    _measured(run, add, missing)
    return missing


def _stages(run: Run, add: Callable[..., None]) -> None:
    order = run.in_order
    if not order:
        return
    language = all(stage.accuracy is None for stage in order)
    caption = (
        "Points are losses on held-out text, lower is better; they come without a standard error, so small differences "
        "say nothing. On the right, how many parameters each stage trained."
        if language
        else "Points are accuracies on held-out examples, bars one binomial standard error to each side (hidden where "
        "shorter than the point), grey marks what always giving the most frequent answer would score. Bars that "
        "overlap widely mean that the difference may be chance. On the right, how many parameters each stage trained."
    )
    if run.source is not None:
        caption += " The hollow point is another task, and not to be compared with the others."
    add("stages", f"{'Loss' if language else 'Accuracy'} and trainable parameters", caption, stage_chart(order, "tune"))


def _choice(run: Run, add: Callable[..., None], missing: dict[str, str]) -> None:
    if run.plan is None:
        for title in ("Profile", "SKI by layer"):
            missing[title] = "there is no plan.json: no layers have been chosen yet"
        return
    plan = run.plan
    rows = [
        ("attention entropy, nats", by_name(plan, "entropy"), by_name(plan, "entropy_se")),
        ("gradient norm, natural log", log_gradient(plan), by_name(plan, "log_activation_grad_se")),
    ]
    rings = [(layer, name) if (layer := found(plan, name)) is not None else None for name in FOUND]
    caption = (
        "The numbers that the choice was made from, averaged over the measured steps: attention entropy above, "
        "logarithm of the activation gradient norm below. "
    )
    if any(np.isfinite(errors).any() for _, _, errors in rows):
        caption += (
            "Bars are one standard error (of a layer's distance from the median of the others) to each side; a dip or "
            "a step that is not several bars deep may be chance."
        )
    else:
        caption += "There are no error bars, because the measured steps are too few to tell what is noise."
    if any(rings):
        caption += " Rings mark what was found; filled points without a ring were taken because they lie next to one."
    add("profile", "Profile", caption, profile_chart(rows, rings, plan.layers))
    if not np.isfinite(np.asarray(plan.scores, float)).any():
        missing["SKI by layer"] = "no layer has a score, because no layer has the signals that it is made from"
        return
    caption = (
        "SKI is the weighted mean of the two components below it: it is high where entropy and gradient are both low, "
        "where adapters are expected to pay (arXiv 2511.00797). Compare within this picture only: both components are "
        "scaled to the layers of this model."
    )
    add("ski", "SKI by layer", caption, index_chart(np.asarray(plan.scores, float), components(plan), plan.layers))


def _measured(run: Run, add: Callable[..., None], missing: dict[str, str]) -> None:
    timeline = run.timeline
    chosen = run.plan.layers if run.plan is not None and run.fits else ()
    if timeline is None or not len(timeline.steps):
        why = "there is no timeline" if timeline is None else "the timeline holds no measured step"
        missing["Maps by layer"] = f"{why}: nothing has been measured yet"
        return
    for name, column in drawn_columns(timeline).items():
        title = capitalised(column.label)
        if column.axes == PAIRS:
            _pairs(timeline, name, title, column, add)
            continue
        steps, values = by_layer(timeline, name)
        if not np.isfinite(values).any():
            if reason := _why_missing(timeline, column):
                missing[title] = reason
            continue
        over = f"mean over {' and '.join(f'{axis}s' for axis in column.axes[1:])}" if column.axes[1:] else ""
        figure = heat_map(
            values.T,
            steps,
            title=title,
            unit=", ".join(filter(None, ("" if column.unit == "1" else column.unit, over))),
            x="optimizer step",
            chosen=chosen,
            log=column.scale == "log" and bool((values[np.isfinite(values)] > 0).any()),
        )
        add(name, title, column.explanation, figure)
    _drift(timeline, chosen, add)
    part = last_part(len(timeline.steps))
    values = finite_mean(timeline.entropy[part])  # [L, H]
    if not np.isfinite(values).any():
        return  # the map of the entropy is missing too, and says why
    figure = heat_map(
        values, np.arange(values.shape[1]), title="Attention entropy by head", unit="nats", x="head", chosen=chosen
    )
    caption = (
        f"Every head of every layer, {_period(timeline.steps[part])}. A layer of evenly dark heads is focused as a "
        "whole; a few dark heads among bright ones are specialists, about which the mean of the layer says little. The "
        "numbering of heads carries no meaning, so columns are not to be compared across layers."
    )
    add("heads", "Entropy by head", caption, figure)


def _drift(timeline: Timeline, chosen: Sequence[int], add: Callable[..., None]) -> None:
    if not np.isfinite(timeline.delta_cka_se).any():
        return  # without errors the map says it all
    caption = (
        "The drift of the map above with bars of one standard error to each side, which comes from leaving out each "
        "probe text in turn: differences within the bars may come from the choice of texts. Above, all layers at the "
        "last snapshot; below, some of them from the first (dark) to the last (bright), points moved sideways a little "
        "so that bars stay apart."
    )
    figure = drift_chart(timeline.steps, timeline.delta_cka, timeline.delta_cka_se, chosen)
    add("drift", "Representation drift with standard errors", caption, figure)


def _period(steps: np.ndarray) -> str:
    if len(steps) == 1:
        return f"at step {steps[0]}"
    return f"mean over the last {len(steps)} measured steps ({steps[0]} to {steps[-1]})"


def _pairs(timeline: Timeline, name: str, title: str, column: Column, add: Callable[..., None]) -> None:
    """A matrix of layers as it was last measured."""
    values = np.asarray(getattr(timeline, name), float)
    there = np.flatnonzero(np.isfinite(values).any((1, 2)))
    if len(there):
        step = timeline.steps[there[-1]]
        figure = matrix_of(name, column, values[there[-1]], f"{title} at step {step}")
        add(name, title, f"{column.explanation} At step {step}.", figure)


def matrix_of(name: str, column: Column, values: np.ndarray, title: str) -> Figure:
    """The map of a column of pairs of layers; colours of CKA run from 0 to 1."""
    limits = (0.0, 1.0) if "delta" not in name else None
    return cka_map(values, title=title, x="other layer", unit=column.unit, limits=limits)


def layer_means(timeline: Timeline, name: str) -> np.ndarray:
    """[S, L]: a column by layer, mean over its other axes where there is a value."""
    values = np.asarray(getattr(timeline, name), float)
    return finite_mean(values, tuple(range(2, values.ndim)))


def by_layer(timeline: Timeline, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and values [S, L] of a column, mean over its other axes where there is a value.

    Steps at which it was not to be measured are left out: what is measured now and then has no holes between.
    """
    values, steps = layer_means(timeline, name), timeline.steps
    config = timeline.meta.get("config") or {}
    every = config.get("probe_every") if name.startswith("delta_cka") else None
    there = np.isfinite(values).any(axis=1)
    # By the probe's share of the training time, or by a cadence of the quantity's own, nobody knows what was planned.
    seldom = name.startswith("delta_cka") and "probe_every" in timeline.columns
    seldom |= timeline.columns[name].quantity not in STANDARD_QUANTITIES
    if (every or seldom) and there.any():
        planned = there | (steps % every == 0 if every else False)
        steps, values = steps[planned], values[planned]
    return steps, values


def _why_missing(timeline: Timeline, column: Column) -> str | None:
    """Why a column has no value; None where nobody asked for it."""
    config = timeline.meta.get("config") or {}
    asked = config.get("quantities", config.get("signals"))
    if asked is not None and column.quantity not in asked:
        return None
    return {
        "delta_cka": "no value was measured: it needs a fixed set of probe texts",
        "parameter_grad": "no value was measured: no parameter of any layer was trainable",
    }.get(column.quantity, "no finite value was measured")
