"""What the attention of the blocks adds up to, from the calls that are seen during training forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..blocks import Block
from .accumulators import HeadMeans, LayerIndices
from .attention import AttentionCall, See, interfaces_of, seeing_interfaces, seeing_sdpa, stats_of
from .distributed import Layout
from .micro_batch import MicroBatch
from .rows import decoder_layers
from .schedule import RowSampler

__all__ = ["AttentionTaps"]

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
        seen = [interfaces_of(block.module) for block in blocks]
        self._interfaces = list({id(one): one for found in seen for one in found}.values())
        self._needs_sdpa = not all(seen)
        self._sampler = RowSampler(rows, seed, device)
        self._indices = LayerIndices(device)
        self._layout = Layout()
        self._heads: int | None = None
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
        self._blocks, self._owner, self._interfaces = [], {}, []

    def write_into(self, heads: int, means_of: Callable[[slice], HeadMeans]) -> None:
        """Add up in `means_of(part)`, views of the heads `part` out of `heads` on all ranks together."""
        self._heads = heads
        here = heads // self._layout.tensor
        first = here * self._layout.tensor_rank
        self._means = {False: means_of(slice(None)), True: means_of(slice(first, first + here))}

    @contextmanager
    def seeing(self, see: See) -> Iterator[None]:
        """Hand every attention call of the model to `see`."""
        with ExitStack() as stack:
            if self._interfaces:
                stack.enter_context(seeing_interfaces(self._interfaces, see))
            if self._needs_sdpa:
                stack.enter_context(seeing_sdpa(see))
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
        layer = running if module is None else self._owner.get(module)
        # The first attention of a block is its self-attention; what follows is cross-attention, or torch's SDPA under
        # an attention that was seen above it.
        if layer is None or layer in micro_batch.attended:
            return
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
        micro_batch.positions[layer] = len(call.query) * length
        if length not in micro_batch.strata:
            micro_batch.strata[length] = self._sampler.draw(length)
        strata = micro_batch.strata[length]
        rows = None if strata.rows is None else strata.rows.to(call.query.device)
        # Not only without gradients: what autograd adds to the call of an operator is a fifth of its time.
        with torch.inference_mode():
            stats = stats_of(call, rows)._replace(lse=None)  # which no sum needs
            valid = micro_batch.valid.of(call, rows, layer in self._decoders)
        micro_batch.attended.add(layer)
        micro_batch.waiting[layer] = (stats, valid, strata)
        micro_batch.waiting_bytes += sum(field.nbytes for field in stats if field is not None)
        if micro_batch.waiting_bytes > WAITING_BYTES:
            self.add_up(micro_batch)

    def refuse_unseen(self, micro_batch: MicroBatch) -> None:
        """`ValueError` if blocks ran whose attention went by unseen."""
        unseen = [self._blocks[layer].name for layer in sorted(micro_batch.entered - micro_batch.attended)]
        if unseen or not micro_batch.entered:
            where = f"in the blocks {unseen}" if unseen else "in any block (none of them ran)"
            raise ValueError(
                f"no attention was seen {where}: it goes neither through Transformers' attention interface nor through "
                "torch's scaled_dot_product_attention. Choose an attention implementation that does, name other blocks "
                "(MonitorConfig.blocks), or leave 'attention' out of MonitorConfig.signals"
            )

    def add_up(self, micro_batch: MicroBatch) -> None:
        """Add what waits to the sums."""
        groups: dict[tuple, list[int]] = {}
        for layer, (stats, valid, strata) in micro_batch.waiting.items():
            sharded = layer in self._layout.sharded_heads
            groups.setdefault((stats.entropy.shape, sharded, id(valid), id(strata)), []).append(layer)
        with torch.no_grad():
            for (shape, sharded, _, _), layers in groups.items():
                self._check_heads(layers, shape[1] * (self._layout.tensor if sharded else 1))
                _, valid, strata = micro_batch.waiting[layers[0]]
                stats = [micro_batch.waiting[layer][0] for layer in layers]
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
