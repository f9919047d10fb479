"""The pictures of docs/cka.md: how linear CKA goes wrong, on data whose true value is known. Writes docs/cka/*.png.

    python docs/cka_failures.py

Every picture draws what is used today beside what this package computes. Takes about a minute on two cores.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from inflection_fast import CkaState, linear_cka
from inflection_fast.report import canvas

FOLDER = Path(__file__).parent / "cka"
DIM = 256
WIDTH, HEIGHT = 5.2, 3.4


def main() -> None:
    """Draw everything."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (few_rows, batch_split, offset, long_rows, rank):
        torch.manual_seed(0)
        draw()


# ---- data ------------------------------------------------------------------------------------------------------------


def texts(sequences: int, tokens: int, shared: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features of two models [sequences, tokens, DIM]: tokens of one text have much in common, the models little."""
    topic = torch.randn(sequences, 1, DIM)
    x = shared * topic + torch.randn(sequences, tokens, DIM)
    y = shared * torch.randn(sequences, 1, DIM) + torch.randn(sequences, tokens, DIM) + 0.5 * x
    return x, y


def related(rows: int) -> tuple[Tensor, Tensor]:
    """Two sides of DIM features [rows, DIM] that share a third of their variance."""
    common = torch.randn(rows, DIM)
    return tuple(common + 1.4 * torch.randn(rows, DIM) for _ in range(2))


# ---- what is used today ----------------------------------------------------------------------------------------------


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  (the letter of the formula)
    """The unbiased estimator HSIC_1 of Song et al. (2012) from kernel matrices [n, n]."""
    n = len(k)
    k, l = (m - torch.diag(torch.diagonal(m)) for m in (k, l))  # noqa: E741
    trace = (k * l).sum()
    return (trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) * l.sum(0)).sum() / (n - 2)) / (n * (n - 3))


def minibatch(x: Tensor, y: Tensor, rows: int) -> float:
    """Means of HSIC_1 over batches, then their ratio (Nguyen et al. 2021): what streaming packages compute."""
    terms = torch.zeros(3)
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        k, l = a @ a.mT, b @ b.mT  # noqa: E741
        terms += torch.stack([hsic(k, l), hsic(k, k), hsic(l, l)])
    return float(terms[0] / (terms[1] * terms[2]).sqrt())


def raw_sums(x: Tensor, y: Tensor) -> float:
    """Biased CKA from plain float32 sums that are centred in the end."""
    n = len(x)
    xy, xx, yy = (a.mT @ b - torch.outer(a.sum(0), b.sum(0)) / n for a, b in ((x, y), (x, x), (y, y)))
    return float(xy.square().sum() / (xx.norm() * yy.norm()))


def value(x: Tensor, y: Tensor, **options) -> float:
    """CKA of this package."""
    return float(linear_cka(x[None], y[None], **options))


def exact(x: Tensor, y: Tensor, rows: int) -> float:
    """The same, streamed by so many rows."""
    state = CkaState(1, x.shape[1])
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        state.push(a[None], b[None])
    return float(state.value())


# ---- pictures --------------------------------------------------------------------------------------------------------


def few_rows() -> None:
    """Unrelated features look alike when there are few rows."""
    counts = [2**i for i in range(4, 13)]
    biased, debiased = [], []
    for n in counts:
        x, y = torch.randn(2, n, DIM)
        biased.append(value(x, y, debiased=False))
        debiased.append(value(x, y))
    floor = [DIM / (n + DIM + 1) for n in counts]
    ax = axes("few-rows", f"Unrelated features of width {DIM}", "rows", "CKA; the truth is 0", log=True)
    ax.plot(counts, floor, color=canvas.GREY, linewidth=1, label="d / (n + d + 1)")
    ax.plot(counts, biased, "o-", color=canvas.ORANGE, label="biased")
    ax.plot(counts, debiased, "o-", color=canvas.BLUE, label="debiased")
    done(ax, "few-rows")


def batch_split() -> None:
    """Averaging over batches changes with the batches, because rows of one text are alike."""
    sequences, tokens = 64, 32
    x, y = (t.reshape(-1, DIM) for t in texts(sequences, tokens))
    per_batch = [1, 2, 4, 8, 16, 32, 64]
    averaged = [minibatch(x, y, n * tokens) for n in per_batch]
    streamed = [exact(x, y, n * tokens) for n in per_batch]
    title = f"The same {sequences} texts of {tokens} tokens, in batches"
    ax = axes("batch-split", title, "texts in a batch", "debiased CKA", log=True)
    ax.plot(per_batch, averaged, "o-", color=canvas.ORANGE, label="mean over batches")
    ax.plot(per_batch, streamed, "o-", color=canvas.BLUE, label="CkaState")
    done(ax, "batch-split")


def offset() -> None:
    """A mean far from zero eats the digits of float32."""
    offsets = [0, 1, 3, 10, 30, 100, 300, 1000]
    x, y = related(4096)
    errors: dict[str, list[float]] = {"plain float32 sums": [], "mean over batches, not centred": [], "linear_cka": []}
    for shift in offsets:
        a, b = x + shift, y + shift  # rounded to float32: the truth is that of the rounded features
        truth = {flag: value64(a, b, flag) for flag in (True, False)}
        errors["plain float32 sums"].append(abs(raw_sums(a, b) - truth[False]))
        errors["mean over batches, not centred"].append(abs(minibatch(a, b, 256) - truth[True]))
        errors["linear_cka"].append(abs(value(a, b) - truth[True]))
    ax = axes("offset", f"Float32, {len(x)} rows", "mean of the features / their deviation", "error of CKA")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("log")
    for (label, seen), color in zip(errors.items(), (canvas.ORANGE, canvas.CHOSEN, canvas.BLUE), strict=True):
        ax.plot(offsets, [error if math.isfinite(error) else None for error in seen], "o-", color=color, label=label)
    done(ax, "offset")


def long_rows() -> None:
    """A few rows that are far longer than the others decide alone."""
    lengths = [1, 3, 10, 30, 100, 300]
    x, y = related(2048)
    direction = torch.randn(2, DIM)
    kept = slice(None, None, 32)  # the first token of every text
    everything, without = [], []
    for length in lengths:
        a, b = x.clone(), y.clone()
        for side, towards in ((a, direction[0]), (b, direction[1])):
            side[kept] = length * towards / towards.norm() * DIM**0.5 + 0.1 * side[kept]
        mask = torch.ones(len(x), dtype=torch.bool)
        mask[kept] = False
        everything.append(value(a, b))
        state = CkaState(1, DIM)
        state.push(a[None], b[None], mask)
        without.append(float(state.value()))
    title = "One row in 32 is a first token in a direction of its own"
    ax = axes("long-rows", title, "its length / that of the others", "debiased CKA", log=True)
    ax.plot(lengths, everything, "o-", color=canvas.ORANGE, label="all rows")
    ax.plot(lengths, without, "o-", color=canvas.BLUE, label="without first tokens")
    done(ax, "long-rows")


def rank() -> None:
    """How much a shared basis of rank k keeps decides what is seen of a change outside the leading directions."""
    spectrum = torch.arange(1, DIM + 1) ** -0.6
    before = torch.randn(4096, DIM) * spectrum
    after = before.clone()
    after[:, 16:] = 0.5 * before[:, 16:] + (torch.randn(4096, DIM) * spectrum)[:, 16:]  # the leading 16 stay
    ranks = [4, 8, 16, 32, 64, 128, 256]
    moved = [1 - value(before, after, rank=k, debiased=False) for k in ranks]
    full = 1 - value(before, after, debiased=False)
    ax = axes("rank", "A change outside the 16 leading directions", "rank of the shared basis", "delta-CKA", log=True)
    ax.plot(ranks, [full] * len(ranks), color=canvas.GREY, linewidth=1, label="full space")
    ax.plot(ranks, moved, "o-", color=canvas.BLUE, label="shared basis")
    done(ax, "rank")


def value64(x: Tensor, y: Tensor, debiased: bool) -> float:
    """The definition in float64."""
    from inflection_fast.ops import reference

    return float(reference.linear_cka(x.double(), y.double(), debiased=debiased))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def axes(name: str, title: str, x: str, y: str, *, log: bool = False):
    """Axes of a new figure."""
    ax = canvas.figure(WIDTH, HEIGHT).add_subplot()
    canvas.dress(ax, title, x, y)
    if log:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    return ax


def done(ax, name: str) -> None:
    """Legend and file."""
    ax.legend(frameon=False, fontsize=canvas.SMALL)
    for line in ax.get_lines():
        line.set_markersize(4)
    canvas.save(ax.figure, FOLDER / f"{name}.png")
    for line in ax.get_lines():
        print(f"{name}: {line.get_label()}: " + " ".join(f"{y:.3g}" for y in line.get_ydata() if y is not None))


if __name__ == "__main__":
    main()
