"""Several processes that train one model: what each holds, and how their sums become those of the whole step.

Every rank sums what it holds. `Layout.weigh` scales these sums so that their sum over ranks has the values of one
process on the whole batch, whose loss is the mean of the ranks' losses:

* replicated values (parameters, activations under tensor parallelism) have the weight 1 / copies;
* squares of shards add;
* activation gradients are those of the rank's own loss, which enters the mean with 1 / data ranks: squares with
  1 / data^2. Gradients of parameters were averaged by DDP or FSDP before they are read.

`Ranks.join` is one all-reduce of the sums and one of the maxima, on the host, in a gloo group of its own, in the
recorder's thread. So it does not delay the training's collectives and needs no device memory (a second NCCL
communicator takes hundreds of MiB), and a lost rank costs a bounded wait, where NCCL's watchdog would end the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .. import ops
from ..blocks import Block
from ..quantities import Step
from ..quantities.dtensors import local_of, sharded_over
from ..quantities.quantity import Accumulator
from .packet import Fields, Packet
from .panel import FAILED, MACHINERY
from .placements import BatchMesh

__all__ = ["Join", "Layout", "Ranks", "world_size"]

logger = logging.getLogger(__name__)


def world_size() -> int:
    """The number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Layout:
    """How `world` ranks divide the work: `data` groups with batches of their own, of `world / data` ranks each."""

    world: int = 1
    data: int = 1
    data_rank: int = 0
    tensor_rank: int = 0  # among the ranks that share one batch
    stages: int = 1  # of a pipeline, with different blocks; each has `world / stages` ranks
    sharded_heads: frozenset[int] = frozenset()  # layers whose heads are sharded over the ranks of a batch
    writes: bool = True  # this rank writes the file

    @property
    def tensor(self) -> int:
        """The number of ranks of one stage that share a batch."""
        return self.world // (self.data * self.stages)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its stage (without stages: of all)."""
        return self.data_rank == self.tensor_rank == 0

    def parameter_squares(self, gradients: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """[max(layers) + 1] float64: this rank's part of the squared norm of each layer's gradient.

        The parts of all ranks add up to the squared norm, of sharded and of replicated gradients.
        """
        weights = [sharded_over(gradient) * self.stages / self.world for gradient in gradients]
        distinct = sorted(set(weights))
        groups = [layer * len(distinct) + distinct.index(weight) for layer, weight in zip(layers, weights, strict=True)]
        squares = ops.sum_of_squares([local_of(gradient) for gradient in gradients], groups)
        missing = -len(squares) % len(distinct)  # the last layer may have no gradient of the last weight
        squares = torch.cat([squares, squares.new_zeros(missing)]).view(-1, len(distinct))
        # Python floats: a tensor of weights would be a copy from the host.
        first, *others = (weight * of_weight for weight, of_weight in zip(distinct, squares.unbind(1), strict=True))
        return sum(others, first)

    def weigh(self, packet: Packet, sharded_outputs: Collection[int], probed: Collection[str]) -> None:
        """Scale the local sums of a step so that they add up over the ranks; see `Accumulator.held`.

        Args:
            packet: on the host.
            sharded_outputs: layers whose output is split over the ranks of one batch; the others' is on all of them.
            probed: quantities whose taps listen to the probe set, which all ranks run as a whole.
        """
        for field in packet.fields.all:
            accumulator = field.accumulator
            if accumulator.join == "sum" and accumulator.held != "part":
                view = packet[field.quantity][field.name]
                weight = self._weight(accumulator, view, sharded_outputs, probed=field.quantity in probed)
                # Values of weight 0 may be NaN.
                view.copy_(torch.where(weight == 0, 0.0, view.double() * weight))

    def _weight(self, accumulator: Accumulator, view: Tensor, outputs: Collection[int], *, probed: bool) -> Tensor:
        by_layer = accumulator.axes[:1] == ("layer",)
        weight = torch.ones(len(view) if by_layer else 1, dtype=torch.float64)
        if accumulator.held == "alike":  # of a layer: from the first rank of its stage
            weight *= self.leads if by_layer else self.writes
        else:
            weight /= self.tensor
            for layer in {"heads": self.sharded_heads, "output": outputs}.get(accumulator.held, ()) if by_layer else ():
                weight[layer] = 1.0
            # All ranks run the whole probe; in the training each of `data` groups has its own batch and loss.
            weight *= (self.data_rank == 0) if probed else float(self.data) ** -accumulator.gradient_power
        return weight.view(-1, *(1,) * (view.dim() - 1)) if accumulator.axes else weight[0]


class Ranks:
    """The processes that measure together. The constructor is a collective call.

    Args:
        model: its DTensor parameters tell which ranks share a batch.
        timeout_s: how long to wait for the others, here and in every `join`.

    Raises:
        RuntimeError: a rank did not call it within the timeout.
    """

    def __init__(self, model: nn.Module, timeout_s: float):
        self._timeout = timedelta(seconds=timeout_s)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.lost = False
        self._mesh = BatchMesh(model)
        try:
            self.group = dist.new_group(backend="gloo", timeout=self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"Monitor: the {self._world} ranks did not all enter it within {timeout_s:g} s; enter it on every rank"
            ) from error

    @property
    def writes(self) -> bool:
        """Whether this rank writes the file."""
        return self._rank == 0

    @property
    def divide_batches(self) -> bool:
        """Whether several ranks compute on one batch."""
        return len(self._mesh.peers) > 1

    def all_gather(self, value: object) -> list:
        """The values of all ranks, in their order."""
        gathered: list = [None] * self._world
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def agree(
        self,
        blocks: Sequence[Block],
        facts: Mapping[str, object],
        folder: Path | None,
        error: str | None = None,
        pipeline: Sequence[int] | None = None,
    ) -> tuple[Layout, Path | None]:
        """Check that all ranks measure the same, and return the layout and the folder of rank 0.

        Args:
            blocks: of the model.
            facts: what must be equal on all ranks, by name.
            folder: of the timeline; that of rank 0 counts.
            error: why this rank cannot measure; then none does.
            pipeline: ranks with the stages of this rank's pipeline; None: there is none.

        Raises:
            ValueError: ranks differ, or one of them has an error; on all ranks alike.
        """
        stages = tuple(pipeline or [self._rank])
        gathered = self.all_gather((facts, error, min(self._mesh.peers), stages, folder))
        for rank, (_, failed, *_) in enumerate(gathered):
            if failed is not None:
                raise ValueError(failed if rank == self._rank else f"rank {rank}: {failed}")
        for name in facts:
            values = [other[name] for other, *_ in gathered]
            if any(value != values[0] for value in values):
                rank = next(i for i, value in enumerate(values) if value != values[0])
                raise ValueError(
                    f"{name} must be equal on all ranks, and is {values[0]!r} on rank 0 and {values[rank]!r} on rank "
                    f"{rank}; where ranks have different blocks, give the schedule: Monitor(stage, pipeline=schedule)"
                )
        # The ranks of a pipeline, and of its stages, work on one batch.
        batch_of = [min(gathered[peer][2] for peer in stages) for _, _, _, stages, _ in gathered]
        batches = sorted(set(batch_of))
        layout = Layout(
            self._world,
            len(batches),
            batches.index(batch_of[self._rank]),
            self._mesh.peers.index(self._rank),
            len(stages),
            frozenset(block.index for block in blocks if self._mesh.shards_attention(block.module)),
            writes=self.writes,
        )
        return layout, gathered[0][-1]

    def join(self, step: int, packet: Packet, *, dropped: bool = False) -> bool:
        """Turn the weighted sums and the maxima of this rank, on the host, into those of all ranks.

        Once a rank is lost or at another step, it returns False, leaves the packet unchanged and does not wait again;
        one warning is logged. `LookupError` if some rank has `dropped` its packet of this step.
        """
        if self.lost:
            return False
        sums = torch.cat([packet.sums, packet.parts.double()])
        # The step is sent too, as maximum and minimum: ranks that are out of step must not be added.
        maxima = torch.cat([packet.maxima.double(), torch.tensor([step, -step, dropped], dtype=torch.float64)])
        try:
            works = [
                dist.all_reduce(sums, dist.ReduceOp.SUM, group=self.group, async_op=True),
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group, async_op=True),
            ]
            for work in works:
                work.wait(self._timeout)
        except RuntimeError as error:
            self._lose(f"a rank did not answer at step {step} ({str(error).splitlines()[0]})")
            return False
        last, first, dropped = int(maxima[-3]), -int(maxima[-2]), bool(maxima[-1])
        if first != last:
            self._lose(f"ranks are out of step: one measures step {first}, another step {last}")
            return False
        if dropped:
            raise LookupError("a rank has dropped its part")
        packet.sums.copy_(sums[: len(packet.sums)])
        packet.parts.copy_(sums[len(packet.sums) :])
        packet.maxima.copy_(maxima[:-3])
        return True

    def _lose(self, reason: str) -> None:
        self.lost = True
        logger.warning(
            "%s; from here on rank %d of %d measures its own share of the batch only, and norms over all ranks are NaN",
            reason,
            self._rank,
            self._world,
        )


