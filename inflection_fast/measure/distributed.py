"""Several processes that train one model: who holds what, and how their sums become those of the whole step.

Every rank adds up what it holds itself. `Layout.weigh` scales those local sums so that plain addition over all ranks
gives the numbers of one process on the whole batch, whose loss is the mean of the ranks' losses:

* what several ranks hold alike (replicated parameters, activations under tensor parallelism) counts once: 1 / copies;
* what is sharded adds, as squares do;
* gradients of activations are those of the rank's own loss, of which the whole has 1 / data ranks: squares, 1 / data^2.
  Gradients of parameters have been averaged by DDP or FSDP before they are read.

`Ranks.join` then is one all-reduce of the sums and one of the maxima, on the host, in a gloo group of its own, called
from the recorder's thread: it shares no queue with the training's collectives, costs no device memory (a second NCCL
communicator takes hundreds of MiB), and a rank that is lost costs a bounded wait, where NCCL's watchdog would end the
process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .. import ops
from ..blocks import Block, is_named_attention
from .packet import Packet

__all__ = ["Join", "Layout", "Ranks", "full_of", "is_sharded", "local_of", "reshard", "world_size"]

logger = logging.getLogger(__name__)


def world_size() -> int:
    """The number of processes that train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Layout:
    """How `world` ranks share the work: in `data` groups with batches of their own, each of `world / data` ranks."""

    world: int = 1
    data: int = 1
    data_rank: int = 0
    tensor_rank: int = 0  # among the ranks that share one batch
    sharded_heads: frozenset[int] = frozenset()  # layers whose heads those ranks have divided among them
    writes: bool = True  # this rank keeps the file and compares the probe

    @property
    def tensor(self) -> int:
        """Ranks that share one batch, and its tensors."""
        return self.world // self.data

    def parameter_squares(self, gradients: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """[max(layers) + 1] float64: this rank's part of the squared norm of each layer's gradient.

        Summed over ranks that is the squared norm: a sharded gradient adds up, one that several ranks hold counts once.
        """
        weights = [_sharded_over(gradient) / self.world for gradient in gradients]
        distinct = sorted(set(weights))
        groups = [layer * len(distinct) + distinct.index(weight) for layer, weight in zip(layers, weights, strict=True)]
        squares = ops.sum_of_squares([local_of(gradient) for gradient in gradients], groups)
        missing = -len(squares) % len(distinct)  # the last layer may have no gradient of the last weight
        squares = torch.cat([squares, squares.new_zeros(missing)]).view(-1, len(distinct))
        # Numbers of Python's own: a tensor of weights would be a copy from the host.
        return sum(weight * of_weight for weight, of_weight in zip(distinct, squares.unbind(1), strict=True))

    def weigh(self, packet: Packet, sharded_outputs: Iterable[int]) -> None:
        """Scale the local sums of a step, but for the parameters', so that they add up over the ranks.

        Args:
            packet: on the host.
            sharded_outputs: layers whose output is split over the ranks of one batch; the others' is on all of them.
        """
        outputs = set(sharded_outputs)
        for layer in range(packet.layers):
            heads = 1 if layer in self.sharded_heads else self.tensor
            copies = 1 if layer in outputs else self.tensor
            packet["attention"][:, layer] /= heads
            packet["attention_parts"][:, layer] /= heads
            packet["activation_squares"][layer] /= copies * self.data**2
            if packet.probe:
                packet["probe_attention"][:, layer] /= heads
                packet["probe_activation_squares"][layer] /= copies
        if packet.probe and self.data_rank != 0:  # all ranks run the whole probe
            for name in ("probe_attention", "probe_activation_squares", "probe_activation_count"):
                packet[name].zero_()
        if not self.writes:
            packet["delta_cka"].zero_()
            packet["delta_cka_count"].zero_()

    def forget_norms(self, packet: Packet) -> None:
        """Leave out what one rank cannot know without the others: norms over all of them."""
        for name in ("activation_count", "parameter_count"):
            packet[name].zero_()


class Ranks:
    """The processes that measure together. Made on every rank at once, which is a collective call.

    Args:
        model: its DTensor parameters tell which ranks share a batch.
        timeout_s: how long to wait for the others, here and in every `join`.

    Raises:
        RuntimeError: a rank has not come within the timeout.
    """

    def __init__(self, model: nn.Module, timeout_s: float):
        self._timeout = timedelta(seconds=timeout_s)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.lost = False
        self._mesh = _BatchMesh(model)
        try:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"Monitor: the {self._world} ranks did not all enter it within {timeout_s:g} s; enter it on every rank"
            ) from error

    @property
    def writes(self) -> bool:
        """Whether this rank keeps the file."""
        return self._rank == 0

    @property
    def divide_batches(self) -> bool:
        """Whether several ranks compute on one batch."""
        return len(self._mesh.peers) > 1

    def agree(self, blocks: Sequence[Block], facts: dict[str, object], error: str | None = None) -> Layout:
        """Make sure that all ranks measure the same thing, and learn the layout.

        Args:
            blocks: of the model.
            facts: what has to be equal on all ranks, by name.
            error: why this rank cannot measure; then none does.

        Raises:
            ValueError: ranks differ, or one of them has an error; on all ranks alike.
        """
        told: list = [None] * self._world
        dist.all_gather_object(told, (facts, error, min(self._mesh.peers)), group=self._group)
        for rank, (_, failed, _) in enumerate(told):
            if failed is not None:
                raise ValueError(failed if rank == self._rank else f"rank {rank}: {failed}")
        for name in facts:
            values = [other[name] for other, _, _ in told]
            if any(value != values[0] for value in values):
                rank = next(i for i, value in enumerate(values) if value != values[0])
                raise ValueError(
                    f"ranks have to measure alike, but {name} is {values[0]!r} on rank 0 and {values[rank]!r} on rank "
                    f"{rank}; a model whose blocks are spread over ranks (pipeline parallelism) cannot be measured"
                )
        batches = sorted({first for _, _, first in told})
        return Layout(
            self._world,
            len(batches),
            batches.index(min(self._mesh.peers)),
            self._mesh.peers.index(self._rank),
            frozenset(block.index for block in blocks if self._mesh.shards_attention(block.module)),
            writes=self.writes,
        )

    def join(self, step: int, packet: Packet, *, dropped: bool = False) -> bool:
        """Turn the weighed sums and the maxima of this rank, on the host, into those of all ranks.

        Returns False, and leaves the packet alone, once a rank is lost or has come with another step: that is told
        once, and no rank is waited for again. `LookupError` if some rank has `dropped` its packet of this step.
        """
        if self.lost:
            return False
        sums = torch.cat([packet.sums, packet.parts.double()])
        # The step travels along, from above and from below: ranks that are out of step must not be added up.
        maxima = torch.cat([packet.maxima.double(), torch.tensor([step, -step, dropped], dtype=torch.float64)])
        try:
            works = [
                dist.all_reduce(sums, dist.ReduceOp.SUM, group=self._group, async_op=True),
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self._group, async_op=True),
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


