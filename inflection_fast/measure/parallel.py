"""The part of a model on this rank: all blocks, or one stage of a pipeline (`torch.distributed.pipelining`).

Every rank measures the blocks of its own stage. In its list of blocks those of other stages are `RemoteBlock`, so a
layer has the same index on all ranks, and sums over ranks are sums over stages. A micro-batch of the schedule is one
forward and one backward pass. Differences from a training without a pipeline:

* In its first step a schedule runs the stage on empty memory to infer shapes. Only forwards of micro-batches count.
* Gradients of parameters are complete at the end of the schedule's step, after FSDP2 has reduced them. Until then they
  are those of the summed losses of the micro-batches; with `scale_grads` the schedule divides by their number.
* The schedule computes the loss, on the last stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..blocks import Block, find_blocks
from .attention_places import heads_of
from .config import MonitorConfig, meta_of
from .context import Context
from .graph_taps import GraphTaps
from .hooks import catch_hook_errors, patched
from .micro_batch import MicroBatch, tensors_of
from .placements import RemoteBlock
from .ranks import Ranks, world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

__all__ = ["ParallelTaps", "Pipeline", "RankModel", "rank_model_of"]

_UNKNOWN = (
    "pipeline: the schedule {name} is not known; those that are known are ScheduleGPipe and Schedule1F1B, where a rank "
    "holds one stage and a backward pass is whole"
)


@dataclass(frozen=True)
class _Stage:
    """What a rank sends to the others about its stage."""

    facts: tuple  # equal on all ranks
    index: int
    peers: tuple[int, ...]  # ranks of this pipeline
    names: tuple[str, ...]  # of its blocks
    stacks: tuple[str, ...]
    held: tuple[tuple[int, int], ...]  # parameters of each block, and how many of them train
    parameters: int
    heads: int | None


def rank_model_of(
    model: nn.Module,
    config: MonitorConfig,
    schedule: object,
    context: DeviceMesh | dist.ProcessGroup | None,
    timeout_s: float,
    probe: object,
) -> RankModel:
    """The part of a model on this rank; see `Monitor`."""
    part = RankModel(model, config) if schedule is None else Pipeline(schedule, model, config, timeout_s, probe)
    part.context = None if context is None else Context(context)
    return part


class RankModel:
    """A model whose blocks are all on this rank."""

    ranks: Ranks | None = None  # the processes that measure together, if their group exists already
    peers: tuple[int, ...] | None = None  # ranks of this pipeline
    context: Context | None = None  # ranks that share a sequence

    def __init__(self, model: nn.Module, config: MonitorConfig):
        self.blocks = find_blocks(model, config.blocks)
        self.heads = heads_of(self.blocks)

    @property
    def context_ranks(self) -> int:
        """How many ranks share a sequence."""
        return 1 if self.context is None else len(self.context.ranks)

    def run(self, model: nn.Module, inputs: dict) -> object:
        """Run the model on a batch of the probe."""
        return model(**inputs)

    def meta(self, model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
        """As `meta_of`."""
        return meta_of(model, config, blocks)

    def forget_model(self) -> None:
        """Drop all references to the model."""
        self.blocks = []


class Pipeline(RankModel):
    """The stage of this rank, and the blocks of all stages. The constructor is a collective call.

    Args:
        schedule: a `ScheduleGPipe` or a `Schedule1F1B`, or a subclass with their `_step_microbatches`.
        model: the module of its stage.
        config: its `blocks` are those of this stage.
        timeout_s: how long to wait for the other ranks.
        probe: batches for all stages, as dicts of their arguments, or None.

    Raises:
        TypeError: `schedule` is no schedule.
        ValueError: the schedule is not known, is of another module, cannot take the probe, or ranks disagree.
    """

    def __init__(
        self, schedule: object, model: nn.Module, config: MonitorConfig, timeout_s: float, probe: object = None
    ):
        self.ranks = Ranks(model, timeout_s) if world_size() > 1 else None
        own: list[Block] = []
        try:
            self.schedule = _checked(schedule, model)
            _check_probe(probe, model, self.schedule)
            _check_quantities(config)
            own = find_blocks(model, config.blocks)
            own_stage = self._described(model, own)
        except (TypeError, ValueError) as error:
            if self.ranks is not None:
                self.ranks.all_gather(str(error))
            raise
        everybody = [own_stage] if self.ranks is None else self.ranks.all_gather(own_stage)
        for rank, said in enumerate(everybody):
            if isinstance(said, str):
                raise ValueError(f"rank {rank}: {said}")
        self._stages = _in_order(everybody)
        self.blocks = self._blocks(own)
        self.heads = max((stage.heads for stage in self._stages if stage.heads is not None), default=None)
        self.peers = own_stage.peers
        self._rank_of = {everybody[peer].index: peer for peer in own_stage.peers} if self.ranks else {}

    def run(self, model: nn.Module, inputs: dict) -> object:
        """Run a batch through the stages, all of which call it; returns the output of this one.

        The first stage gets the inputs that its forward names. The others get the outputs of the stage before, and the
        further inputs that their forward names. Outputs are sent through the host, as the probe is small. An error of
        one stage is raised on all ranks.
        """
        here, error, output = self.schedule._stage.stage_index, None, None
        before = self._received(here)
        if before is not None:
            try:
                device = next(model.parameters()).device
                names = list(inspect.signature(model.forward).parameters)[len(before) :]
                named = {name: value for name, value in inputs.items() if name in names}
                output = model(*(tensor.to(device) for tensor in before), **named)
            except Exception as raised:
                error = raised
        if here < len(self._stages) - 1:
            tensors = None if output is None else [tensor.detach().cpu() for tensor in tensors_of(output)]
            dist.send_object_list([tensors], self._rank_of[here + 1], group=self._group)
        everybody = [] if self.ranks is None else self.ranks.all_gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, said in enumerate(everybody):
            if said is not None:
                raise RuntimeError(f"probe: rank {rank} failed: {said}")
        return output

    def _received(self, here: int) -> list[Tensor] | None:
        """The outputs of the stage before, on the host; None: it has failed."""
        if here == 0:
            return []
        received: list = [None]
        dist.recv_object_list(received, self._rank_of[here - 1], group=self._group)
        return received[0]

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.ranks is None else self.ranks.group

    def _described(self, model: nn.Module, own: Sequence[Block]) -> _Stage:
        schedule, stage = self.schedule, self.schedule._stage
        facts = type(schedule).__name__, schedule._n_microbatches, schedule.scale_grads, stage.num_stages
        parameters = [{id(p): p for p in block.module.parameters()}.values() for block in own]
        return _Stage(
            facts,
            stage.stage_index,
            tuple(dist.get_process_group_ranks(stage.group or dist.group.WORLD)),
            tuple(block.name for block in own),
            tuple(block.stack for block in own),
            tuple((sum(p.numel() for p in of), sum(p.numel() for p in of if p.requires_grad)) for of in parameters),
            sum(p.numel() for p in model.parameters()),
            heads_of(own),
        )

    def _blocks(self, own: Sequence[Block]) -> list[Block]:
        here = self.schedule._stage.stage_index
        names = [name for stage in self._stages for name in stage.names]
        blocks: list[Block] = []
        for stage in self._stages:
            # Stages that each count their blocks from 0 have blocks of equal names.
            prefix = "" if len(set(names)) == len(names) else f"stage{stage.index}."
            there = zip(stage.names, stage.stacks, stage.held, strict=True)
            of_stage = [Block(0, name, "", RemoteBlock(*held), stack) for name, stack, held in there]
            for block in own if stage.index == here else of_stage:
                blocks.append(replace(block, index=len(blocks), name=prefix + block.name))
        return blocks

    def meta(self, model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
        """As `meta_of`, with the parameters of the whole model."""
        meta = meta_of(model, config, blocks)
        meta["model"]["parameters"] = sum(stage.parameters for stage in self._stages)
        return meta

    def forget_model(self) -> None:
        """Drop all references to the model, and the schedule, which refers to it."""
        super().forget_model()
        vars(self).pop("schedule", None)

    @property
    def loss_scale(self) -> int:
        """The factor in the gradients of a backward pass, before the schedule divides by it."""
        return self.schedule._n_microbatches if self.schedule.scale_grads else 1


def _checked(schedule: object, model: nn.Module) -> PipelineScheduleSingle:
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, _PipelineSchedule

    if not isinstance(schedule, _PipelineSchedule):
        raise TypeError(
            f"pipeline: expected a schedule of torch.distributed.pipelining, got {type(schedule).__name__}; give "
            "ScheduleGPipe(stage, ...) or Schedule1F1B(stage, ...)"
        )
    known = {ScheduleGPipe._step_microbatches, Schedule1F1B._step_microbatches}
    if not isinstance(schedule, PipelineScheduleSingle) or type(schedule)._step_microbatches not in known:
        raise ValueError(_UNKNOWN.format(name=type(schedule).__name__))
    if schedule._loss_fn is None:
        raise ValueError("pipeline: the schedule has no loss_fn, so no backward pass runs; give it one")
    if isinstance(model, torch.fx.GraphModule):
        raise ValueError(
            "model: a stage that torch.distributed.pipelining.pipeline has traced runs no block as a module; make "
            "stages of your own modules by PipelineStage(module, ...)"
        )
    if schedule._stage.submod is not model:
        raise ValueError(
            f"model: expected the module of the schedule's stage, got another {type(model).__name__}; give Monitor the "
            "module that PipelineStage was made of"
        )
    return schedule


_ACROSS = {"gradient_noise": "counts micro-batches of all ranks", "trajectory": "compares each layer with all others"}


def _check_quantities(config: MonitorConfig) -> None:
    """`ValueError` for quantities that are no sums over stages."""
    for name in config.names:
        if name in _ACROSS:
            raise ValueError(f"quantities: {name!r} {_ACROSS[name]}, which no stage of a pipeline sees; leave it out")


def _check_probe(probe: object, model: nn.Module, schedule: PipelineScheduleSingle) -> None:
    """`ValueError` if the first stage cannot be called with a batch of the probe."""
    first = probe[0] if isinstance(probe, (list, tuple)) and probe else probe
    if not isinstance(first, Mapping) or schedule._stage.stage_index > 0:
        return
    named = inspect.signature(model.forward).parameters.values()
    missing = [one.name for one in named if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    missing = [name for name in missing if name not in first]
    if missing:
        raise ValueError(
            f"probe: the first stage of the pipeline, {type(model).__name__}, needs {missing}, and batches have "
            f"{sorted(map(str, first))}; name them as its forward does"
        )


def _in_order(everybody: Sequence[_Stage]) -> list[_Stage]:
    """The stages from first to last, each once. `ValueError` where ranks disagree."""
    first = everybody[0]
    labels = ("schedule", "number of micro-batches", "scale_grads", "number of stages")
    for rank, stage in enumerate(everybody):
        for label, ours, theirs in zip(labels, first.facts, stage.facts, strict=True):
            if ours != theirs:
                raise ValueError(f"pipeline: the {label} is {ours} on rank 0 and {theirs} on rank {rank}")
    count = first.facts[-1]
    for stage in everybody:
        indices = sorted(everybody[peer].index for peer in stage.peers)
        if indices != list(range(count)):
            raise ValueError(
                f"pipeline: the ranks {list(stage.peers)} hold the stages {indices}; expected each of the {count} once"
            )
    stages: dict[int, _Stage] = {}
    for rank, stage in enumerate(everybody):
        other = stages.setdefault(stage.index, stage)
        if (other.names, other.held) != (stage.names, stage.held):
            raise ValueError(
                f"pipeline: stage {stage.index} has the blocks {list(stage.names)} on rank {rank} and "
                f"{list(other.names)} on another rank, or other parameters in them"
            )
    return [stages[index] for index in range(count)]


class ParallelTaps(GraphTaps):
    """Taps on a model of which this rank holds a stage, or a part of each sequence. Arguments as for `Taps`, and:

    rank_model: what this rank holds; for a whole model the taps are those of `GraphTaps`.
    """

    def __init__(self, *args, rank_model: RankModel, **options):
        super().__init__(*args, **options)
        self._pipeline = rank_model if isinstance(rank_model, Pipeline) else None
        if rank_model.context is not None:
            if self._panel.has("on_attention_call"):
                raise ValueError(
                    "context: quantities that look into calls of attention (rank, attention_detail) would see the keys "
                    "of one rank alone; leave them out"
                )
            self._attention.context = rank_model.context
            self._frozen.possible = False  # it runs blocks again, without the other ranks
        self._in_chunk = False  # a forward of a micro-batch of the schedule runs
        self._losses: list[Tensor] = []

    def forget_model(self) -> None:
        """Drop all references to the model."""
        self._pipeline = None
        super().forget_model()

    @property
    def loss_seen(self) -> Tensor | None:
        """[]: the loss that the schedule trains on in this step; None: it is not computed on this rank."""
        if not self._losses:
            return None
        losses = torch.stack([loss.detach().mean() for loss in self._losses])
        return losses.mean() if self._pipeline is not None and self._pipeline.schedule.scale_grads else losses.sum()

    def _attach_to_model(self) -> None:
        super()._attach_to_model()
        self._losses = []
        if self._pipeline is not None:
            schedule, stage = self._pipeline.schedule, self._pipeline.schedule._stage
            add = self._attached.enter_context
            add(patched(stage, "forward_one_chunk", self._chunks))
            add(patched(stage, "perform_reduce_grad", partial(self._reduces, stage)))
            add(patched(schedule, "_compute_loss", self._computes_loss))

    def _chunks(self, run: Callable) -> Callable:
        def forward_one_chunk(*args, **kwargs):
            self._in_chunk = True
            try:
                return run(*args, **kwargs)
            finally:
                self._in_chunk = False

        return forward_one_chunk

    def _computes_loss(self, compute: Callable) -> Callable:
        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            if isinstance(loss, Tensor):
                self._losses.append(loss)
            return loss

        return compute_loss

    def _reduces(self, stage, reduce: Callable) -> Callable:
        def perform_reduce_grad(factor: int):
            reduce(1)
            self._read_whole()
            stage.scale_grads(factor)

        return perform_reduce_grad

    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pipeline is None or self._in_chunk:
            super()._forward_begins(model, args, kwargs)

    def _read_parameters(self, micro_batch: MicroBatch) -> None:
        if self._pipeline is None:
            super()._read_parameters(micro_batch)
        else:
            micro_batch.reads_parameters = False  # they are complete at the end of the schedule's step

    @catch_hook_errors
    def _read_whole(self) -> None:
        if self._panel.listening("on_backward_end") and self.backwards:
            self._notify_backward_end()

    def gather(self, loss_scale: float | Tensor) -> None:
        """As `Taps.gather`, without the scale of the schedule."""
        super().gather(loss_scale if self._pipeline is None else loss_scale * self._pipeline.loss_scale)
