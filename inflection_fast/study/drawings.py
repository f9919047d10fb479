"""Pictures of a study, drawn from its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inflection_fast.study.analysis import Effect, costs, means, parameters
from inflection_fast.study.results import Result

__all__ = ["draw_blocks", "draw_effects", "draw_pareto"]

LABELS_APART = 0.035  # of the height of the picture
INK, MARK, FAINT = "#222222", "#1f5fa8", "#bbbbbb"


def draw_effects(effects: dict[str, Effect], title: str, path: Path) -> None:
    """Differences with their 95 % intervals, the largest on top; zero is marked."""
    figure, axes = _canvas(6.4, 1.1 + 0.27 * len(effects))
    order = sorted(effects, key=lambda name: effects[name].difference)
    for place, name in enumerate(order):
        effect = effects[name]
        sure = effect.low > 0 or effect.high < 0
        axes.plot([effect.low, effect.high], [place, place], color=MARK if sure else FAINT, lw=2, solid_capstyle="butt")
        axes.plot([effect.difference], [place], "o", ms=4, color=MARK if sure else INK)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("points of accuracy")
    axes.set_title(title, loc="left", fontsize=10)
    _save(figure, path)


def draw_blocks(effects: Sequence[tuple[int, float, float, float]], path: Path) -> None:
    """What a block is worth, block by block."""
    figure, axes = _canvas(5.0, 2.6)
    blocks, values, low, high = (np.array(column) for column in zip(*effects, strict=True))
    axes.errorbar(blocks, values, [values - low, high - values], fmt="o", color=MARK, ms=5, capsize=3)
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(blocks)
    axes.set_xlabel("block")
    axes.set_ylabel("points of accuracy")
    axes.set_title("What LoRA on a block is worth, against the mean block", loc="left", fontsize=10)
    _save(figure, path)


def draw_pareto(cells: Sequence[Result], arms: Sequence[str], path: Path) -> None:
    """Accuracy against parameters, time and memory; the arms that no other beats in both are joined."""
    from matplotlib.ticker import LogLocator, NullFormatter

    accuracy = means(cells)
    spent = {arm: costs(cells, arm) for arm in arms}
    panels: dict[str, dict[str, float]] = {
        "trained parameters outside of the head": {arm: max(1, parameters(cells, arm)[1]) for arm in arms},
        "processor seconds, choosing included": {
            arm: spent[arm]["train_cpu_s"] + spent[arm]["choose_cpu_s"] for arm in arms
        },
        "megabytes that a step keeps": {arm: max(0.01, spent[arm]["step_bytes"] / 1e6) for arm in arms},
    }
    figure, all_axes = _canvas(13.5, 4.6, columns=len(panels))
    for axes, (label, costs_of) in zip(all_axes, panels.items(), strict=True):
        best, front = -np.inf, []
        for arm in sorted(arms, key=lambda arm: (costs_of[arm], -accuracy[arm])):
            if accuracy[arm] > best:
                best = accuracy[arm]
                front.append(arm)
        axes.step([costs_of[a] for a in front], [accuracy[a] for a in front], where="post", color=FAINT, lw=1)
        least, most = min(costs_of.values()), max(costs_of.values())
        axes.set_xscale("log")
        axes.set_xlim(right=most * (most / least) ** 0.45)  # room for labels
        if most < 100 * least:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for arm, height in _apart({arm: accuracy[arm] for arm in arms}, LABELS_APART).items():
            color = MARK if arm in front else INK
            axes.plot(costs_of[arm], accuracy[arm], "o", ms=4, color=color, zorder=4)  # above the labels
            axes.annotate(
                arm,
                (costs_of[arm], accuracy[arm]),
                xytext=(14, height),
                textcoords=("offset points", "data"),
                va="center",
                fontsize=6.5,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": FAINT, "shrinkA": 1, "shrinkB": 2},
            )
        axes.set_xlabel(label, fontsize=8)
    all_axes[0].set_ylabel("accuracy, %")
    _save(figure, path)


def _apart(values: dict[str, float], share: float) -> dict[str, float]:
    """Heights for labels near these values, from the lowest up, at least a share of the range apart."""
    gap = share * max(max(values.values()) - min(values.values()), 1.0)
    heights: dict[str, float] = {}
    last = -np.inf
    for name in sorted(values, key=values.__getitem__):
        last = heights[name] = max(values[name], last + gap)
    return heights


def _canvas(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in np.ravel(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(which="both", labelsize=8)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the version of the program would change every file
    pyplot.close(figure)
