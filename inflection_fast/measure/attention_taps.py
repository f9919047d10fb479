"""What the attention of the blocks adds up to, from the calls that are seen during training forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..blocks import Block
from .accumulators import HeadMeans, LayerIndices
from .attention import AttentionCall, AttentionSight, See, stats_of
from .distributed import Layout
from .micro_batch import MicroBatch
from .rows import decoder_layers
from .schedule import RowSampler

__all__ = ["AttentionTaps"]

logger = logging.getLogger(__name__)

WAITING_BYTES = 2**18  # of statistics of rows that wait to be added up: more layers at once are fewer operators


class AttentionTaps:
    """Sees attention calls and adds their statistics up, for the layers and heads of one model."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        rows: int | None,
        seed: int,
        device: torch.device,
        allocate: Callable[[int], None],  # makes memory for that many heads, and calls `write_into`
    ):
        self._blocks, self._allocate = blocks, allocate
        self._owner = {module: block.index for block in blocks for module in block.module.modules()}
        self._decoders = decoder_layers(model, blocks)
        self._sight: AttentionSight | None = AttentionSight(blocks)
        self._sampler = RowSampler(rows, seed, device)
        self._indices = LayerIndices(device)
        self._layout = Layout()
        self._heads: int | None = None
        self._told = False  # which blocks have no attention
        self._means: dict[bool, HeadMeans] = {}  # by whether the heads of the layer are divided among ranks

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks."""
        self._layout = layout
        self._sampler.share = (layout.data_rank, layout.data)

    def begin(self, step: int) -> None:
        """Draw the query rows of `step` from now on."""
        self._sampler.begin(step)

    def forget_model(self) -> None:
        """Hold nothing of the model any more."""
        self._blocks, self._owner, self._sight = [], {}, None

    def write_into(self, heads: int, means_of: Callable[[slice], HeadMeans]) -> None:
        """Add up in `means_of(part)`, views of the heads `part` out of `heads` on all ranks together."""
        self._heads = heads
        here = heads // self._layout.tensor
        first = here * self._layout.tensor_rank
        self._means = {False: means_of(slice(None)), True: means_of(slice(first, first + here))}

    @contextmanager
    def seeing(self, see: See) -> Iterator[None]:
        """Hand every attention call of the model to `see`."""
        with self._sight.seeing(see):
            yield

    def see(
        self,
        micro_batch: MicroBatch,
        running: int | None,
        module: nn.Module | None,
        call: AttentionCall,
        *,
        may_wait: bool,
    ) -> None:
        """Take the statistics of a call by `module`, or where that is not known by the block that is `running`.

        `may_wait`: a call that cannot be measured is an error even if only the device knows; else its values are NaN.
        """
        layer = self._owner.get(module)
        if layer is None or call.kind != "self":
            return
        if running is not None:  # which of the blocks that share the module
            layer = running
        if call.query.dim() != 4:
            raise ValueError(
                f"attention of block {self._blocks[layer].name!r}: expected queries [B, H, T, D], got shape "
                f"{tuple(call.query.shape)}"
            )
        if call.query.dtype == torch.float64:
            raise TypeError(
                f"attention of block {self._blocks[layer].name!r} is in float64, which no operator takes: train "
                "in float32 or 16 bits, or leave 'attention' out of MonitorConfig.signals"
            )
        call = call.here()
        if may_wait:
            call.refuse_foreign_keys()
        length = call.query.shape[2]
        micro_batch.positions[layer] = micro_batch.positions.get(layer, 0) + len(call.query) * length
        if length not in micro_batch.strata:
            micro_batch.strata[length] = self._sampler.draw(length)
        strata = micro_batch.strata[length]
        rows = None if strata.rows is None else strata.rows.to(call.query.device)
        # Not only without gradients: what autograd adds to the call of an operator is a fifth of its time.
        with torch.inference_mode():
            stats = stats_of(call, rows)._replace(lse=None)  # which no sum needs
            valid = micro_batch.valid.of(call, rows, layer in self._decoders)
        micro_batch.attended.add(layer)
        micro_batch.waiting.setdefault(layer, []).append((stats, valid, strata))
        micro_batch.waiting_bytes += sum(field.nbytes for field in stats if field is not None)
        if micro_batch.waiting_bytes > WAITING_BYTES:
            self.add_up(micro_batch)

    def refuse_unseen(self, micro_batch: MicroBatch) -> None:
        """`ValueError` if no block ran. Blocks that ran and whose attention went by unseen are named, once."""
        if not micro_batch.entered:
            raise ValueError(
                f"none of the blocks {[block.name for block in self._blocks]} ran: the model does not call them as "
                "modules; name modules that it calls (MonitorConfig.blocks)"
            )
        unseen = [self._blocks[layer].name for layer in sorted(micro_batch.entered - micro_batch.attended)]
        if unseen and not self._told:
            self._told = True
            logger.warning(
                "no softmax attention was seen in the blocks %s, so their entropy is NaN: they have none (Mamba, "
                "linear attention), or compute it otherwise than by a softmax",
                unseen,
            )

    def add_up(self, micro_batch: MicroBatch) -> None:
        """Add what waits to the sums."""
        # Layers of a group are distinct: of several calls by one layer, the first ones go together, then the second.
        groups: dict[tuple, list[tuple[int, tuple]]] = {}
        for layer, calls in micro_batch.waiting.items():
            sharded = layer in self._layout.sharded_heads
            for number, call in enumerate(calls):
                stats, valid, strata = call
                key = (stats.entropy.shape, sharded, id(valid), id(strata), number)
                groups.setdefault(key, []).append((layer, call))
        with torch.no_grad():
            for (shape, sharded, *_), members in groups.items():
                layers = [layer for layer, _ in members]
                self._check_heads(layers, shape[1] * (self._layout.tensor if sharded else 1))
                _, valid, strata = members[0][1]
                stats = [call[0] for _, call in members]
                self._means[sharded].push(self._indices[tuple(layers)], stats, valid, strata)
        micro_batch.added = True
        micro_batch.waiting.clear()
        micro_batch.waiting_bytes = 0

    def _check_heads(self, layers: list[int], heads: int) -> None:
        if self._heads is None:
            self._allocate(heads)
        if heads != self._heads:
            raise ValueError(
                f"block {self._blocks[layers[0]].name!r} attends with {heads} heads, others with "
                f"{self._heads}; measure blocks with equally many heads (MonitorConfig.blocks)"
            )
