"""Statistics of the attention calls of training forwards, for the quantities that listen to them.

The statistics of a call are computed once for all quantities. Calls of equal shape are collected, because the sums of
several layers at once need fewer operators. Several self-attention calls of a layer in one forward are summed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..ops import AttentionStats
from ..quantities.quantity import AttentionRows, AttentionSeen
from .attention_call import AttentionCall, stats_of
from .attention_observer import AttentionObserver, Observe
from .context import Context, refuse_context
from .micro_batch import MicroBatch, decoder_layers
from .packet import StepSums
from .panel import Panel
from .ranks import Layout
from .schedule import LayerIndices, RowSampler, Strata

__all__ = ["ATTENTION_TAPS", "AttentionTaps", "rows_of"]

logger = logging.getLogger(__name__)

ATTENTION_TAPS = ("on_attention", "on_cross_attention", "on_attention_call")
WAITING_BYTES = 2**18  # of statistics of rows that wait to be added up


class AttentionTaps:
    """Sees the attention calls of one model, and tells them to the quantities of a panel."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], panel: Panel, rows: int | None, seed: int, device: torch.device
    ):
        self._blocks, self._panel = blocks, panel
        # Several where blocks share a module, or one runs repeatedly: which one it is shows when it runs.
        self._owners: dict[nn.Module, set[int]] = {}
        for block in blocks:
            for module in block.module.modules():
                self._owners.setdefault(module, set()).add(block.index)
        self._decoders = decoder_layers(model, blocks)
        self._observer: AttentionObserver | None = AttentionObserver(blocks)
        self.sampler = RowSampler(rows, seed, device)
        self._indices = LayerIndices(device)
        self._layout = Layout()
        self.context: Context | None = None  # ranks that share sequences
        self._warned = False  # about blocks without attention
        self.widest = 0  # heads of any call so far, on all ranks together

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks."""
        self._layout = layout
        self.sampler.share = (layout.data_rank, layout.data)

    def begin(self, step: int) -> None:
        """Draw the query rows of `step` from now on."""
        self.sampler.begin(step)

    def forget_model(self) -> None:
        """Hold nothing of the model any more."""
        self._blocks, self._owners, self._observer = [], {}, None

    @contextmanager
    def observing(self, observe: Observe) -> Iterator[None]:
        """Pass every attention call of the model to `observe`."""
        if self._observer is not None:
            with self._observer.observing(observe):
                yield

    def observe(
        self,
        micro_batch: MicroBatch,
        sums: StepSums,
        running: int | None,
        module: nn.Module | None,
        call: AttentionCall,
        *,
        may_wait: bool,
    ) -> None:
        """Compute the statistics of a call by `module`, of the block `running`, or else of the block that owns it."""
        owners = None if module is None else self._owners.get(module)
        if owners is None:
            return
        layer = running if running in owners else min(owners)
        if call.kind == "cross" and not self._panel.listening("on_cross_attention"):
            micro_batch.attended[layer] += 0  # the block has attention, though nobody listens to it
            return
        self._refuse(layer, call)
        if self.context is None:
            refuse_context()
        call = call.here(shares_sequences=self.context is not None)
        if may_wait:
            call.refuse_foreign_keys()
        batch, heads, length, _ = call.query.shape
        number = micro_batch.attended[layer]  # how many calls of this layer were before
        micro_batch.attended[layer] += 1
        if call.kind == "self":
            micro_batch.positions[layer] += batch * length
        if (length, number) not in micro_batch.strata:
            micro_batch.strata[length, number] = self.sampler.draw(length)
        strata = micro_batch.strata[length, number]
        if call.cu_seqlens is not None:
            # The starts are kept too: an id is unique only as long as its object lives.
            key, known = (length, number, id(call.cu_seqlens)), micro_batch.packed_strata
            if key not in known:
                known[key] = call.cu_seqlens, strata.within(call.cu_seqlens.to(strata.weights.device))
            strata = known[key][1]
        rows = None if strata.rows is None else strata.rows.to(call.query.device)
        # Not only no_grad: autograd's bookkeeping would be a fifth of the time of the call.
        with torch.inference_mode():
            stats = stats_of(call, rows) if self.context is None else self.context.stats_of(call, rows)
            finder = micro_batch.valid
            valid = None if finder is None else finder.of(call, rows, layer in self._decoders)
        if call.kind == "self" and self._panel.listening("on_attention_call"):
            place = self._place(layer, heads, sums)
            seen = AttentionSeen(layer, place, call, rows, stats, valid, strata.weights)
            self._panel.notify("on_attention_call", micro_batch.piece, seen)
        stats = stats._replace(lse=stats.entropy)  # no sum needs its memory
        micro_batch.waiting.append((layer, stats, valid, strata, number, call.kind))
        micro_batch.waiting_bytes += sum(field.nbytes for field in stats if field is not None)
        if micro_batch.waiting_bytes > WAITING_BYTES:
            self._add_up(micro_batch, sums)

    def end_forward(self, micro_batch: MicroBatch, sums: StepSums) -> None:
        """Sum the remaining calls of a forward, and warn about blocks without an observed call."""
        self._refuse_unseen(micro_batch)
        self._add_up(micro_batch, sums)

    @contextmanager
    def costs_attention_only(self, tolerates_errors: bool) -> Iterator[None]:
        """With `tolerates_errors` an error costs the values of the quantities that listen to attention."""
        try:
            yield
        except Exception as error:
            if not tolerates_errors:
                raise
            for tap in ATTENTION_TAPS:
                for quantity in self._panel.listening(tap):
                    self._panel.fail(quantity.name, error, tap)

    def _refuse(self, layer: int, call: AttentionCall) -> None:
        name = self._blocks[layer].name
        if call.query.dim() != 4:
            raise ValueError(
                f"attention of block {name!r}: expected queries [B, H, T, D], got shape {tuple(call.query.shape)}"
            )
        if call.query.dtype == torch.float64:
            raise TypeError(
                f"attention of block {name!r} is in float64, which no operator takes: train in float32 or 16 bits, or "
                "leave 'attention' out of MonitorConfig.quantities"
            )

    def _refuse_unseen(self, micro_batch: MicroBatch) -> None:
        """`ValueError` if no block ran. One warning names the blocks that ran without an observed attention."""
        if not micro_batch.entered:
            raise ValueError(
                f"none of the blocks {[block.name for block in self._blocks]} ran: the model does not call them as "
                "modules; name modules that it calls (MonitorConfig.blocks)"
            )
        unseen = [self._blocks[layer].name for layer in sorted(micro_batch.entered - set(micro_batch.attended))]
        if unseen and not self._warned:
            self._warned = True
            logger.warning(
                "no softmax attention was seen in the blocks %s, so their entropy is NaN: they have none (Mamba, "
                "linear attention), or compute it otherwise than by a softmax",
                unseen,
            )

    def _add_up(self, micro_batch: MicroBatch, sums: StepSums) -> None:
        """Pass the collected statistics to the quantities."""
        groups: dict[tuple, list[tuple]] = {}
        for entry in micro_batch.waiting:
            layer, stats, valid, strata, number, kind = entry
            sharded = layer in self._layout.sharded_heads
            groups.setdefault((stats.entropy.shape, sharded, id(valid), id(strata), number, kind), []).append(entry)
        for (shape, *_, kind), entries in groups.items():
            layers, stats, (valid, *_), (strata, *_), *_ = zip(*entries, strict=True)
            heads = self._place(layers[0], shape[1], sums)
            with torch.no_grad():
                rows = rows_of(layers, self._indices[layers], heads, stats, valid, strata)
            tap = "on_attention" if kind == "self" else "on_cross_attention"
            self._panel.notify(tap, micro_batch.piece, rows)
        micro_batch.waiting.clear()
        micro_batch.waiting_bytes = 0

    def _place(self, layer: int, heads: int, sums: StepSums) -> slice:
        """The place of this rank's `heads` heads of a layer among the heads of all ranks."""
        sharded = layer in self._layout.sharded_heads
        first = heads * self._layout.tensor_rank if sharded else 0
        everywhere = heads * (self._layout.tensor if sharded else 1)
        self.widest = max(self.widest, everywhere)
        if everywhere > sums.heads:
            if sums.fixed:
                raise ValueError(
                    f"block {self._blocks[layer].name!r} attends with {everywhere} heads; the first measured step "
                    f"saw at most {sums.heads} in any block"
                )
            sums.resize(everywhere)
        return slice(first, first + heads)


def rows_of(
    layers: tuple[int, ...],
    index: Tensor,
    heads: slice,
    stats: Sequence[AttentionStats],
    valid: Tensor | None,
    strata: Strata,
) -> AttentionRows:
    """The statistics of some layers as taps get them; see `AttentionRows`."""
    ignored = torch.stack([one.keys.to(index.device) for one in stats]) == 0  # [G, B, H, R]
    if valid is not None:
        ignored |= ~valid[:, None, :].to(index.device)
    return AttentionRows(layers, index, heads, stats, valid, ignored, strata.weights, strata.difference_weights)