@dataclass(frozen=True)
class Join:
    """The `join` of a `Recorder`: for every step the packet of this rank becomes that of all ranks."""

    ranks: Ranks
    layout: Layout
    fields: Fields  # layout of the packets of all ranks
    probed: Collection[str]  # see `Layout.weigh`
    warn: Callable[[str, str], None]

    def __call__(self, step: int, packet: Packet | None, sharded_outputs: Collection[int] = ()) -> int:
        """Join `packet` in place; None: it was dropped here, and the call is made so that other ranks do not wait.

        Returns:
            The number of ranks whose sums are missing: all others, once one is lost.

        Raises:
            LookupError: some rank has dropped its packet, so the step has no row.
        """
        if packet is None:
            self.ranks.join(step, Packet(self.fields), dropped=True)
            return 0
        here = bool((packet[MACHINERY][FAILED] != 0).any())
        self.layout.weigh(packet, sharded_outputs, self.probed)
        if not self.ranks.join(step, packet):
            return self.layout.world - 1
        failed = packet[MACHINERY][FAILED]
        if (failed != 0).any() and not here:
            which = "its" if (failed != 0).all() else "some of its"
            self.warn("failure", f"measured step {step} failed on another rank; {which} values are NaN")
        elif not (failed != 0).any() and packet[Step.name]["forwards"] == 0:
            self.warn("unseen", f"measured step {step} saw no training forward of the monitored model on any rank")
        return 0
