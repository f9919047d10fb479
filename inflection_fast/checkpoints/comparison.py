"""How two models differ: features layer by layer, what was measured on both, and weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from inflection_fast.blocks import find_blocks
from inflection_fast.checkpoints.documents import read_document, write_document
from inflection_fast.checkpoints.measuring import Features, Inputs, measure
from inflection_fast.checkpoints.numbers import Numbers, error_of, numbers
from inflection_fast.checkpoints.threads import threads_for
from inflection_fast.measure import MonitorConfig
from inflection_fast.ops import cka_jackknife, cka_matrix
from inflection_fast.ops.cka import POOLINGS
from inflection_fast.quantities import Quantity
from inflection_fast.timeline import Timeline
from inflection_fast.timeline.means import finite_mean

__all__ = ["Comparison", "Drift", "compare"]

_ROUNDING = 1e-6  # a CKA above 1 by no more is 1: the kernels sum in float32


@dataclass(frozen=True)
class Drift:
    """One measured quantity of both models, by layer: means over batches, and over heads where it has them."""

    label: str
    unit: str
    explanation: str
    scale: str
    a: Numbers
    b: Numbers
    difference: Numbers  # b - a; empty where the models have different numbers of layers
    error: Numbers  # standard error of the difference, over the batches


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Lists are by layer; None stands where there is no value.

    Attributes:
        layers: names of the blocks of A and of B.
        delta: the linear form of delta-CKA, 1 - CKA, of layer l of A and layer l of B; empty for different depths.
        delta_error: its standard error, leaving out each sequence in turn.
        angle: the angular form, arccos CKA in radians, which is a distance (Williams et al. 2021, arXiv 2110.14739).
        angle_error: its standard error, that of CKA over sqrt(1 - CKA^2).
        reasons: why a layer has no delta-CKA.
        matrix: CKA of all layers of A (rows) with all of B, in the full space.
        nearest: for each layer of A the layer of B with the largest CKA.
        drift: what was measured on both, by the name of its column.
        weights: by block name, ||W_b - W_a|| / ||W_a||; empty where no block has the same weights in both.
        modules: the same by name of the parameter.
        settings: rank of the shared basis (None: full space), whether debiased, pooling, rows, sequences, batches; and
            versions of packages.
    """

    layers: tuple[list[str], list[str]]
    delta: Numbers
    delta_error: Numbers
    angle: Numbers
    angle_error: Numbers
    reasons: dict[int, str]
    matrix: list[Numbers]
    nearest: list[int | None]
    drift: dict[str, Drift]
    weights: dict[str, float]
    modules: dict[str, float]
    settings: dict[str, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_document(path, "comparison", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote. ValueError for a file that is none."""
        document = read_document(path, "comparison")
        document["drift"] = {name: Drift(**one) for name, one in document["drift"].items()}
        document["reasons"] = {int(layer): words for layer, words in document["reasons"].items()}
        document["layers"] = tuple(document["layers"])
        return cls(**document)


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    *,
    loader_b: Iterable[Mapping[str, Tensor]] | None = None,
    quantities: Sequence[str | Quantity] | None = None,
    rank: int | None = None,
    debiased: bool = True,
    pooling: str = "tokens",
    rows: int = 2048,
    out: str | Path | None = None,
) -> Comparison:
    """Two checkpoints of one model, or two models of different width or depth, on the same inputs.

    Both run in evaluation mode on the device where they are, and are left as they were.

    Args:
        model_a, model_b: any that a `Monitor` takes.
        loader: inputs as mappings of tensors, at least one; with labels also the gradients are compared.
        loader_b: the same sequences as the other model takes them, batch by batch (None: `loader`). With other tokens
            only `pooling` "mean", "first" or "last" compares the same samples.
        quantities: what is measured on both (None: attention, residual stream, and with a loss activation gradients).
        rank: compare delta-CKA in a shared basis of this rank; both models must then have the same width.
        debiased: estimate of CKA, see `linear_cka`.
        pooling: "tokens": every token is a row; "mean", "first", "last": a row for each sequence.
        rows: at most so many feature rows; memory: layers x rows x width numbers of each model.
        out: folder for the two timelines, `a` and `b`; None: they are not kept.

    Raises:
        TypeError, ValueError: names the argument, what came and what is accepted.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {POOLINGS}, got {pooling!r}")
    batches = [_checked(loader, "loader"), _checked(loader if loader_b is None else loader_b, "loader_b")]
    if loader_b is None:
        batches[1] = batches[0]
    if len(batches[0]) != len(batches[1]):
        raise ValueError(f"loader_b: expected {len(batches[0])} batches as loader has, got {len(batches[1])}")
    labelled = all("labels" in batch for side in batches for batch in side)
    if quantities is None:
        quantities = ("attention", "residual", *(("activation_grad",) if labelled else ()))
    gradients = labelled and any("grad" in (q if isinstance(q, str) else q.name) for q in quantities)
    sides = []
    for model, side, name in zip((model_a, model_b), batches, "ab", strict=True):
        features = Features(len(side), rows, pooling)
        config = MonitorConfig(
            every=1, rows=None, quantities=(*quantities, features), forwards="trained" if gradients else "all"
        )
        folder = None if out is None else Path(out) / name
        timeline = measure(model, side, config, out=folder, gradients=gradients)
        sides.append(_Side(timeline, *_joined(features, len(timeline.layers))))
    a, b = sides
    _same_samples(a, b, pooling)
    largest = max(one.shape[0] * one.shape[1] ** 2 for side in sides for one in side.rows.values())
    with threads_for(largest):  # of a product of features with themselves
        delta, reasons = _delta(a, b, rank, debiased)
        matrix = _matrix(a, b, debiased)
    weights, modules = _weight_change(model_a, model_b)
    known = np.isfinite(matrix)
    first = next(iter(a.rows.values()), torch.empty(0))
    return Comparison(
        layers=(list(a.timeline.layers), list(b.timeline.layers)),
        **delta,
        reasons=reasons,
        matrix=[numbers(row) for row in matrix],
        nearest=[int(np.nanargmax(row)) if there.any() else None for row, there in zip(matrix, known, strict=True)],
        drift=_drift(a.timeline, b.timeline),
        weights=weights,
        modules=modules,
        settings={
            "rank": rank,
            "debiased": debiased,
            "pooling": pooling,
            "rows": len(first),
            "sequences": len(torch.unique(next(iter(a.sequences.values()), torch.empty(0)))),
            "batches": len(batches[0]),
            "versions": a.timeline.meta.get("versions", {}),
        },
    )


# ---- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    timeline: Timeline
    rows: dict[int, Tensor]  # layer -> [N, D]
    sequences: dict[int, Tensor]  # layer -> [N]


def _checked(loader: Iterable[Mapping[str, Tensor]], name: str) -> list[Inputs]:
    expected = f"{name}: expected an iterable of model inputs (mappings of tensors), at least one"
    if isinstance(loader, (Mapping, str, Tensor)) or not isinstance(loader, Iterable):
        raise TypeError(f"{expected}, got {type(loader).__name__}")
    batches = list(loader)
    wrong = [type(batch).__name__ for batch in batches if not isinstance(batch, Mapping)]
    if wrong or not batches:
        raise TypeError(f"{expected}, got {f'one of {wrong[0]}' if wrong else 'none'}")
    return [{key: value for key, value in batch.items() if isinstance(value, Tensor)} for batch in batches]


def _joined(features: Features, layers: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    there = [layer for layer in range(layers) if features.rows.get(layer)]
    rows = {layer: torch.cat(features.rows.pop(layer)) for layer in there}
    return rows, {layer: torch.cat(features.sequences.pop(layer)) for layer in there}


def _same_samples(a: _Side, b: _Side, pooling: str) -> None:
    if not a.rows or not b.rows:
        raise ValueError("loader: no block gave features of its batches")
    counts = [sorted({len(rows) for rows in side.rows.values()}) for side in (a, b)]
    if not set(counts[0]) & set(counts[1]):
        hint = "; compare sequences, not tokens: pooling='mean'" if pooling == "tokens" else ""
        raise ValueError(
            f"loader_b: the models give {counts[0]} and {counts[1]} feature rows, no samples to pair{hint}"
        )


def _delta(a: _Side, b: _Side, rank: int | None, debiased: bool) -> tuple[dict[str, Numbers], dict[int, str]]:
    """Both forms of delta-CKA with their errors, and why a layer has none."""
    count = len(a.timeline.layers)
    if count != len(b.timeline.layers):
        return {name: [] for name in ("delta", "delta_error", "angle", "angle_error")}, {}
    value, error = (np.full(count, np.nan) for _ in range(2))
    reasons = dict.fromkeys(range(count), "the layer did not run, or the models pass other rows to it")
    alike: dict[tuple[int, ...], list[int]] = {}
    for layer in sorted(a.rows.keys() & b.rows.keys()):
        x, y = a.rows[layer], b.rows[layer]
        if len(x) == len(y) and torch.equal(a.sequences[layer].cpu(), b.sequences[layer].cpu()):
            alike.setdefault((*x.shape, y.shape[1]), []).append(layer)
    for layers in alike.values():
        x, y = torch.stack([a.rows[i] for i in layers]), torch.stack([b.rows[i] for i in layers])
        found = cka_jackknife(x, y.to(x.device), a.sequences[layers[0]], rank=rank, debiased=debiased)
        # Kept in float64: 1 - delta of a layer that has hardly moved would lose the digits of its angle.
        value[layers] = found.delta.double().cpu().numpy()
        error[layers] = found.standard_error.double().cpu().numpy()
        for place, layer in enumerate(layers):
            del reasons[layer]
            if place in found.reasons:
                reasons[layer] = found.reasons[place]
    cka = 1 - value
    cka = np.where((cka > 1) & (cka <= 1 + _ROUNDING), 1.0, cka)
    with np.errstate(invalid="ignore", divide="ignore"):
        angle, spread = np.arccos(cka), np.sqrt(1 - cka**2)
        angle_error = np.where(spread > 0, error / spread, np.nan)
    arrays = {"delta": value, "delta_error": error, "angle": angle, "angle_error": angle_error}
    return {name: numbers(array) for name, array in arrays.items()}, reasons


def _matrix(a: _Side, b: _Side, debiased: bool) -> np.ndarray:
    """[L, L2] CKA of all pairs; NaN where the rows of two layers are not the same samples."""
    found = np.full((len(a.timeline.layers), len(b.timeline.layers)), np.nan)
    for of_a in _stacks(a):
        for of_b in _stacks(b):
            x, y = torch.stack([a.rows[i] for i in of_a]), torch.stack([b.rows[i] for i in of_b])
            if torch.equal(a.sequences[of_a[0]].cpu(), b.sequences[of_b[0]].cpu()):
                found[np.ix_(of_a, of_b)] = cka_matrix(x, y.to(x.device), debiased=debiased).double().cpu().numpy()
    return found


def _stacks(side: _Side) -> list[list[int]]:
    """Layers with equally many rows of equal width and the same sequences."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for layer, rows in side.rows.items():
        groups.setdefault((rows.shape, tuple(side.sequences[layer].tolist())), []).append(layer)
    return list(groups.values())


# ---- what was measured, and weights ----------------------------------------------------------------------------------


def _drift(a: Timeline, b: Timeline) -> dict[str, Drift]:
    """Every column by layer that both have, paired batch by batch."""
    found = {}
    for name, column in a.columns.items():
        if column.axes[:1] != ("layer",) or name not in b.columns or name.endswith("_se"):
            continue
        left, right = (_by_layer(np.asarray(getattr(side, name), float)) for side in (a, b))
        if not (np.isfinite(left).any() and np.isfinite(right).any()):
            continue
        difference, error = [], []
        if left.shape[1] == right.shape[1]:
            apart = right - left
            difference, error = numbers(finite_mean(apart)), numbers(error_of(apart))
        found[name] = Drift(
            column.label, column.unit, column.explanation, column.scale,
            numbers(finite_mean(left)), numbers(finite_mean(right)), difference, error,
        )  # fmt: skip
    return found


def _by_layer(values: np.ndarray) -> np.ndarray:
    """[S, L]: mean over all other axes, of the places that have a value."""
    return finite_mean(values.reshape(*values.shape[:2], -1), axis=-1)


def _weight_change(model_a: nn.Module, model_b: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
    """||W_b - W_a|| / ||W_a|| by block and by parameter, of parameters with equal names and shapes."""
    blocks: dict[str, float] = {}
    modules: dict[str, float] = {}
    others = {block.name: block for block in find_blocks(model_b)}
    for block in find_blocks(model_a):
        other = others.get(block.name)
        if other is None or block.module is None or other.module is None:
            continue
        changed = whole = 0.0
        there = dict(other.module.named_parameters())
        for name, before in block.module.named_parameters():
            after = there.get(name)
            if after is None or after.shape != before.shape:
                continue
            apart, size = _squares(before.detach(), after.detach())
            changed, whole = changed + apart, whole + size
            if before.ndim > 1 and size > 0:
                modules[f"{block.name}.{name}"] = math.sqrt(apart / size)
        if whole > 0:
            blocks[block.name] = math.sqrt(changed / whole)
    return blocks, modules


def _squares(before: Tensor, after: Tensor) -> tuple[float, float]:
    apart = (after.to(before.device).float() - before.float()).double()
    return float(apart.square().sum()), float(before.double().square().sum())
