"""Several runs on one page: a table, every quantity overlaid, and maps of the differences.

Runs whose settings differ in the seed (and the output folder) alone form a group. A group of several runs is drawn as
their mean with a 95 % interval (Student's t over the runs).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from inflection_fast.decide.evidence import t_quantile
from inflection_fast.report.answer import Answer
from inflection_fast.report.content import Content, Series
from inflection_fast.report.fragments import answer_block, table
from inflection_fast.report.sections import model_name
from inflection_fast.report.single_page import State, html
from inflection_fast.report.words import MISSING, accuracy, capitalised, count, layer_list, listed, significant

__all__ = ["Group", "groups_of", "interval", "several_state", "write_several"]

DEFAULT_FOLDER = "comparison"
LEVEL = 0.95
_BY_CHANCE = ("seed", "output")  # settings in which the runs of a group may differ


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    name: str
    runs: tuple[Content, ...]

    @property
    def accuracies(self) -> np.ndarray:
        """Accuracy of the injected model of every run; NaN where there is none."""
        found = [run.run.tune.accuracy if run.run.tune is not None else None for run in self.runs]
        return np.array([np.nan if value is None else value for value in found])


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, and half the width of its 95 % interval; NaN with a missing value or one run alone."""
    number = len(values)
    mean = values.mean(0)
    if number < 2:
        return mean, np.full(np.shape(mean), np.nan)
    return mean, t_quantile((1 - LEVEL) / 2, number - 1) * values.std(0, ddof=1) / math.sqrt(number)


def groups_of(runs: Sequence[Content]) -> list[Group]:
    """The runs by their settings, in the order in which they were given. Runs without settings stand alone."""
    found: dict[Any, list[Content]] = {}
    for i, content in enumerate(runs):
        settings = copy.deepcopy(content.run.settings)
        for name in _BY_CHANCE:
            settings.pop(name, None)
        key = json.dumps(settings, sort_keys=True, default=str) if settings else i
        found.setdefault(key, []).append(content)
    names = _names([members[0].folder for members in found.values()])
    return [
        Group(f"{name} and {len(members) - 1} more" if len(members) > 1 else name, tuple(members))
        for name, members in zip(names, found.values(), strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders without the common beginning of their paths."""
    whole = [folder.resolve() for folder in folders]
    base = Path(os.path.commonpath([folder.parent for folder in whole]))
    return [str(folder.relative_to(base)) for folder in whole]


def write_several(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes `index.html` about several runs into `out` (None: the folder `comparison` beside the first run).

    ValueError for a folder that is none, one that is given twice, or runs of different layers.
    """
    paths = [Path(folder) for folder in folders]
    twice = [str(path) for i, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:i]]]
    if twice:
        raise ValueError(f"folder: expected different runs, and {listed(sorted(set(twice)))} is given twice")
    runs = [Content(path) for path in paths]
    for content in runs:
        content.update()
        if content.measured is None:
            raise ValueError(f"{content.folder} is not a run folder: it holds no timeline.")
    target = Path(out) if out is not None else paths[0].resolve().parent / DEFAULT_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    page = target / "index.html"
    page.write_text(html(several_state(runs)), encoding="utf-8")
    return page


def several_state(runs: Sequence[Content]) -> State:
    """What the page of several runs draws."""
    groups = groups_of(runs)
    layers = {len(content.measured.layers) for content in runs if content.measured is not None}
    made = State()
    names = list(dict.fromkeys(name for content in runs for name, s in content.series.items() if len(s.places.steps)))
    columns = [entry for name in names if (entry := _overlay(made, name, groups))]
    for entry in columns:
        if len(layers) == 1:
            entry["differences"] = _differences(made, entry["name"], groups)
    made.manifest = {
        "version": 1,
        "title": f"{len(runs)} runs side by side",
        "several": [group.name for group in groups],
        "layers": [],
        "steps": 0,
        "columns": columns,
        "alerts": [],
        "plan": None,
        "fragments": _fragments(runs, groups, len(layers) == 1),
    }
    return made


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _overlay(made: State, name: str, groups: Sequence[Group]) -> dict[str, Any] | None:
    """A line for every group that has the column: mean over its places, with the interval over its runs."""
    lines, column, steps = [], None, []
    for i, group in enumerate(groups):
        members = _with(group, name)
        if not members:
            continue
        column, common = members[0].column, _common(members)
        if not len(common):
            continue
        values = np.stack([series.places.over_places()[_rows(series, common), 0] for series in members])
        mean, half = interval(values)
        lines.append({"group": i, "runs": len(members), "steps": common.tolist(), **made.add(np.stack([mean, half]))})
        steps += common.tolist()
    if column is None or not lines:
        return None
    return {
        "name": name, "label": capitalised(column.label),
        "unit": "" if column.unit == "1" else column.unit, "explanation": column.explanation,
        "log": column.scale == "log", "lines": lines, "steps": sorted(set(map(tuple, steps))), "length": 1, "axes": [],
    }  # fmt: skip


