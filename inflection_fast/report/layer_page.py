"""The page of a scan or a comparison: profiles by layer, matrices of layers, and tables.

It uses the file, the style and the drawing code of the page of a run.
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
from inflection_fast.report.single_page import State, html, json_numbers, matrix_entry, plan_entry
from inflection_fast.report.words import capitalised

__all__ = ["LayerPage", "Line", "Matrix", "Profile", "Table", "layer_page_state", "write_layer_page"]


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
    marked: Sequence[int] = ()  # layers of findings


@dataclass(frozen=True)
class Matrix:
    """A map of layers against layers."""

    label: str
    unit: str
    values: np.ndarray  # [rows, columns], NaN: no value
    rows: str  # what a row is: "layer of A"
    columns: str
    explanation: str = ""
    # Colours go from 0 to 1, so that two maps can be compared; False: from the smallest to the largest value.
    unit_interval: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of plain text; the columns `numbers` are right-aligned."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    folded: bool = False


@dataclass(frozen=True)
class LayerPage:
    """The contents of a page. All text is plain; the page escapes it."""

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


def write_layer_page(page: LayerPage, path: Path) -> None:
    """Write the page, atomically."""
    write_text(path, html(layer_page_state(page)))


def layer_page_state(page: LayerPage) -> State:
    """The manifest and arrays of the page."""
    made = State()
    made.manifest = {
        "version": 1,
        "look": page.kind,
        "title": page.title,
        "layers": list(page.layers),
        "steps": 0,
        "columns": [],
        "alerts": [],
        "plan": plan_entry(page.plan),
        "profiles": [_profile(profile) for profile in page.profiles],
        "matrices": [matrix_entry(made, **vars(matrix)) for matrix in page.matrices],
        "fragments": _fragments(page),
    }
    return made


def _profile(profile: Profile) -> dict[str, Any]:
    return {
        "label": capitalised(profile.label),
        "unit": "" if profile.unit == "1" else profile.unit,
        "explanation": profile.explanation,
        "log": profile.log,
        "marked": list(profile.marked),
        "lines": [
            {"name": line.name, "values": json_numbers(line.values)}
            | ({"error": json_numbers(line.error)} if line.error is not None else {})
            for line in profile.lines
        ],
    }


# ---- words -----------------------------------------------------------------------------------------------------------


def _fragments(page: LayerPage) -> dict[str, str]:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in page.facts)
    tables = "".join(_table(one) for one in page.tables)
    missing = "".join(f"<li>{escape(line)}</li>" for line in page.missing)
    versions = table(("Package", "Version"), [(escape(a), escape(b)) for a, b in page.versions])
    settings = table(("Setting", "Value"), [(escape(a), escape(b)) for a, b in page.settings])
    layers = table(("Layer", "Name"), [(str(i), escape(n)) for i, n in enumerate(page.layers)], numbers=(0,))
    return {
        "heading": f"<p class=folder>{escape(page.where)}</p><h1>{escape(page.title)}</h1><ul class=facts>{facts}</ul>",
        "answer": answer_block(page.answer),
        "alert-list": "",
        "choice-words": choice_block(page.plan),
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
