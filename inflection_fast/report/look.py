"""The page of what was measured without a training: profiles by layer, matrices of layers, and tables.

It is the page of a run with other parts: the same file, look and drawing code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from inflection_fast.atomic import write_text
from inflection_fast.decide import Plan
from inflection_fast.report.answer import Answer
from inflection_fast.report.fragments import answer_block, choice_block, table
from inflection_fast.report.single_page import State, html, plan_entry

__all__ = ["Line", "Look", "Matrix", "Profile", "Table", "look_state", "write_look"]


@dataclass(frozen=True)
class Line:
    """One value by layer, with its standard error where there is one. NaN or None: no value."""

    name: str
    values: Sequence[float | None]
    error: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Profile:
    """A chart by layer. At most four lines."""

    label: str
    unit: str
    lines: Sequence[Line]
    explanation: str = ""
    log: bool = False
    marked: Sequence[int] = ()  # layers that are drawn as found


@dataclass(frozen=True)
class Matrix:
    """A map of layers against layers."""

    label: str
    unit: str
    values: np.ndarray  # [rows, columns], NaN: no value
    rows: str  # what a row is: "layer of A"
    columns: str
    explanation: str = ""
    # Colours run from 0 to 1 whatever the values are, so that two maps compare; None: from the least to the largest.
    unit_interval: bool = True


@dataclass(frozen=True)
class Table:
    """Plain text in rows; `numbers` are the columns set to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    folded: bool = False


@dataclass(frozen=True)
class Look:
    """Everything that such a page shows. All text is plain; the page escapes it."""

    kind: str  # "scan" or "comparison"
    title: str
    where: str
    facts: Sequence[str]
    answer: Answer
    layers: Sequence[str]
    profiles: Sequence[Profile] = ()
    matrices: Sequence[Matrix] = ()
    tables: Sequence[Table] = ()
    settings: Sequence[tuple[str, str]] = ()
    versions: Sequence[tuple[str, str]] = ()
    missing: Sequence[str] = ()
    plan: Plan | None = field(default=None)


def write_look(look: Look, path: Path) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, html(look_state(look)))


def look_state(look: Look) -> State:
    """What the page draws."""
    made = State()
    made.manifest = {
        "version": 1,
        "look": look.kind,
        "title": look.title,
        "layers": list(look.layers),
        "steps": 0,
        "columns": [],
        "alerts": [],
        "plan": plan_entry(look.plan),
        "profiles": [_profile(profile) for profile in look.profiles],
        "matrices": [_matrix(made, matrix) for matrix in look.matrices],
        "fragments": _fragments(look),
    }
    return made


def _profile(profile: Profile) -> dict[str, Any]:
    return {
        "label": profile.label[:1].upper() + profile.label[1:],
        "unit": "" if profile.unit == "1" else profile.unit,
        "explanation": profile.explanation,
        "log": profile.log,
        "marked": list(profile.marked),
        "lines": [
            {"name": line.name, "values": _numbers(line.values)}
            | ({"error": _numbers(line.error)} if line.error is not None else {})
            for line in profile.lines
        ],
    }


def _matrix(made: State, matrix: Matrix) -> dict[str, Any]:
    return {
        "label": matrix.label[:1].upper() + matrix.label[1:],
        "unit": matrix.unit,
        "explanation": matrix.explanation,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "unitInterval": matrix.unit_interval,
        **made.add(np.asarray(matrix.values, float)),
    }


def _numbers(values: Sequence[float | None]) -> list[float | None]:
    return [float(value) if value is not None and np.isfinite(value) else None for value in values]


# ---- words -----------------------------------------------------------------------------------------------------------


def _fragments(look: Look) -> dict[str, str]:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in look.facts)
    tables = "".join(_table(one) for one in look.tables)
    missing = "".join(f"<li>{escape(line)}</li>" for line in look.missing)
    versions = table(("Package", "Version"), [(escape(a), escape(b)) for a, b in look.versions])
    settings = table(("Setting", "Value"), [(escape(a), escape(b)) for a, b in look.settings])
    layers = table(("Layer", "Name"), [(str(i), escape(n)) for i, n in enumerate(look.layers)], numbers=(0,))
    return {
        "heading": f"<p class=folder>{escape(look.where)}</p><h1>{escape(look.title)}</h1><ul class=facts>{facts}</ul>",
        "answer": answer_block(look.answer),
        "alert-list": "",
        "choice-words": choice_block(look.plan),
        "stages-words": tables or "<p>There is no table.</p>",
        "settings-words": settings
        + f"<details><summary>Names of the layers</summary>{layers}</details>"
        + f"<details><summary>Versions</summary>{versions}</details>",
        "missing-words": f"<ul>{missing}</ul>" if missing else "<p>Nothing is missing.</p>",
    }


def _table(one: Table) -> str:
    rows = [[escape(cell) for cell in row] for row in one.rows]
    body = table([escape(name) for name in one.head], rows, numbers=one.numbers)
    if one.folded:
        return f"<details><summary>{escape(one.title)}</summary>{body}</details>"
    return f"<h3>{escape(one.title)}</h3>{body}"
