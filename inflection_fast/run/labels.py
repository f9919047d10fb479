"""Labels become integers. Nothing is guessed: a label that is not clear is an error that names it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from typing import Any

from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError
from inflection_fast.run.files import Rows

__all__ = ["clean_labels", "label_names", "numbered"]

_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_REAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
UNLABELLED = -1  # in a ClassLabel column: no label


def clean_labels(rows: Rows, config: DataConfig, dropped: Counter[str]) -> Rows:
    """The rows with labels without spaces around them. Rows without a label: UserError, or dropped and counted."""
    declared = rows.names.get("label")
    values = [value.strip() if isinstance(value, str) else value for value in rows.columns["label"]]
    missing = [i for i, value in enumerate(values) if _is_missing(value, declared)]
    rows = Rows(rows.source, {**rows.columns, "label": values}, rows.unit, rows.places, rows.names)
    if not missing:
        return rows
    if not config.drop_missing:
        raise UserError(
            f"{rows.source}: {len(missing)} of {len(rows)} rows have no label in column {config.label!r}"
            f" ({rows.where(missing)}): label them, or write `drop_missing: true` to leave them out"
        )
    dropped["without a label"] += len(missing)
    skipped = set(missing)
    return rows.select([i for i in range(len(rows)) if i not in skipped])


def label_names(rows: Rows, config: DataConfig) -> tuple[str, ...]:
    """The label names that the source declares, or else the sorted values of the column."""
    declared = rows.names.get("label")
    if declared:
        return declared
    column, values = f"{rows.source}: column {config.label!r}", rows.columns["label"]
    others = {type(value).__name__ for value in values if not isinstance(value, (str, int, float))}
    if others:
        raise UserError(f"{column} holds {', '.join(sorted(others))}; labels are names or integers")
    names = sorted({str(value) for value in values})
    if all(_INTEGER.fullmatch(name) for name in names):
        names.sort(key=int)
        if names and int(names[0]) < 0:
            raise UserError(f"{column} holds negative labels, such as {names[0]}{_as_names(names)}")
    elif all(_REAL.fullmatch(name) for name in names) and any(set(".eE") & set(name) for name in names):
        whole = all(float(name).is_integer() for name in names)
        raise UserError(f"{column} holds real numbers; labels are names or integers{_as_names(names) if whole else ''}")
    _refuse_case(column, names)
    if len(names) < 2:
        raise UserError(f"{column} has fewer than two different labels: {names}")
    return tuple(names)


def numbered(rows: Rows, names: tuple[str, ...]) -> list[int]:
    """The labels of the rows as integers: positions in `names`."""
    labels = [str(value) for value in rows.columns["label"]]
    declared = {str(i): name for i, name in enumerate(rows.names.get("label", ()))}
    if set(declared.values()) & set(names):
        labels = [declared.get(value, value) for value in labels]  # the settings may change the order of the names
    numbers = {name: i for i, name in enumerate(names)}
    if not numbers.keys() >= set(labels) and all(map(_INTEGER.fullmatch, labels)):
        # Integers that are no names are positions in the list of names.
        numbers = {str(i): i for i in range(len(names))}
    outside = [i for i, value in enumerate(labels) if value not in numbers]
    if outside:
        some = ", ".join(repr(value) for value, _ in Counter(labels[i] for i in outside).most_common(5))
        raise UserError(
            f"{rows.source}: {len(outside)} rows have labels outside {list(names)}: {some} ({rows.where(outside)};"
            " leave such rows out, or name them in data.labels)"
        )
    return [numbers[value] for value in labels]


def _is_missing(value: Any, declared: tuple[str, ...] | None) -> bool:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return True
    return declared is not None and value == UNLABELLED


def _as_names(names: list[str]) -> str:
    """Advice to write these values as names into the settings."""
    if len(names) > 10:
        return ""
    listed = ", ".join(f'"{name}"' for name in sorted(names, key=float))
    return f": write `labels: [{listed}]` to take them as names"


def _refuse_case(column: str, names: list[str]) -> None:
    """UserError for names that differ only in case or Unicode form, which are spelling mistakes."""
    equal: dict[str, list[str]] = {}
    for name in names:
        equal.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in equal.values() if len(group) > 1]
    if groups:
        raise UserError(
            f"{column} has labels that differ by case only: {'; '.join(groups)}: write them the same way, or name all"
            " labels in data.labels to keep them apart"
        )
