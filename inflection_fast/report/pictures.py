"""Which pictures a report has, what each shows and how to read it, and why one is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.report import canvas
from inflection_fast.report.charts import index_chart, profile_chart, stage_chart
from inflection_fast.report.folder import Run
from inflection_fast.report.heatmap import heat_map
from inflection_fast.report.profile import by_name, components, found, last_part, log_gradient
from inflection_fast.report.similarity import drift_chart
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FILES", "SIGNALS", "Picture", "Pictures", "Signal", "charts", "draw", "over_finite"]


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


@dataclass(frozen=True)
class Signal:
    """A measured quantity as a map of layers and steps."""

    title: str
    unit: str
    caption: str
    group: str  # the quantity in MonitorConfig.quantities that switches it on
    over_heads: Callable[..., np.ndarray] | None = None
    log: bool = False


SIGNALS = {
    "entropy": Signal(
        "Attention entropy",
        "nats, mean over heads",
        "How widely a layer's attention is spread: near 0 every token looks at a single other one (dark), high values "
        "look everywhere (bright). A dark row is a layer that has settled on what to look at. A dark column is a "
        "batch of short texts: the value is at most the logarithm of the number of tokens.",
        "attention",
        np.mean,
    ),
    "max_logit": Signal(
        "Largest attention logit",
        "logit, maximum over heads",
        "The largest score before the softmax. Rows that keep growing brighter are attention that is about to collapse "
        "onto single tokens, often followed by unstable training.",
        "attention",
        np.max,
    ),
    "collision": Signal(
        "Attention collision",
        "sum of squared probabilities, mean over heads",
        "The chance that two draws from a token's attention hit the same token: 1 is attention on a single token. "
        "Unlike entropy it follows the largest probabilities and ignores the long tail.",
        "attention",
        np.mean,
    ),
    "sink": Signal(
        "Attention on the first token",
        "probability, mean over heads",
        "The share of attention that goes to the first token, where many models park attention that they do not need. "
        "Bright rows have low entropy without looking at anything in particular.",
        "attention",
        np.mean,
    ),
    "activation_grad": Signal(
        "Activation gradient norm",
        "l2 norm, log scale",
        "How strongly the loss pulls on the output of each layer. Only the shape across layers matters, since all rows "
        "scale with the loss; where the colour changes abruptly from one row to the next is the gradient cliff.",
        "activation_grad",
        log=True,
    ),
    "parameter_grad": Signal(
        "Parameter gradient norm",
        "l2 norm, log scale",
        "The gradient of each layer's own parameters, before clipping. Frozen layers have none and are hatched.",
        "parameter_grad",
        log=True,
    ),
    "delta_cka": Signal(
        "Representation drift (1 - CKA)",
        "1 - CKA",
        "How far the layer's representation of a fixed set of texts has moved from where the training started: 0 is "
        "unchanged up to rotation and scale. The debiased estimate may fall slightly below 0.",
        "delta_cka",
    ),
}
FOUND = ("entropy minimum", "gradient cliff")  # by row of the profile
FILES = {
    "stages": "stages.png",
    "profile": "profile.png",
    "ski": "ski.png",
    "heads": "entropy_by_head.png",
    "drift": "drift_by_layer.png",
} | {name: f"{name}.png" for name in SIGNALS}


def draw(run: Run, folder: Path) -> Pictures:
    """Draws every picture that the run has numbers for into `folder`."""
    drawn = {}

    def add(key: str, title: str, caption: str, figure: Figure) -> None:
        canvas.save(figure, folder / FILES[key])
        drawn[key] = Picture(FILES[key], title, caption)

    return Pictures(drawn, charts(run, add))


def charts(run: Run, add: Callable[[str, str, str, Figure], None]) -> dict[str, str]:
    """Hands every chart to `add`, with its key in `FILES`, title and caption; what is missing, with the reason."""
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
    timeline, chosen = run.timeline, ()
    if run.fits:
        chosen = run.plan.layers
    if timeline is None or not len(timeline.steps):
        why = "there is no timeline" if timeline is None else "the timeline holds no measured step"
        for signal in SIGNALS.values():
            missing[signal.title] = f"{why}: nothing has been measured yet"
        return
    for name, signal in SIGNALS.items():
        steps, values = by_layer(timeline, name)
        if not np.isfinite(values).any():
            missing[signal.title] = _why_missing(timeline, name)
            continue
        figure = heat_map(
            values.T, steps, title=signal.title, unit=signal.unit, x="optimizer step", chosen=chosen, log=signal.log
        )
        add(name, signal.title, signal.caption, figure)
    _drift(timeline, chosen, add)
    part = last_part(len(timeline.steps))
    values = over_finite(np.mean, timeline.entropy[part], axis=0)  # [L, H]
    if not np.isfinite(values).any():
        missing["Entropy by head"] = _why_missing(timeline, "entropy")
        return
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


def by_layer(timeline: Timeline, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and values [S, L] of a signal, reduced over the heads that have a value."""
    signal, values, steps = SIGNALS[name], getattr(timeline, name), timeline.steps
    if signal.over_heads is not None:
        values = over_finite(signal.over_heads, values, axis=-1)
    every = (timeline.meta.get("config") or {}).get("probe_every") if name == "delta_cka" else None
    spread = name == "delta_cka" and "probe_every" in timeline.columns  # by the probe's share of the training time
    if (every or spread) and np.isfinite(values).any():
        # measured on purpose at these steps only: the columns between are not missing
        planned = np.isfinite(values).any(axis=1) | (steps % every == 0 if every else False)
        steps, values = steps[planned], values[planned]
    return steps, values


def over_finite(reduce: Callable[..., Any], values: np.ndarray, axis: int) -> np.ndarray:
    """Reduces over the finite values of an axis; NaN where there is none."""
    there = np.isfinite(values)
    empty = ~there.any(axis=axis)
    fill = np.where(np.expand_dims(empty, axis), 0.0, values)
    initial = {"initial": -np.inf} if reduce is np.max else {}
    reduced = reduce(fill, axis=axis, where=there | np.expand_dims(empty, axis), **initial)
    return np.where(empty, np.nan, reduced)


def _why_missing(timeline: Timeline, name: str) -> str:
    signal = SIGNALS[name]
    config = timeline.meta.get("config") or {}
    asked = config.get("quantities", config.get("signals"))
    if asked is not None and signal.group not in asked:
        return f"it was not asked for (`{signal.group}` is not among the monitor's quantities)"
    return {
        "delta_cka": "no value was measured: it needs a fixed set of probe texts",
        "parameter_grad": "no value was measured: no parameter of any layer was trainable",
    }.get(name, "no finite value was measured")
