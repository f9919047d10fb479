"""A comparison as text, in the terminal and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from inflection_fast.checkpoints.comparison import Comparison, Drift
from inflection_fast.checkpoints.numbers import in_words, print_grid
from inflection_fast.decide.evidence import t_quantile
from inflection_fast.report.answer import Answer
from inflection_fast.report.layer_page import LayerPage, Line, Matrix, Profile, Table
from inflection_fast.report.words import count, setting, significant

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["comparison_answer", "comparison_page", "moved_layers", "show_comparison"]

LEVEL = 0.05  # chance of a false result over all layers of a quantity
LONG = 48  # with more layers the terminal lists those that have moved most
LEAST = 1e-9  # smaller values are rounding errors
DECIMALS = 5
NAMED = 3  # quantities and modules in a sentence


def moved_layers(drift: Drift, batches: int) -> list[int]:
    """Layers with a significant difference: two-sided Student's t over the batches, at 5 % over all layers."""
    if batches < 2 or not drift.difference:
        return []
    limit = t_quantile(LEVEL / (2 * len(drift.difference)), batches - 1)
    pairs = enumerate(zip(drift.difference, drift.error, strict=True))
    return [layer for layer, (d, e) in pairs if d is not None and e is not None and abs(d) > limit * e]


def comparison_answer(found: Comparison) -> Answer:
    """The first three lines."""
    batches = int(str(found.settings.get("batches", 0)))
    moved = {one.label: len(moved_layers(one, batches)) for one in found.drift.values()}
    signals = sorted((label for label in moved if moved[label]), key=lambda label: -moved[label])
    delta = _array(found.delta)
    weights = sorted(found.weights.items(), key=lambda one: -one[1])
    if np.isfinite(delta).any():
        layer = int(np.nanargmax(delta))
        verdict = f"Layer {layer} has changed most: delta-CKA {_with_error(delta[layer], found.delta_error[layer])}."
    elif found.matrix:
        best = [j for j in found.nearest if j is not None]
        verdict = f"The models have {len(found.layers[0])} and {len(found.layers[1])} layers; " + (
            f"the nearest layers of B are {min(best)} to {max(best)}." if best else "no two layers have the same rows."
        )  # fmt: skip
    else:
        verdict = "Only weights were compared."
    if weights and weights[0][1] == 0:
        verdict += " The weights of all blocks are equal."
    elif weights:
        verdict += f" The weights of {weights[0][0]} have changed most, by {_percent(weights[0][1])} of their norm."
    why = []
    if signals:
        more = f" and {len(signals) - NAMED} more" if len(signals) > NAMED else ""
        why.append(f"Significant differences over the batches: {', '.join(signals[:NAMED])}{more}.")
    elif found.drift:
        why.append("No measured quantity differs significantly over the batches.")
    why.append(_basis(found))
    return Answer(verdict, " ".join(why), "Look at the layers that stand out below, or measure them while they train.")


def _basis(found: Comparison) -> str:
    progress = found.settings
    if not progress.get("sequences"):
        return "No text was given to the models."
    space = "in the full space" if progress.get("rank") is None else f"in a shared basis of rank {progress['rank']}"
    kind = "debiased" if progress.get("debiased") else "biased"
    rows, texts = count(_int(progress, "rows")), count(_int(progress, "sequences"))
    return f"{kind.capitalize()} CKA {space} of {rows} rows of {texts} texts."


def comparison_page(found: Comparison, names: tuple[str, str], where: str, source: str) -> LayerPage:
    """The page."""
    batches = _int(found.settings, "batches")
    profiles = []
    if found.delta:
        furthest = [int(np.nanargmax(_array(found.delta)))] if np.isfinite(_array(found.delta)).any() else []
        profiles += [
            Profile("delta-CKA, linear form", "1 - CKA", [Line("delta-CKA", found.delta, found.delta_error)],
                    "1 - CKA of the same layer in both models; errors leave out each text in turn.", marked=furthest),
            Profile("delta-CKA, angular form", "rad", [Line("angle", found.angle, found.angle_error)],
                    "arccos CKA of the same layer in both models, which is a distance.", marked=furthest),
        ]  # fmt: skip
    for one in found.drift.values():
        if one.difference:
            lines, label, log = [Line("B - A", one.difference, one.error)], f"{one.label}, B - A", False
        else:
            lines, label, log = [Line("A", one.a), Line("B", one.b)], one.label, one.scale == "log"
        profiles.append(Profile(label, one.unit, lines, one.explanation, log, moved_layers(one, batches)))
    if found.weights:
        changes = [found.weights.get(name) for name in found.layers[0]]
        profiles.append(
            Profile("Change of the weights", "of their norm", [Line("||B - A|| / ||A||", changes)],
                    "Norm of the change of a block's weights over their norm in A.")
        )  # fmt: skip
    matrices = []
    if found.matrix:
        values = np.array([_array(row) for row in found.matrix]).reshape(len(found.layers[0]), len(found.layers[1]))
        said = "CKA of every layer of A with every layer of B on the same texts, in the full space."
        matrices = [
            Matrix("CKA of A and B", "CKA", values, "layer of A", "layer of B", said),
            Matrix("delta-CKA of A and B", "1 - CKA", 1 - values, "layer of A", "layer of B", "1 less that CKA.",
                   unit_interval=False),
        ]  # fmt: skip
    return LayerPage(
        kind="comparison",
        title=f"{names[0]} and {names[1]}",
        where=where,
        facts=(f"A: {names[0]}", f"B: {names[1]}", source),
        answer=comparison_answer(found),
        layers=found.layers[0],
        profiles=profiles,
        matrices=matrices,
        tables=_tables(found),
        settings=[(name, setting(value)) for name, value in found.settings.items() if name != "versions"],
        versions=_versions(found),
        missing=[f"Layer {layer} has no delta-CKA: {why}." for layer, why in found.reasons.items()] + _absent(found),
    )


