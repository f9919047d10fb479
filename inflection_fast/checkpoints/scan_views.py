"""A scan as text, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from inflection_fast.checkpoints.findings import Finding
from inflection_fast.checkpoints.numbers import in_words, print_grid
from inflection_fast.checkpoints.scanning import Profiled, Scan
from inflection_fast.report.answer import Answer
from inflection_fast.report.layer_page import LayerPage, Line, Matrix, Profile, Table
from inflection_fast.report.words import count, layer_ranges, percent, setting, significant

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["scan_answer", "scan_page", "show_scan"]

LONG = 48  # with more layers the terminal lists those of the findings
SENTENCES = 4  # findings in the first lines
# Columns of the table in the terminal: name of the profile, or of a value computed below, and the head.
TERMINAL = (
    ("entropy", "Entropy"), ("sink", "Sink"), ("rank_k90", "Rank k*"), ("residual_rms", "RMS"),
    ("residual_kurtosis", "Kurtosis"), ("activation_grad", "Gradient"), ("gain", "Gain"), ("near", "CKA before"),
    ("effective", "Eff. rank"),
)  # fmt: skip
# Kind of a finding -> its columns, in which its layers are marked.
TOLD_BY = {
    "not finite": ("residual_rms",),
    "lazy layers": ("rank_k90", "rank_max", "lazy_heads"),
    "blind to order": ("entropy",),
    "sinks": ("sink",),
    "massive activations": ("residual_max", "massive_activations"),
}


def scan_answer(found: Scan, where: str) -> Answer:
    """The first three lines."""
    unusual = [one for one in found.findings if one.unusual]
    if unusual:
        verdict = f"Unusual compared with chance: {', '.join(_kind(one) for one in unusual)}."
    else:
        verdict = "Nothing unusual: all comparisons with the nulls are as in trained models."
    why = " ".join(one.words for one in (unusual or found.findings)[:SENTENCES])
    if not found.texts:
        return Answer(
            verdict, why or "The file has no matrix of at least 16 x 16.",
            "With texts, attention, features and gradients are measured too:",
            f"inflection-fast scan {found.model['name']} --data texts.txt",
        )  # fmt: skip
    if found.plan is None or not found.plan.layers:
        chosen = "" if found.plan is None else f" {found.plan.summary}"
        return Answer(verdict, why, f"No layer is chosen for adapters.{chosen}")
    return Answer(
        verdict, why,
        f"For adapters it chooses {layer_ranges(found.plan.layers)}; to print settings of a training tool:",
        f"inflection-fast scan {found.model['name']} --data ... --yaml axolotl",
    )  # fmt: skip


def _kind(one: Finding) -> str:
    return f"{one.kind} ({layer_ranges(one.layers)})" if one.layers else one.kind


def scan_page(found: Scan, where: str, source: str) -> LayerPage:
    """The page."""
    facts = [str(found.model[name]) for name in ("class",) if name in found.model]
    if isinstance(parameters := found.model.get("parameters"), int):
        facts.append(f"{count(parameters)} parameters")
    facts += [f"{len(found.layers)} layers"] if found.layers else []
    facts.append(source)
    return LayerPage(
        kind="scan",
        title=f"Scan of {str(found.model['name']).rstrip('/').rsplit('/', 1)[-1]}",
        where=str(found.model["name"]),
        facts=facts,
        answer=scan_answer(found, where),
        layers=found.layers,
        profiles=[_profile(one, _marked(found, name)) for name, one in found.profiles.items()] + _more_profiles(found),
        matrices=_matrices(found),
        tables=_tables(found),
        settings=[(name, setting(value)) for name, value in {**found.texts, **found.settings}.items()],
        versions=list(found.versions.items()),
        missing=_missing(found),
        plan=found.plan,
    )


def _marked(found: Scan, column: str) -> list[int]:
    """Layers of the unusual findings of this column."""
    return sorted(
        {i for one in found.findings if one.unusual and column in TOLD_BY.get(one.kind, ()) for i in one.layers}
    )


def _profile(one: Profiled, marked: list[int]) -> Profile:
    lines = [Line("texts", one.texts, one.error)]
    lines += [Line("words in random order", one.shuffled)] if one.shuffled else []
    lines += [Line("random matrices", one.random)] if one.random else []
    return Profile(one.label, one.unit, lines, one.explanation, one.scale == "log", marked)


def _more_profiles(found: Scan) -> list[Profile]:
    """Profiles that are no columns: summed gains of the modules of a layer, and effective ranks."""
    profiles = []
    if found.modules:
        said = (
            "Sum of the first-order gains of all matrices of a block: what an adapter there can win with a small step."
        )
        profiles.append(
            Profile("first-order gain of adapters", "squared l2 norm", [Line("gain", _gains(found))], said, True)
        )
    effective = _effective(found)
    if any(value is not None for value in effective):
        said = (
            "Effective rank of a block's matrices over that of random matrices of their sizes, mean over the matrices."
        )
        profiles.append(Profile("effective rank of the weights", "of random", [Line("weights", effective)], said))
    return profiles


def _matrices(found: Scan) -> list[Matrix]:
    words = {
        "texts": ("CKA of layers", "Linear CKA of the features of all pairs of layers on the texts."),
        "random": ("CKA of layers with random matrices", "The same with random matrices in place of the weights."),
    }
    return [
        Matrix(words[name][0], "CKA", np.array([[np.nan if v is None else v for v in row] for row in rows], float),
               "layer", "other layer", words[name][1])
        for name, rows in found.matrices.items() if rows
    ]  # fmt: skip


def _tables(found: Scan) -> list[Table]:
    rows: list[Sequence[str]]
    tables = [
        Table("Findings", ("What", "Against the nulls", "Unusual", "Spreads"),
              [(one.kind, one.words, "yes" if one.unusual else "no", _distance(one)) for one in found.findings], (3,))
    ]  # fmt: skip
    if found.layers:
        head, by_layer = _layer_rows(found)
        tables.append(Table("By layer", head, by_layer, tuple(range(len(head)))))
    if found.modules:
        order = sorted(found.modules, key=lambda one: -one.gain)
        rows = [
            (str(one.layer), one.name, significant(one.gain), _percent(one.share), percent(one.random_share))
            for one in order
        ]
        head = ["Layer", "Module", "First-order gain", "Within the rank", "Random matrix"]
        tables.append(Table("Gradients by module, the largest gain first", head, rows, (0, 2, 3, 4), folded=True))
    if found.weights:
        rows = [
            (one.name, f"{one.shape[0]} x {one.shape[1]}", str(one.outliers), in_words(one.effective_rank),
             in_words(one.random_effective_rank), in_words(one.stable_rank), in_words(one.random_stable_rank),
             in_words(one.alpha), in_words(one.random_alpha), in_words(one.norm))
            for one in found.weights
        ]  # fmt: skip
        head = ["Matrix", "Size", "Above noise", "Effective rank", "random", "Stable rank", "random", "Exponent",
                "random", "Norm"]  # fmt: skip
        tables.append(Table("Spectra of all matrices", head, rows, tuple(range(2, 10)), folded=bool(found.layers)))
    return tables


def _layer_rows(found: Scan) -> tuple[list[str], list[list[str]]]:
    own = {"gain": _gains(found), "near": _near(found), "effective": _effective(found)}
    head, columns = ["Layer"], [[str(i) for i in range(len(found.layers))]]
    for name, title in TERMINAL:
        values = found.profiles[name].texts if name in found.profiles else own.get(name, [])
        if any(value is not None for value in values):
            head.append(title)
            columns.append([in_words(value) for value in values])
    return head, [list(row) for row in zip(*columns, strict=True)]


def _gains(found: Scan) -> list[float | None]:
    totals: list[float | None] = [None] * len(found.layers)
    for one in found.modules:
        totals[one.layer] = (totals[one.layer] or 0.0) + one.gain
    return totals


def _near(found: Scan) -> list[float | None]:
    """CKA of each layer with the one before it."""
    rows = found.matrices.get("texts", [])
    return [None] * bool(rows) + [rows[i][i - 1] for i in range(1, len(rows))]


def _effective(found: Scan) -> list[float | None]:
    shares: dict[int, list[float]] = {}
    for one in found.weights:
        if one.layer is not None and one.effective_rank is not None:
            shares.setdefault(one.layer, []).append(one.effective_rank / one.random_effective_rank)
    if len(set(found.layers)) != len(found.layers) or len({layer.rpartition(".")[0] for layer in found.layers}) > 1:
        return []  # several stacks: the number in a name does not tell which layer it is
    return [float(np.mean(shares[i])) if i in shares else None for i in range(len(found.layers))]


def _distance(one: Finding) -> str:
    return in_words(one.distance) if one.unusual else ""


def _missing(found: Scan) -> list[str]:
    if not found.texts:
        return ["No texts were given: attention, features and gradients were not measured, and no layers are chosen."]
    said = []
    if "entropy" not in found.profiles:
        said.append("No attention was observed, so entropy, sinks and ranks have no values.")
    if not found.weights:
        said.append("The spectra of the weights were not computed.")
    if "rank_k90" not in found.profiles and "entropy" in found.profiles:
        said.append("The rank of attention has no values.")
    return said


def show_scan(found: Scan, where: str, console: Console) -> None:
    """Print the scan in the terminal."""
    from rich.text import Text

    def show(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=False)

    show(f"Scan of {found.model['name']}", "bold")
    if found.layers:
        head, rows = _layer_rows(found)
        if len(rows) > LONG:
            named = {layer for one in found.findings if one.unusual for layer in one.layers}
            rows = [row for i, row in enumerate(rows) if i in named or i in (0, len(rows) - 1)]
            show(f"{len(rows)} of {len(found.layers)} layers: those of the findings, the first and the last.")
    else:
        head, rows = _by_kind(found)
    print_grid(console, head, rows, left=not found.layers, padding=(0, 1, 0, 0))
    for one in found.findings:
        show(("! " if one.unusual else "  ") + one.words, "bold" if one.unusual else "")
    said = scan_answer(found, where)
    show(said.verdict, "bold")
    show(" ".join(filter(None, (said.next, said.command))))


def _by_kind(found: Scan) -> tuple[list[str], list[list[str]]]:
    """One row by kind of matrix: their number, and medians."""
    kinds: dict[str, list[int]] = {}
    for i, one in enumerate(found.weights):
        kinds.setdefault(one.kind.removesuffix(".weight"), []).append(i)
    rows = []
    for kind, places in kinds.items():
        ones = [found.weights[i] for i in places]
        known = [
            (one.effective_rank or 0.0) / one.random_effective_rank for one in ones if one.effective_rank is not None
        ]
        alphas = [one.alpha for one in ones if one.alpha is not None]
        rows.append([
            kind, str(len(ones)), f"{ones[0].shape[0]} x {ones[0].shape[1]}", str(min(one.outliers for one in ones)),
            percent(float(np.median(known)), 0) if known else "-",
            significant(float(np.median(alphas))) if alphas else "-",
        ])  # fmt: skip
    return ["Matrices", "Number", "Size", "Above noise, least", "Eff. rank of random", "Exponent"], rows


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)
