"""Attention per head: entropy relative to its maximum, sinks, and norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .quantity import Accumulator, AttentionRows, AttentionSeen, Column, Quantity, Sums

__all__ = ["SINK", "AttentionDetail"]

SINK = 0.3  # mean probability of the first key above which a head is a sink (arXiv 2410.10781)
_BY_HEAD = ("layer", "head")


def _of_head(label: str, explanation: str, count: str) -> Column:
    return Column(unit="1", axes=_BY_HEAD, label=label, explanation=explanation, count=count)


class AttentionDetail(Quantity):
    """Means over the valid query rows that are sampled, beside what the quantity `attention` has.

    * `entropy_ratio`: entropy / log(keys) of a row, over rows that attend two keys or more: 1 is uniform attention,
      whatever the position of the row;
    * `sink_heads`: share of a layer's heads whose mean probability of the first key (or of the sink column) is above
      0.3 (Gu et al. 2024, arXiv 2410.10781);
    * `query_norm`, `key_norm`: mean ||q|| and ||k|| as attention gets them, after position embeddings and norms, at the
      positions of the rows; of a key head that serves several query heads, the same number for each of them.

    Cost: a few operations on [layers, batch, heads, rows], and the sampled rows of queries and keys. Memory: 56 bytes
    per layer and head.
    """

    name = "attention_detail"
    accumulators = {
        name: Accumulator(_BY_HEAD, held="heads")
        for name in ("rows", "sink", "ratio", "ratio_rows", "query", "key", "tokens")
    }
    columns = {
        "entropy_ratio": _of_head(
            "entropy over its largest value",
            "Attention entropy over the logarithm of the number of keys, mean over rows with two keys or more.",
            "ratio_rows",
        ),
        "sink_heads": Column(
            unit="1",
            axes=("layer",),
            label="share of heads that are sinks",
            explanation="Share of a layer's heads that give more than 0.3 of their attention to the first key.",
        ),
        "query_norm": _of_head("norm of queries", "Norm of a query as attention gets it, mean over tokens.", "tokens"),
        "key_norm": _of_head("norm of keys", "Norm of a key as attention gets it, mean over tokens.", "tokens"),
    }

    def on_attention(self, sums: Sums, rows: AttentionRows) -> None:
        """Add the rows of some layers."""
        entropy, keys, sink = rows.stacked("entropy", "keys", "sink")
        several = keys > 1
        ratio = torch.where(several, entropy / keys.clamp(min=2.0).log(), 0.0)
        fields = rows.total(torch.stack([sink, ratio, several.to(ratio.dtype)]))
        for name, of_layers in zip(("rows", "sink", "ratio", "ratio_rows"), (rows.number(), *fields), strict=True):
            sums[name][:, rows.heads].index_add_(0, rows.index, of_layers)

    def on_attention_call(self, sums: Sums, seen: AttentionSeen) -> None:
        """Add the norms of one call."""
        call = seen.call
        if call.logits is not None or call.query.shape[2] != call.key.shape[2]:
            return
        query, key = (_norms(x, seen.rows) for x in (call.query, call.key))  # [B, H, R], [B, Hkv, R]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        weights = seen.weights.expand(query.shape[0], -1)  # [B, R]
        if seen.valid is not None:
            weights = weights.masked_fill(~seen.valid, 0.0)
            query, key = (x.masked_fill(~seen.valid[:, None], 0.0) for x in (query, key))
        for name, norms in (("query", query), ("key", key)):
            place = sums[name][seen.layer, seen.heads]
            place += (norms.double() * weights[:, None]).sum((0, 2)).to(place.device, non_blocking=True)
        place = sums["tokens"][seen.layer, seen.heads]
        place += weights.sum().to(place.device, non_blocking=True)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over rows, and how many heads are sinks."""
        measured = sums["rows"] > 0
        sinks = (measured & (sums["sink"] / sums["rows"] > SINK)).sum(-1)
        return {
            "entropy_ratio": sums["ratio"] / sums["ratio_rows"],
            "sink_heads": sinks / np.where(measured.any(-1), measured.sum(-1), np.nan),
            "query_norm": sums["query"] / sums["tokens"],
            "key_norm": sums["key"] / sums["tokens"],
        }


def _norms(x: Tensor, rows: Tensor | None) -> Tensor:
    x = x.detach()
    x = x if rows is None else x.index_select(2, rows)
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32 if x.dtype != torch.float64 else None)
