"""How estimators of CKA fail: measures them against float64 and draws docs/images/cka_*.png.

`python benchmarks/cka_failures.py` prints the tables of docs/cka.md and rewrites the pictures. No times: bench_cka.py
has those.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cka_rivals import BATCH, rivals

from inflection_fast import CkaState, cka_matrix, linear_cka
from inflection_fast.ops import reference
from inflection_fast.report import canvas

ROWS, DIM = 1024, 256
OFFSETS = (0, 1, 3, 10, 30, 100, 300, 1000)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 256)  # that the rows of a batch belong to
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
FLOOR = 1e-9  # of a logarithmic axis
STYLES = {"ours": (canvas.CHOSEN, "o"), "ours, minibatch": (canvas.CHOSEN, "s")}
COLOURS = (canvas.BLUE, canvas.ORANGE, canvas.TEXT_COLOUR, canvas.GREY, "#009E73", "#CC79A7")


def streamed(x, y):
    """Ours, by minibatches."""
    state = CkaState(1, x.shape[1])
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
        state.push(a[None], b[None])
    return state.value()[0]


def ours_minibatch(x, y):
    """Ours, the same minibatch estimate as the packages'."""
    return cka_matrix(x[None], y[None], method="minibatch", tile=BATCH)[0, 0]


def exact(x, y, debiased=True):
    """float64, from the definition."""
    return reference.linear_cka(x.double(), y.double(), debiased=debiased).item()


def exact_minibatch(x, y):
    """HSIC_1 of each batch in float64, added up: what the packages mean to compute."""
    total = torch.zeros(3, dtype=torch.float64)
    for batch in zip(x.double().split(BATCH), y.double().split(BATCH), strict=True):
        k, m = ((side - side.mean(0)) @ (side - side.mean(0)).T for side in batch)
        k, m = (gram.fill_diagonal_(0.0) for gram in (k, m))
        total += torch.stack([reference.hsic(*pair, True) for pair in ((k, m), (k, k), (m, m))])
    return (total[0] / (total[1] * total[2]).sqrt()).item()


def independent_rows():
    """Rows that have nothing to do with each other; CKA about 0.5."""
    x = torch.randn(ROWS, DIM)
    return x, x + torch.randn(ROWS, DIM)


def tokens(texts_per_batch):
    """Rows of a batch belong to few texts, whose topics the two sides see differently."""
    of = torch.arange(ROWS) // (BATCH // texts_per_batch)
    topics = [1.5 * torch.randn(int(of.max()) + 1, DIM)[of] for _ in range(2)]
    x = torch.randn(ROWS, DIM)
    return x + topics[0], x + topics[1]


def by_offset(estimators: dict[str, Callable], offsets=OFFSETS) -> dict[str, list[float]]:
    """Error at a mean of so many standard deviations, of the estimate that the method means to compute."""
    found = {name: [] for name in estimators}
    for offset in offsets:
        torch.manual_seed(0)
        x, y = (side + offset * torch.ones(DIM) for side in independent_rows())
        truths = {True: exact(x, y), False: exact(x, y, debiased=False)}
        minibatch = exact_minibatch(x, y)
        for name, estimate in estimators.items():
            meant = truths[name != "plain PyTorch"]
            if name in ("pytorch-cka", "torch-cka", "ckatorch", "ours, minibatch"):
                meant = minibatch
            found[name].append(error_of(estimate, x, y, meant))
    return found


def error_of(estimate: Callable, x, y, meant: float) -> float:
    """Absolute error; NaN where there is no value."""
    value = float(estimate(x, y))
    return abs(value - meant) if math.isfinite(value) else math.nan


def by_texts(estimators: dict[str, Callable], texts=TEXTS) -> dict[str, list[float]]:
    """Values where the rows of a batch belong to so many texts."""
    found = {name: [] for name in ("exact", *estimators)}
    for number in texts:
        torch.manual_seed(1)
        x, y = tokens(number)
        found["exact"].append(exact(x, y))
        for name, estimate in estimators.items():
            found[name].append(float(estimate(x, y)))
    return found


def by_rows() -> dict[str, list[float]]:
    """Values of features that have nothing in common, by the number of rows."""
    found = {"biased": [], "debiased": []}
    for rows in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        torch.manual_seed(2)
        x, y = torch.randn(2, 1, rows, DIM)
        found["biased"].append(linear_cka(x, y, debiased=False).item())
        found["debiased"].append(linear_cka(x, y).item())
    return found


LENGTHS = (1, 3, 10, 30, 100, 300)
RANKS = (4, 8, 16, 32, 64, 128, 256)


