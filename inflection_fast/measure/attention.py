"""Attention calls of training forwards, on their way to the quantities that listen to them.

A call is owned by a layer, gets its statistics once, whoever listens, and waits for others of its shape: more layers at
once are fewer operators. Several calls of self-attention by one layer in one forward add up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..ops import AttentionStats
from ..quantities.quantity import AttentionRows, AttentionSeen
from .attention_call import AttentionCall, stats_of
from .attention_sight import AttentionSight, See
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
        # Several where blocks share a module, or one runs repeatedly: which of them runs is known when it runs.
        self._owners: dict[nn.Module, set[int]] = {}
        for block in blocks:
            for module in block.module.modules():
                self._owners.setdefault(module, set()).add(block.index)
        self._decoders = decoder_layers(model, blocks)
        self._sight: AttentionSight | None = AttentionSight(blocks)
        self.sampler = RowSampler(rows, seed, device)
        self._indices = LayerIndices(device)
        self._layout = Layout()
        self.context: Context | None = None  # ranks that share sequences
        self._told = False  # which blocks have no attention
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
        self._blocks, self._owners, self._sight = [], {}, None

    @contextmanager
    def seeing(self, see: See) -> Iterator[None]:
        """Hand every attention call of the model to `see`."""
        if self._sight is not None:
            with self._sight.seeing(see):
                yield

    def see(
        self,
        micro_batch: MicroBatch,
        sums: StepSums,
        running: int | None,
        module: nn.Module | None,
        read: Callable[[], AttentionCall],
        *,
        forgives: bool,
    ) -> None:
        """Take the statistics of a call by `module`, which is of the block `running` or, where none is, of its owner.

        A call that cannot be measured is an error, even if only the device knows it, or costs values if it `forgives`.
        """
        with self._costs_attention_only(forgives):
            self._see(micro_batch, sums, running, module, read(), may_wait=not forgives)

    def end_forward(self, micro_batch: MicroBatch, sums: StepSums, *, forgives: bool) -> None:
        """Tell what is left of a forward, and complain of what went by unseen."""
        with self._costs_attention_only(forgives):
            self._refuse_unseen(micro_batch)
            self._add_up(micro_batch, sums)

    @contextmanager
    def _costs_attention_only(self, forgives: bool) -> Iterator[None]:
        """What cannot be measured of attention costs the quantities that listen to it, once a step was measured."""
        try:
            yield
        except Exception as error:
            if not forgives:
                raise
            for tap in ATTENTION_TAPS:
                for quantity in self._panel.listening(tap):
                    self._panel.fail(quantity.name, error, tap)

    def _see(
        self,
        micro_batch: MicroBatch,
        sums: StepSums,
        running: int | None,
        module: nn.Module | None,
        call: AttentionCall,
        *,
        may_wait: bool,
    ) -> None:
        owners = None if module is None else self._owners.get(module)
        if owners is None:
            return
        layer = running if running in owners else min(owners)
        if call.kind == "cross" and not self._panel.listening("on_cross_attention"):
            micro_batch.attended[layer] += 0  # which is attention all the same
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
            # Kept together with the starts: an id is unique only as long as its object lives.
            key, known = (length, number, id(call.cu_seqlens)), micro_batch.packed_strata
            if key not in known:
                known[key] = call.cu_seqlens, strata.within(call.cu_seqlens.to(strata.weights.device))
            strata = known[key][1]
        rows = None if strata.rows is None else strata.rows.to(call.query.device)
        # Not only without gradients: what autograd adds to the call of an operator is a fifth of its time.
        with torch.inference_mode():
            stats = stats_of(call, rows) if self.context is None else self.context.stats_of(call, rows)
            valid = micro_batch.valid_rows(call, rows, layer in self._decoders)
        listening = self._panel.listening("on_attention_call") if call.kind == "self" else []
        if listening:
            place = self._place(layer, heads, sums)
            seen = AttentionSeen(layer, place, call, rows, stats, valid, strata.weights)
            self._panel.tell("on_attention_call", listening, micro_batch.piece, seen)
        stats = stats._replace(lse=stats.entropy)  # no sum needs its memory
        micro_batch.waiting.append((layer, stats, valid, strata, number, call.kind))
        micro_batch.waiting_bytes += sum(field.nbytes for field in stats if field is not None)
        if micro_batch.waiting_bytes > WAITING_BYTES:
            self._add_up(micro_batch, sums)

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
        """`ValueError` if no block ran. Blocks that ran and whose attention went by unseen are named, once."""
        if not micro_batch.entered:
            raise ValueError(
                f"none of the blocks {[block.name for block in self._blocks]} ran: the model does not call them as "
                "modules; name modules that it calls (MonitorConfig.blocks)"
            )
        unseen = [self._blocks[layer].name for layer in sorted(micro_batch.entered - set(micro_batch.attended))]
        if unseen and not self._told:
            self._told = True
            logger.warning(
                "no softmax attention was seen in the blocks %s, so their entropy is NaN: they have none (Mamba, "
                "linear attention), or compute it otherwise than by a softmax",
                unseen,
            )

    def _add_up(self, micro_batch: MicroBatch, sums: StepSums) -> None:
        """Tell what waits."""
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
            listening = self._panel.listening(tap)
            self._panel.tell(tap, listening, micro_batch.piece, rows)
        micro_batch.waiting.clear()
        micro_batch.waiting_bytes = 0

    def _place(self, layer: int, heads: int, sums: StepSums) -> slice:
        """Where `heads` heads of a layer on this rank stand among those of all."""
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