def _versions(found: Comparison) -> list[tuple[str, str]]:
    known = found.settings.get("versions")
    return [(str(name), str(version)) for name, version in known.items()] if isinstance(known, dict) else []


def _absent(found: Comparison) -> list[str]:
    said = []
    if found.matrix and not found.delta:
        said.append("The models have different numbers of layers, so layers are not compared one by one.")
    if not found.weights:
        said.append("No block has the same weights in both models, so their change is not known.")
    return said


def _tables(found: Comparison) -> list[Table]:
    rows: list[Sequence[str]]
    tables = []
    if found.layers[0]:
        head, by_layer = _layer_rows(found)
        tables.append(Table("By layer", head, by_layer, numbers=tuple(range(len(head)))))
    measured = [
        (str(layer), one.label, *map(in_words, (one.a[layer], one.b[layer])), one.unit)
        for one in found.drift.values()
        for layer in range(min(len(one.a), len(one.b)))
    ]
    if measured:
        head = ["Layer", "Quantity", "A", "B", "Unit"]
        tables.append(Table("Every quantity of both models", head, measured, (0, 2, 3), folded=True))
    if found.modules:
        order = sorted(found.modules.items(), key=lambda one: -one[1])
        rows = [(name, _percent(change)) for name, change in order]
        tables.append(Table("Change of every weight matrix", ("Parameter", "Of its norm"), rows, (1,), folded=True))
    return tables


def _layer_rows(found: Comparison, *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    head, columns = ["Layer"], [[str(i) for i in range(len(found.layers[0]))]]
    if found.delta:
        head += ["1 - CKA", "arccos CKA" if short else "arccos CKA, rad"]
        columns.append([_with_error(v, e) for v, e in zip(found.delta, found.delta_error, strict=True)])
        errors = [None] * len(found.angle) if short else found.angle_error
        columns.append([_with_error(v, e) for v, e in zip(found.angle, errors, strict=True)])
    if found.matrix:
        head.append("Nearest" if short else "Nearest in B")
        columns.append(["-" if j is None else str(j) for j in found.nearest])
    if found.weights:
        head.append("Weights" if short else "Weights changed")
        columns.append([_percent(found.weights.get(name)) for name in found.layers[0]])
    for name in ("entropy",) if short else ("entropy", "sink", "residual_rms", "activation_grad"):
        if name in found.drift and found.drift[name].difference:
            head.append({"entropy": "Entropy, nats", "sink": "First key", "residual_rms": "RMS",
                         "activation_grad": "Gradient"}[name])  # fmt: skip
            one = found.drift[name]
            columns.append([_with_error(d, e, sign=True) for d, e in zip(one.difference, one.error, strict=True)])
    return head, [list(row) for row in zip(*columns, strict=True)]


def show_comparison(found: Comparison, names: tuple[str, str], console: Console) -> None:
    """Print the comparison in the terminal."""
    from rich.text import Text

    said = comparison_answer(found)
    console.print(Text(f"A: {names[0]}    B: {names[1]}", "bold"), soft_wrap=False)
    head, rows = _layer_rows(found, short=True)
    note = ""
    if len(rows) > LONG:
        order = np.argsort(-np.nan_to_num(_array(found.delta or [0.0] * len(rows)), nan=-np.inf), kind="stable")
        rows = [rows[i] for i in sorted(order[:LONG])]
        note = f"{LONG} of {len(found.layers[0])} layers: those that have changed most."
    if rows:
        print_grid(console, head, rows)
    for line in filter(None, (note, said.verdict, said.why)):
        console.print(Text(line, "bold" if line is said.verdict else ""), soft_wrap=False)


def _array(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _with_error(value: float | None, error: float | None, *, sign: bool = False) -> str:
    """A value with as many decimals as two digits of its standard error need."""
    if value is None or not np.isfinite(value):
        return "-"
    plus = "+" if sign and value > 0 else ""
    if error is None or not np.isfinite(error):
        return plus + significant(value)
    if max(abs(value), error) < LEAST:
        return "0"
    decimals = 1 - math.floor(math.log10(error)) if error > 0 else 3
    if decimals > DECIMALS:
        return f"{plus}{value:.1e} ± {error:.0e}"
    return f"{plus}{value:.{max(0, decimals)}f} ± {error:.{max(0, decimals)}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{significant(100 * share)} %"


def _int(settings: dict[str, object], name: str) -> int:
    value = settings.get(name)
    return value if isinstance(value, int) else 0
