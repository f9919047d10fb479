"""What is unusual in a checkpoint. Findings are compared with chance, not with fixed limits.

Two nulls are measured like the texts: the same words in random order, and random matrices as weights of the blocks. A
mean over batches is different if a paired Student's t over the batches is significant at 5 % over all layers
(`decide.evidence`). Values that are measured once, on the probe, are compared without a test. Findings are sorted by
their distance from the null (`distances`), the largest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from inflection_fast.checkpoints.distances import nearest_robust_z, robust_z
from inflection_fast.checkpoints.numbers import finite_or_none
from inflection_fast.decide.evidence import correlation_of, evidence_of
from inflection_fast.report.words import layer_ranges, percent, significant
from inflection_fast.timeline import Timeline
from inflection_fast.timeline.means import finite_mean

if TYPE_CHECKING:
    from inflection_fast.checkpoints.on_texts import Module
    from inflection_fast.checkpoints.weights import MatrixSpectrum

__all__ = ["Finding", "Nulls", "findings"]

LEVEL = 0.05
NAMED = 4  # matrices that a sentence names


@dataclass(frozen=True)
class Finding:
    """One sentence, and what it is about."""

    kind: str
    words: str
    layers: list[int]
    unusual: bool = True  # False: any trained model has it
    distance: float | None = None  # from its null, see `distances`; None: infinite, or not unusual


@dataclass(frozen=True)
class Nulls:
    """The texts as they are, and the two nulls, measured batch by batch."""

    texts: Timeline
    shuffled: Timeline
    random: Timeline

    def by_layer(self, name: str, kind: str) -> np.ndarray | None:
        """[S, L] of a column, mean over heads; None where nothing was measured."""
        timeline = getattr(self, kind)
        if name not in timeline.columns:
            return None
        values = np.asarray(getattr(timeline, name), float)
        values = finite_mean(values, -1) if values.ndim == 3 else values
        return values if np.isfinite(values).any() else None

    def above(self, name: str, kind: str, *, sign: int = 1) -> list[int]:
        """Layers where a column is larger (`sign` -1: smaller) on the texts than in a null, beyond chance."""
        here, there = self.by_layer(name, "texts"), self.by_layer(name, kind)
        if here is None or there is None:
            return []
        steps = min(len(here), len(there))
        apart = sign * (here[:steps] - there[:steps])
        layers = np.flatnonzero(np.isfinite(apart).all(0))
        if steps < 2 or not len(layers):
            return []
        common = correlation_of(apart[:, layers])
        comparisons = len(layers)
        return [
            int(layer)
            for layer in layers
            if evidence_of(apart[:, layer], 0.0, level=LEVEL, comparisons=comparisons, correlation=common).holds
        ]

    def distances(self, name: str, kind: str, *, log: bool = False) -> np.ndarray:
        """[L]: how far a column lies above a null, in spreads of the null over its batches."""
        here, there = self.by_layer(name, "texts"), self.by_layer(name, kind)
        assert here is not None and there is not None
        if log:
            with np.errstate(divide="ignore", invalid="ignore"):
                here, there = np.log(here), np.log(there)
        return robust_z(here[: len(there)], there)


def findings(
    nulls: Nulls | None, modules: Sequence[Module], weights: Sequence[MatrixSpectrum], rank: int
) -> list[Finding]:
    """All findings: the unusual ones by distance from their null, then the others."""
    found: list[Finding] = []
    if nulls is not None:
        found += _not_finite(nulls) + _lazy(nulls) + _order(nulls) + _sinks(nulls) + _massive(nulls) + _alike(nulls)
        found += _gains(modules, rank)
    found += _weights(weights)
    return sorted(found, key=lambda one: (not one.unusual, -(np.inf if one.distance is None else one.distance)))


def _not_finite(nulls: Nulls) -> list[Finding]:
    values = np.asarray(nulls.texts.residual_rms, float)
    layers = np.flatnonzero(~np.isfinite(values).all(0)).tolist()
    if not layers:
        return []
    return [
        Finding("not finite", f"The output of {layer_ranges(layers)} is infinite or no number on some text.", layers)
    ]


def _lazy(nulls: Nulls) -> list[Finding]:
    """Layers without a head whose attention has a higher rank than with random matrices."""
    here, random = (_once(timeline, "rank_k90") for timeline in (nulls.texts, nulls.random))
    if here is None or random is None:
        return []
    known = np.isfinite(here).all(1) & np.isfinite(random).all(1)
    layers = [int(i) for i in np.flatnonzero(known) if here[i].max() <= random[i].max()]
    if not layers:
        return []
    i = layers[0]
    words = (
        f"Attention of {layer_ranges(layers)} is of no higher rank in any head than that of random matrices "
        f"(layer {i}: {significant(here[i].max())}, random {significant(random[i].max())} directions hold 90 %)."
    )
    distance = nearest_robust_z(here.max(1) - random.max(1), layers)
    return [Finding("lazy layers", words, layers, distance=finite_or_none(distance))]


def _order(nulls: Nulls) -> list[Finding]:
    """Layers whose attention entropy does not change with words in random order."""
    entropy = nulls.by_layer("entropy", "texts")
    if entropy is None or nulls.by_layer("entropy", "shuffled") is None:
        return []
    noticed = {*nulls.above("entropy", "shuffled"), *nulls.above("entropy", "shuffled", sign=-1)}
    layers = [int(i) for i in np.flatnonzero(np.isfinite(entropy).all(0)) if i not in noticed]
    if not layers:
        return [
            Finding("order of words", "The attention of every layer changes with words in random order.", [], False)
        ]
    words = (
        f"The entropy of attention in {layer_ranges(layers)} is not significantly different with words in random order."
    )
    distance = nearest_robust_z(np.abs(nulls.distances("entropy", "shuffled")), layers)  # hardly moved, up or down
    return [Finding("blind to order", words, layers, distance=finite_or_none(distance))]


def _sinks(nulls: Nulls) -> list[Finding]:
    here, random, mixed = (nulls.by_layer("sink", kind) for kind in ("texts", "random", "shuffled"))
    if here is None or random is None or mixed is None:
        return []
    layers = nulls.above("sink", "random")
    if not layers:
        return [Finding("sinks", "No layer attends to the first token more than random matrices do.", [], False)]
    most = max(layers, key=lambda layer: float(np.nanmean(here[:, layer])))
    values = [significant(float(np.nanmean(of[:, most]))) for of in (here, random, mixed)]
    words = (
        f"{layer_ranges(layers).capitalize()} attend{'s' * (len(layers) == 1)} to the first token more than random "
        f"matrices do: in layer {most} it gets {values[0]} of the attention, {values[1]} with random matrices, "
        f"{values[2]} on words in random order."
    )
    distance = float(nulls.distances("sink", "random")[layers].max())
    return [Finding("sinks", words, layers, distance=finite_or_none(distance))]


def _massive(nulls: Nulls) -> list[Finding]:
    here, random = (nulls.by_layer("massive_activations", kind) for kind in ("texts", "random"))
    found = []
    if here is not None and random is not None:
        layers = [int(i) for i in np.flatnonzero((np.nansum(here, 0) > 0) & (np.nansum(random, 0) == 0))]
        if layers:
            largest = nulls.by_layer("residual_max", "texts")
            assert largest is not None
            value = significant(float(np.nanmax(largest[:, layers])))
            words = f"Massive activations in {layer_ranges(layers)}, the largest {value}; random matrices give none."
            distance = float(nulls.distances("residual_max", "random", log=True)[layers].max())
            found.append(Finding("massive activations", words, layers, distance=finite_or_none(distance)))
    heavy = nulls.above("residual_kurtosis", "random")
    if heavy:
        tails = nulls.by_layer("residual_kurtosis", "texts")
        assert tails is not None
        most = max(heavy, key=lambda layer: float(np.nanmean(tails[:, layer])))
        words = (
            f"Outputs of {layer_ranges(heavy)} have heavier tails than those of random matrices: kurtosis "
            f"{significant(float(np.nanmean(tails[:, most])))} in layer {most}, 3 if normal."
        )
        found.append(Finding("heavy tails", words, heavy, unusual=False))
    return found


def _alike(nulls: Nulls) -> list[Finding]:
    """Layers that change the features of the layer before no more than random matrices do."""
    here, random = (_once(timeline, "layer_cka") for timeline in (nulls.texts, nulls.random))
    if here is None or random is None or len(here) < 2:
        return []
    near, null = np.diagonal(here, 1), np.diagonal(random, 1)
    layers = [int(i) + 1 for i in np.flatnonzero(near >= null)]
    if not layers:
        return [
            Finding("features", "Every layer changes features more than random matrices in its place do.", [], False)
        ]
    i = max(layers, key=lambda layer: float(near[layer - 1]))
    words = (
        f"Features of {layer_ranges(layers)} are as much like those of the layer before as with random matrices "
        f"(layer {i}: CKA {significant(float(near[i - 1]), 4)}, random {significant(float(null[i - 1]), 4)})."
    )
    distance = nearest_robust_z(null - near, [layer - 1 for layer in layers])
    return [Finding("alike layers", words, layers, distance=finite_or_none(distance))]


def _gains(modules: Sequence[Module], rank: int) -> list[Finding]:
    if not modules:
        return []
    best = max(modules, key=lambda one: one.gain)
    shares = np.array([np.nan if one.share is None else one.share for one in modules])
    null = np.array([one.random_share for one in modules])
    words = (
        f"At first order an adapter of rank {rank} wins most in layer {best.layer}, {best.name}; rank {rank} holds "
        f"{percent(float(np.nanmean(shares)), 0)} of the gradients on average, of random matrices "
        f"{percent(float(np.mean(null)), 0)}."
    )
    found = [Finding("first-order gain", words, [best.layer], unusual=False)]
    flat = [i for i, one in enumerate(modules) if one.share is not None and one.share <= one.random_share < 1]
    if flat:
        layers = sorted({modules[i].layer for i in flat})
        names = ", ".join(f"{modules[i].layer} {modules[i].name}" for i in flat[:NAMED])
        more = f" and {len(flat) - NAMED} more" if len(flat) > NAMED else ""
        said = f"Rank {rank} holds no more of the gradient than of noise in {names}{more}."
        distance = nearest_robust_z(shares / null, flat)
        found.append(Finding("gradients of full rank", said, layers, distance=finite_or_none(distance)))
    return found


def _weights(weights: Sequence[MatrixSpectrum]) -> list[Finding]:
    if not weights:
        return []
    found = []
    broken = [one for one in weights if one.norm is None]
    empty = [one for one in weights if one.norm == 0]
    noise = [one for one in weights if one.norm and one.outliers == 0]
    # The largest squared singular value over that of noise with the norm of the matrix.
    largest = np.array([one.random_stable_rank / one.stable_rank if one.stable_rank else np.nan for one in weights])
    like_noise = finite_or_none(nearest_robust_z(largest, [i for i, one in enumerate(weights) if one in noise]))
    for kind, those, distance, words in (
        ("weights not finite", broken, None, "hold NaN or infinity"),
        ("weights of zero", empty, None, "are all zero"),
        ("weights like noise", noise, like_noise, "have no singular value above those of a random matrix of that size"),
    ):
        if those:
            layers = sorted({one.layer for one in those if one.layer is not None})
            said = f"{len(those)} of {len(weights)} matrices {words}: {_named(those)}."
            found.append(Finding(kind, said, layers, distance=distance))
    known = [one for one in weights if one.effective_rank is not None]
    if known:
        shares = [(one.effective_rank or 0.0) / one.random_effective_rank for one in known]
        low = known[int(np.argmin(shares))]
        words = (
            f"The effective rank of the weights is {percent(float(np.median(shares)), 0)} of that of random matrices "
            f"of their sizes (median), and lowest in {low.name}: {percent(min(shares), 0)}."
        )
        layers = [] if low.layer is None else [low.layer]
        found.append(Finding("effective rank", words, layers, unusual=False))
    return found


def _named(those: Sequence[MatrixSpectrum]) -> str:
    more = f" and {len(those) - NAMED} more" if len(those) > NAMED else ""
    return ", ".join(one.name for one in those[:NAMED]) + more


def _once(timeline: Timeline, name: str) -> np.ndarray | None:
    """The values of the first step, in which the probe was run."""
    if name not in timeline.columns or not len(timeline.steps):
        return None
    values = np.asarray(getattr(timeline, name), float)[0]
    return values if np.isfinite(values).any() else None