class Join:
    """What a `Recorder` calls for every step: the packet of this rank becomes that of all ranks."""

    def __init__(
        self,
        ranks: Ranks,
        layout: Layout,
        packet: Packet,  # one of the size that all have
        sharded_outputs: set[int],  # see `Layout.weigh`; read when a packet is joined
        warn: Callable[[str, str], None],
    ):
        self._ranks, self._layout, self._packet = ranks, layout, packet
        self._sharded_outputs, self._warn = sharded_outputs, warn

    def __call__(self, step: int, packet: Packet | None) -> int:
        """Join `packet` in place; None: this rank has dropped it, and takes part so that the others need not wait.

        Returns:
            The number of ranks whose sums are missing: all the others, once one of them is lost.

        Raises:
            LookupError: some rank has dropped its packet, so that nobody knows the step.
        """
        if packet is None:
            nothing = Packet.like(self._packet, torch.zeros_like(self._packet.data, device="cpu"))
            self._ranks.join(step, nothing, dropped=True)
            return 0
        self._layout.weigh(packet, self._sharded_outputs)
        if not self._ranks.join(step, packet):
            self._layout.forget_norms(packet)
            return self._layout.world - 1
        if packet["loss_count"].isnan():  # as no number of micro-batches is
            self._warn("failure", f"measured step {step} failed on another rank; its values are NaN")
        elif not packet.measured():
            self._warn("unseen", f"measured step {step} saw no training forward of the monitored model on any rank")
        return 0


