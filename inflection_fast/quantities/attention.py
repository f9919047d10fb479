"""Attention per head: entropy with standard error, largest logit, collision, sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..timeline.older import ENTROPY_COLLAPSE, LARGE_LOGIT, NOT_FINITE
from .quantity import Accumulator, AttentionRows, Column, Quantity, Sums

__all__ = ["Attention", "CrossAttention", "ProbeEntropy"]

_BY_HEAD = ("layer", "head")
# What is reported beside the mean entropy: of what else the rows have a mean, and the parts of the variance of the mean
# entropy, which is quadratic in that mean and so needs three sums (of dy^2, dy dv and dv^2).
_PARTS = ("collision", "sink", "yy", "yv", "vv")


class Attention(Quantity):
    """Means over valid query rows per layer and head, and the standard error of the mean entropy.

    The mean is the ratio of two estimated totals, entropy y and number v of valid rows, over all sequences, positions
    and micro-batches. Its standard error is that of the linearised residuals e = y - mean * v, one per sampled position
    (all sequences share the positions, so a position is one draw), by successive differences dy and dv.

    Memory: 40 bytes per layer and head in the packet, and the same once more for what has not gone back yet.
    """

    name = "attention"
    axes = {"part": _PARTS}
    accumulators = {
        "rows": Accumulator(_BY_HEAD, held="heads"),
        "entropy": Accumulator(_BY_HEAD, held="heads"),
        # float32: off by 6e-8 a micro-batch, where a standard error from 64 rows is itself known to a tenth
        "parts": Accumulator(("layer", "part", "head"), dtype="float32", held="heads"),
        "max_logit": Accumulator(_BY_HEAD, dtype="float32", join="max", held="heads"),
    }
    columns = {
        "entropy": Column(
            unit="nats",
            axes=_BY_HEAD,
            label="attention entropy",
            explanation="How widely attention is spread: 0 is a single token, the log of their number all alike.",
            count="rows",
            alerts=(ENTROPY_COLLAPSE, NOT_FINITE),
        ),
        "entropy_se": Column(
            unit="nats",
            axes=_BY_HEAD,
            label="standard error of the entropy",
            explanation="What the sampling of query rows leaves open; 0 where every row was measured.",
            count="rows",
        ),
        "max_logit": Column(
            unit="logit",
            axes=_BY_HEAD,
            label="largest attention logit",
            explanation="The largest score before the softmax. One that keeps growing often precedes instability.",
            count="rows",
            alerts=(LARGE_LOGIT,),
        ),
        "collision": Column(
            unit="probability",
            axes=_BY_HEAD,
            label="attention collision",
            explanation="The chance that two draws from a token's attention hit the same token; 1 is a single token.",
            count="rows",
        ),
        "sink": Column(
            unit="probability",
            axes=_BY_HEAD,
            label="attention on the first token",
            explanation="The share of attention on the first token, where models park attention that they do not need.",
            count="rows",
        ),
    }

    def on_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """Add the statistics of some layers."""
        # Few passes over few large tensors: each one is a kernel launch, or a team of threads to wake.
        fields = rows.over_batch(rows.stacked("entropy", "collision", "sink"))  # [3, G, H, R]
        v = rows.counted()[None]  # [1, G, H, R]
        totals = torch.cat([v, fields]) @ rows.weights  # [4, G, H]
        sums["rows"][:, rows.heads].index_add_(0, rows.index, totals[0])
        sums["entropy"][:, rows.heads].index_add_(0, rows.index, totals[1])
        parts = totals[2:]
        if len(rows.difference_weights):
            dy, dv = fields[:1].diff(dim=-1), v.diff(dim=-1)
            squares = torch.cat([dy * dy, dy * dv, dv * dv]) @ rows.difference_weights
            parts = torch.cat([parts, squares])
        of_parts = sums["parts"][:, : len(parts), rows.heads]
        of_parts.index_add_(0, rows.index, parts.transpose(0, 1).float())
        highest = rows.stacked("max_logit")[0].masked_fill_(rows.ignored, -torch.inf).amax((1, 3))
        of_heads = sums["max_logit"][:, rows.heads]
        of_heads[rows.index] = torch.maximum(of_heads[rows.index], highest)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means, and the standard error of a ratio of two estimated totals, linearised at the mean."""
        part = dict(zip(_PARTS, np.moveaxis(sums["parts"], 1, 0), strict=True))
        mean = sums["entropy"] / sums["rows"]
        variance = part["yy"] - 2 * mean * part["yv"] + mean**2 * part["vv"]
        return {
            "entropy": mean,
            "entropy_se": np.sqrt(np.maximum(variance, 0)) / sums["rows"],  # a sum of squares, but for rounding
            "max_logit": sums["max_logit"],
            "collision": part["collision"] / sums["rows"],
            "sink": part["sink"] / sums["rows"],
        }


class CrossAttention(Attention):
    """The same for cross attention, in separate columns; NaN in layers without it."""

    name = "cross_attention"
    columns = {
        f"cross_{name}": replace(column, label=f"cross attention: {column.label}", alerts=())
        for name, column in Attention.columns.items()
    }
    on_attention = Quantity.on_attention  # is not listened to
    on_cross_attention = Attention.on_attention

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """As of self-attention."""
        return {f"cross_{name}": value for name, value in super().values(sums).items()}


class ProbeEntropy(Quantity):
    """The mean entropy on the probe set, on the same query rows every time, so that it is comparable over steps."""

    name = "probe_entropy"
    data = "probe"
    accumulators = {"rows": Accumulator(_BY_HEAD, held="heads"), "entropy": Accumulator(_BY_HEAD, held="heads")}
    columns = {
        "probe_entropy": Column(
            unit="nats",
            axes=_BY_HEAD,
            label="attention entropy on the probe",
            explanation="Entropy on a fixed set of texts, so that only the model changes from step to step.",
            count="rows",
        )
    }

    def on_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """Add the entropies of some layers."""
        fields = torch.cat([rows.counted()[None], rows.over_batch(rows.stacked("entropy"))]) @ rows.weights
        for name, of_layers in zip(("rows", "entropy"), fields, strict=True):
            sums[name][:, rows.heads].index_add_(0, rows.index, of_layers)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The mean."""
        return {"probe_entropy": sums["entropy"] / sums["rows"]}
