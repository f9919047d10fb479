"""The rank of attention matrices: collapsed heads and lazy layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from .. import ops
from .arguments import check_count
from .calls import combined_mask
from .quantity import Accumulator, AlertRule, AttentionSeen, BlockForward, Column, MeasuredModel, Quantity, Sums

__all__ = ["LAZY_RANK", "Rank"]

LAZY_RANK = 1.5  # a mean k* below it: one singular value holds 90 % of most attention matrices of the head
_SUMS = ("sequences", "k", "k_sequences", "stable", "column_mass")


_of_head = partial(Column, "1", ("layer", "head"))
_of_layer = partial(Column, "1", ("layer",))


class Rank(Quantity):
    """Singular values s_1 >= s_2 >= ... of the attention matrices A of every head, on sequences of the probe set.

    * `rank_k90`: k*, the least k with s_1^2 + ... + s_k^2 >= 0.90 ||A||_F^2 (arXiv 2404.08634), mean over sequences;
    * `rank_stable`: ||A||_F^2 / s_1^2, mean over sequences;
    * `column_mass`: largest share of one column in ||A||_F^2, mean over sequences: rank one by a column (a sink) has 1,
      rank one by uniform attention 1 / T;
    * `rank_max`: the largest `rank_k90` over the heads of a layer; near 1 the layer is lazy;
    * `lazy_heads`: share of a layer's heads with a `rank_k90` below 1.5.

    A is never formed; `ops.attention_rank` says how, to what accuracy, and when k* is missing (above 1024 tokens, where
    k* exceeds 256). Only self-attention with as many keys as queries counts, and of a block's calls the first.

    Cost: per head and sequence of T tokens, 2 T^3 operations up to T = 1024, beyond about 1500 T^2; on a GPU each call
    waits for it. So the cadence is every 500 steps where `MonitorConfig.every` is one number. Memory: 40 bytes per head
    in the packet; while it runs the queries and keys of one block, and strips of 8 MiB.

    Args:
        sequences: how many sequences of each probe batch are looked at.
        every: cadence in steps; None: as `MonitorConfig.every`.
    """

    name = "rank"
    data = "probe"
    accumulators = {name: Accumulator(("layer", "head"), held="heads") for name in _SUMS}
    columns = {
        "rank_k90": _of_head(
            "rank k* of attention",
            "Least number of singular values with 90 % of the squared norm of the attention matrix.",
            drawn="heatmap",
            count="k_sequences",
        ),
        "rank_stable": _of_head(
            "stable rank of attention",
            "Squared Frobenius norm of the attention matrix over its largest squared singular value.",
            count="sequences",
        ),
        "column_mass": _of_head(
            "single-column mass",
            "Largest share of one key in the squared Frobenius norm of the attention matrix.",
            count="sequences",
        ),
        "rank_max": _of_layer(
            "largest rank k* of a layer",
            "Largest k* over the heads of a layer; near 1 every head of the layer has collapsed.",
            alerts=(
                AlertRule(
                    "falls_below",
                    LAZY_RANK,
                    kind="lazy_layer",
                    words="all heads of {place} have collapsed to rank one: largest k* {value:.3g}, below {limit:.3g}",
                    measurements=1,
                ),
            ),
        ),
        "lazy_heads": _of_layer("share of lazy heads", "Share of a layer's heads whose mean k* is below 1.5."),
    }

    def __init__(self, sequences: int = 4, every: int | None = 500):
        check_count("sequences", sequences)
        check_count("every", every, optional=True)
        self.sequences, self.every = sequences, every

    def prepare(self, model: MeasuredModel) -> None:
        """Begin without a call."""
        self._call: tuple[int, AttentionSeen] | None = None

    def on_attention_call(self, sums: Sums, seen: AttentionSeen) -> None:
        """Keep the call until the block ends, where its tokens are known."""
        if self._call is None or self._call[0] != seen.layer:
            query, key = seen.call.query, seen.call.key
            if seen.call.logits is None and query.shape[2] == key.shape[2]:
                self._call = (seen.layer, seen)

    def on_block(self, sums: Sums, block: BlockForward) -> None:
        """Add the ranks of the call of this block."""
        kept, self._call = self._call, None
        if kept is None or kept[0] != block.layer:
            return
        seen, tokens = kept[1], block.tokens
        call, n = seen.call, self.sequences
        if call.cu_seqlens is not None:
            raise ValueError(
                "rank: sequences packed into one row have no separate attention matrices; give the probe unpacked"
            )
        query, key = call.query[:n].detach(), call.key[:n].detach()
        valid = None
        if tokens is not None and tokens.shape == (call.query.shape[0], query.shape[2]):
            valid = tokens[:n]
        found = ops.attention_rank(
            query,
            key,
            attn_mask=_first(combined_mask(call), n),
            is_causal=call.is_causal,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=None if call.sinks is None else call.sinks.detach(),
            valid=valid,
        )
        known = ~found.k.isnan()
        fields = {
            "sequences": torch.ones_like(found.stable),
            "k": found.k.masked_fill(~known, 0.0),
            "k_sequences": known.to(found.k.dtype),
            "stable": found.stable,
            "column_mass": found.column_mass,
        }
        for name, values in fields.items():
            place = sums[name][block.layer, seen.heads]
            place += values.sum(0).to(place.device, non_blocking=True)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over sequences, and what they say about layers."""
        k = sums["k"] / sums["k_sequences"]
        known = np.isfinite(k)
        largest = np.where(known.any(-1), np.max(k, -1, initial=-np.inf, where=known), np.nan)
        measured = sums["sequences"] > 0
        lazy = (known & (k < LAZY_RANK)).sum(-1) / measured.sum(-1)
        return {
            "rank_k90": k,
            "rank_stable": sums["stable"] / sums["sequences"],
            "column_mass": sums["column_mass"] / sums["sequences"],
            "rank_max": np.where((known == measured).all(-1), largest, np.nan),  # one unknown may be the largest
            "lazy_heads": lazy,
        }


def _first(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return mask[:count] if mask is not None and mask.ndim == 4 and mask.shape[0] > 1 else mask