# ---- DTensor ---------------------------------------------------------------------------------------------------------


def _is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; a sum that is still pending over ranks is carried out first."""
    if not _is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        tensor = tensor.redistribute(placements=_settled(tensor.placements))
    return tensor.to_local()


def full_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where ranks hold parts of it."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def _settled(placements: tuple) -> list:
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in placements]


def _sharded_over(tensor: Tensor) -> int:
    """Into how many different parts the ranks have split a tensor; 1 for a plain one."""
    if not _is_dtensor(tensor):
        return 1
    parts = 1
    for dim, placement in enumerate(tensor.placements):
        parts *= tensor.device_mesh.size(dim) if _is_shard(placement) else 1
    return parts


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of a tensor."""
    return _sharded_over(tensor) > 1


def _is_shard(placement: object) -> bool:
    return not placement.is_replicate() and not placement.is_partial()  # strided shards included


class _BatchMesh:
    """Which ranks compute on one batch with this one, from the device meshes of the parameters.

    Those are the ranks along the mesh dimensions that are tensor parallel: the ones on which parameters are sharded,
    except FSDP's own, which come first: (Shard, ...), or (Replicate, Shard, ...) where shards are replicated.
    """

    def __init__(self, model: nn.Module):
        parameters = [parameter for parameter in model.parameters() if _is_dtensor(parameter)]
        self.peers = [dist.get_rank()]
        self._first = 0  # mesh dimensions before are data parallel
        if not parameters:
            return
        mesh = max((parameter.device_mesh for parameter in parameters), key=lambda mesh: mesh.ndim)
        placements = [parameter.placements for parameter in parameters]
        if _is_fully_sharded(model):
            self._first = 1 if any(_is_shard(one[0]) for one in placements) else 2
        whole = [one for one in placements if len(one) == mesh.ndim]
        dims = [dim for dim in range(self._first, mesh.ndim) if any(_is_shard(one[dim]) for one in whole)]
        ranks, coordinate = mesh.mesh, mesh.get_coordinate()
        for dim in reversed(range(mesh.ndim)):
            if dim not in dims:
                ranks = ranks.select(dim, coordinate[dim])
        self.peers = [int(rank) for rank in ranks.flatten()]

    def shards_attention(self, block: nn.Module) -> bool:
        """Whether the ranks of one batch hold different heads of a block: its attention's parameters are sharded."""
        attentions = [part for name, part in block.named_modules() if is_named_attention(part, name.split(".")[-1])]
        parameters = [parameter for part in attentions or [block] for parameter in part.parameters()]
        return any(
            map(_is_shard, (place for p in parameters if _is_dtensor(p) for place in p.placements[self._first :]))
        )


def _is_fully_sharded(model: nn.Module) -> bool:
    return next(_fsdp_modules(model), None) is not None


def _fsdp_modules(model: nn.Module) -> Iterator[nn.Module]:
    module = sys.modules.get("torch.distributed.fsdp")  # whoever shards a model has imported it
    if module is not None:
        yield from (part for part in model.modules() if isinstance(part, module.FSDPModule))


def reshard(model: nn.Module) -> None:
    """Give up the gathered parameters of an FSDP2 model after a forward without a backward.

    The root keeps its own until its backward pass, and takes them for current in the next forward even if the
    optimizer has changed the shards in between.
    """
    for module in _fsdp_modules(model):
        module.reshard()