def by_length() -> dict[str, list[float]]:
    """Values where one row in 32 is a first token in a direction of its own, so many times as long as the others."""
    first = torch.arange(2 * ROWS) % 32 == 0
    found = {"all rows": [], "without first tokens": []}
    for length in LENGTHS:
        torch.manual_seed(3)
        common = torch.randn(2 * ROWS, DIM)
        x, y = (common + 1.4 * torch.randn(2 * ROWS, DIM) for _ in range(2))
        for side in (x, y):
            towards = torch.randn(DIM)
            side[first] = length * DIM**0.5 * towards / towards.norm() + 0.1 * side[first]
        found["all rows"].append(linear_cka(x[None], y[None]).item())
        state = CkaState(1, DIM)
        state.push(x[None], y[None], ~first)
        found["without first tokens"].append(state.value().item())
    return found


def by_rank() -> dict[str, list[float]]:
    """Delta-CKA of a change that leaves the leading 16 directions as they are."""
    torch.manual_seed(4)
    spectrum = torch.arange(1, DIM + 1) ** -0.6
    before, other = (torch.randn(1, 4 * ROWS, DIM) * spectrum for _ in range(2))
    after = before.clone()
    after[..., 16:] = 0.5 * before[..., 16:] + other[..., 16:]
    full = 1 - linear_cka(before, after, debiased=False).item()
    shared = [1 - linear_cka(before, after, rank=rank, debiased=False).item() for rank in RANKS]
    return {"full space": [full] * len(RANKS), "shared basis": shared}


def chart(name: str, title: str, x_label: str, y_label: str, x, lines: dict[str, list[float]], log: bool) -> None:
    """One picture: a line per estimator; where one gave no value its line ends."""
    drawn = canvas.figure(7.0, 3.6)
    ax = drawn.add_subplot()
    canvas.style_axes(ax, title, x_label, y_label)
    colours = iter(COLOURS)
    for number, (label, values) in enumerate(lines.items()):
        colour, marker = STYLES[label] if label in STYLES else (next(colours), "^")
        values = np.maximum(values, FLOOR) if log else np.asarray(values)
        width = 1 + 0.7 * (len(lines) - number)  # lines on top of each other stay visible
        ax.plot(range(len(x)), values, color=colour, marker=marker, markersize=3 + width, linewidth=width, label=label)
    ax.set_xticks(range(len(x)), [str(value) for value in x])
    if log:
        ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=canvas.SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5))
    canvas.save(drawn, IMAGES / name)


def table(head: str, columns, lines: dict[str, list[float]], form: str) -> str:
    """In Markdown."""
    rows = [f"| {head} | " + " | ".join(str(column) for column in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, values in lines.items():
        rows.append(f"| {name} | " + " | ".join("none" if math.isnan(v) else format(v, form) for v in values) + " |")
    return "\n".join(rows) + "\n"


def error_table(estimators: dict[str, Callable], offsets, texts) -> str:
    """Errors at mean offsets, each against what the method means to compute; at texts a batch, against all rows."""
    biased = {"plain PyTorch": partial(exact, debiased=False)}
    lines, values, meant = by_offset(estimators, offsets), by_texts(estimators, texts), by_texts(biased, texts)
    for name, errors in lines.items():
        truths = meant.get(name, meant["exact"])
        errors += [abs(v - e) if math.isfinite(v) else math.nan for v, e in zip(values[name], truths, strict=True)]
    columns = [f"mean {offset}" for offset in offsets] + [f"{number} texts a batch" for number in texts]
    return table("absolute error", columns, lines, ".0e")


def main() -> int:
    """Measure, print, draw."""
    torch.set_num_threads(2)
    others, absent = rivals()
    if absent:
        print(f"not installed, left out: {', '.join(absent)}\n")
    IMAGES.mkdir(exist_ok=True)
    estimators = {"ours": streamed, "ours, minibatch": ours_minibatch, **others}
    offsets = by_offset(estimators)
    print(table("error at mean / std", OFFSETS, offsets, ".0e"))
    chart(
        "cka_offset.png", "A mean offset", "mean of the features, in standard deviations", "absolute error", OFFSETS,
        offsets, True,
    )  # fmt: skip
    names = ("pytorch-cka", "torch-cka", "ckatorch")
    texts = by_texts({"ours": streamed} | {name: others[name] for name in names if name in others})
    print(table(f"texts in a batch of {BATCH} rows", TEXTS, texts, ".3f"))
    chart("cka_texts.png", "Tokens of few texts", "texts in a batch of 256 rows", "CKA", TEXTS, texts, False)
    rows = by_rows()
    counts = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    print(table(f"unrelated features of width {DIM}, rows", counts, rows, ".3f"))
    chart("cka_rows.png", "Features that have nothing in common", "rows", "CKA", counts, rows, False)
    lengths = by_length()
    print(table("length of first tokens / of the others", LENGTHS, lengths, ".3f"))
    axis = "length of first tokens / of the others"
    chart("cka_length.png", "One row in 32 is a first token", axis, "CKA", LENGTHS, lengths, False)
    ranks = by_rank()
    print(table("rank", RANKS, ranks, ".1e"))
    title = "A change outside the 16 leading directions"
    chart("cka_rank.png", title, "rank of the shared basis", "delta-CKA", RANKS, ranks, False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