def _differences(made: State, name: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every other group minus the first, by layer and step, with the interval of the difference."""
    first = _with(groups[0], name)
    if not first or not first[0].places.shape:
        return []
    found = []
    for i, group in enumerate(groups[1:], 1):
        members = _with(group, name)
        common = _common([*first, *members] if members else [])
        if not len(common):
            continue
        (mean, half), (base, base_half) = (interval(_stack(part, common)) for part in (members, first))
        difference, error = mean - base, np.hypot(half, base_half)
        found.append(
            {"group": i, "steps": common.tolist(), "length": max(s.places.length for s in [*first, *members]),
             **made.add(np.moveaxis(np.stack([difference, error]), 1, 2))}  # [2, L, B]
        )  # fmt: skip
    return found


def _with(group: Group, name: str) -> list[Series]:
    series = (content.series.get(name) for content in group.runs)
    return [each for each in series if each is not None and len(each.places.steps)]


def _common(members: Sequence[Series]) -> np.ndarray:
    """[B, 2] the buckets that all of them have: nothing is interpolated."""
    if not members:
        return np.empty((0, 2), np.int64)
    shared = set.intersection(*(set(map(tuple, series.places.steps.tolist())) for series in members))
    return np.array(sorted(shared), np.int64).reshape(-1, 2)


def _rows(series: Series, common: np.ndarray) -> np.ndarray:
    place = {tuple(pair): i for i, pair in enumerate(series.places.steps.tolist())}
    return np.array([place[tuple(pair)] for pair in common.tolist()])


def _stack(members: Sequence[Series], common: np.ndarray) -> np.ndarray:
    return np.stack([series.places.mean[_rows(series, common)] for series in members])  # [runs, B, L]


# ---- words -----------------------------------------------------------------------------------------------------------


def _fragments(runs: Sequence[Content], groups: Sequence[Group], comparable: bool) -> dict[str, str]:
    names = "".join(f"<li>{escape(group.name)}</li>" for group in groups)
    return {
        "heading": f"<h1>{len(runs)} runs side by side</h1><ul class=facts>{names}</ul>",
        "answer": answer_block(_answer(groups)),
        "alert-list": "", "choice-words": "",
        "stages-words": _table(groups),
        "settings-words": _settings(groups),
        "missing-words": "<p>Nothing is missing.</p>" if comparable else
        "<p>The runs have different numbers of layers, so there are no maps of differences.</p>",
    }  # fmt: skip


def _answer(groups: Sequence[Group]) -> Answer:
    known = [group for group in groups if np.isfinite(group.accuracies).all()]
    said = []
    for group in known:
        mean, half = interval(group.accuracies)
        spread = f" ± {100 * half:.1f}" if np.isfinite(half) else ""
        said.append(f"{group.name}: {100 * mean:.1f}{spread} % ({len(group.runs)} run{'s' * (len(group.runs) > 1)})")
    several = [group for group in known if len(group.runs) > 1]
    next_step = "See at which steps the lines separate, and in the maps of differences in which layers."
    if len(several) > 1:
        best, other = sorted(several, key=lambda group: -group.accuracies.mean())[:2]
        (high, wide), (low, narrow) = interval(best.accuracies), interval(other.accuracies)
        gap, error = 100 * (high - low), 100 * math.hypot(wide, narrow)
        more = "more than the seeds move" if gap > error else "no more than the seeds move"
        verdict = f"{best.name} is better than {other.name} by {gap:.1f} ± {error:.1f} points of accuracy, {more}."
    elif len(several) == 1 and len(groups) == 1:
        verdict = f"The runs differ in the seed alone, and the accuracy is {said[0].split(': ', 1)[1]}."
    else:
        verdict = "These runs cannot tell a difference from chance: that takes several seeds of each."
        next_step = "Repeat each with other seeds (--seed), and give all of them to this command."
    why = f"Accuracy of the injected model with a 95 % interval over seeds: {'; '.join(said)}." if said else (
        "No run has an injected model, so only what was measured is compared."
    )  # fmt: skip
    return Answer(verdict, why, next_step)


def _table(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        for content in group.runs:
            run, tune, measured = content.run, content.run.tune, content.measured
            loss = content.series.get("loss")
            last = loss.places.mean[-1] if loss is not None and len(loss.places.steps) else np.nan
            rows.append(
                (escape(str(content.folder)), escape(model_name(run)), MISSING if run.seed is None else str(run.seed),
                 count(0 if measured is None else len(measured.steps)), significant(float(last), 4),
                 count(content.alerts_in_all),
                 escape(layer_list(run.plan.layers)) if run.plan is not None else "no plan",
                 escape(accuracy(tune.accuracy, tune.standard_error)) if tune is not None else "",
                 count(tune.trainable_parameters) if tune is not None else "")
            )  # fmt: skip
    head = ("Run", "Model", "Seed", "Measured steps", "Last loss", "Alerts", "Chosen", "Accuracy", "Trained parameters")
    return table(head, rows, numbers=(2, 3, 4, 5, 7, 8))


def _settings(groups: Sequence[Group]) -> str:
    """The settings in which the groups differ."""
    flat = [_flat(group.runs[0].run.settings) for group in groups]
    names = sorted({name for settings in flat for name in settings} - set(_BY_CHANCE))
    rows = [
        (f"<code>{escape(name)}</code>", *(escape(str(settings.get(name, ""))) for settings in flat))
        for name in names
        if len({str(settings.get(name)) for settings in flat}) > 1
    ]
    if not rows:
        return "<p>No setting is known to differ but the seed.</p>"
    return table(("Setting", *(escape(group.name) for group in groups)), rows)


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
