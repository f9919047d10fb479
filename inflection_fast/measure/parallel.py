"""What a rank has of a model: all blocks, or one stage of a pipeline (`torch.distributed.pipelining`).

Every rank measures the blocks of its own stage; in its lists of blocks those of the others are `Elsewhere`, so that a
layer has one index on all ranks, and sums over ranks are sums over stages. A micro-batch of the schedule is a
micro-batch of the step: one forward and one backward pass. What differs from a training without a pipeline:

* The first step of a schedule runs the stage on memory without contents, to learn shapes. Only the forwards of
  micro-batches count.
* Gradients of parameters are whole at the end of the schedule's step, when FSDP2 has reduced them. Until then they are
  those of the sum of the losses of micro-batches; with `scale_grads` the schedule divides them by their number.
* The loss is computed by the schedule, on the last stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..blocks import Block, find_blocks
from .attention_places import heads_of
from .config import MonitorConfig, meta_of
from .context import Context
from .elsewhere import Elsewhere
from .micro_batch import tensors_of
from .ranks import Ranks, world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

__all__ = ["Pipeline", "Whole", "whole_of"]

_UNKNOWN = (
    "pipeline: the schedule {name} is not known; those that are known are ScheduleGPipe and Schedule1F1B, where a rank "
    "holds one stage and a backward pass is whole"
)


@dataclass(frozen=True)
class _Stage:
    """What a rank tells the others of its stage."""

    facts: tuple  # equal on all ranks
    index: int
    peers: tuple[int, ...]  # ranks of this pipeline
    names: tuple[str, ...]  # of its blocks
    stacks: tuple[str, ...]
    held: tuple[tuple[int, int], ...]  # parameters of each block, and how many of them train
    parameters: int
    heads: int | None


def whole_of(
    model: nn.Module,
    config: MonitorConfig,
    schedule: object,
    context: DeviceMesh | dist.ProcessGroup | None,
    timeout_s: float,
    probe: object,
) -> Whole:
    """What this rank has of a model; see `Monitor`."""
    staged = None if schedule is None else Pipeline(schedule, model, config, timeout_s, probe)
    whole = staged or Whole(model, config)
    whole.context = None if context is None else Context(context)
    return whole


class Whole:
    """The blocks of a model that this process holds all of."""

    ranks: Ranks | None = None  # the processes that measure together, where they have met already
    peers: tuple[int, ...] | None = None  # those with the stages of this pipeline
    context: Context | None = None  # those that share a sequence

    def __init__(self, model: nn.Module, config: MonitorConfig):
        self.blocks = find_blocks(model, config.blocks)
        self.heads = heads_of(self.blocks)

    @property
    def context_ranks(self) -> int:
        """How many ranks share a sequence."""
        return 1 if self.context is None else len(self.context.ranks)

    def run(self, model: nn.Module, inputs: dict) -> object:
        """Run the whole model on a batch, outside of the training."""
        return model(**inputs)

    def meta(self, model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
        """As `meta_of`."""
        return meta_of(model, config, blocks)

    def forget_model(self) -> None:
        """Hold nothing of the model any more."""
        self.blocks = []


class Pipeline(Whole):
    """The stage of this rank, and the blocks of all. Making it is a collective call.

    Args:
        schedule: a `ScheduleGPipe` or a `Schedule1F1B`, or a subclass that runs micro-batches as they do.
        model: the module of its stage.
        config: names the blocks of this stage, or lets them be found.
        timeout_s: how long to wait for the other ranks.
        probe: batches that are run through all stages, as dicts of arguments of theirs; None: there are none.

    Raises:
        TypeError: `schedule` is none.
        ValueError: the schedule is not known, is of another module, has no use for a probe, or ranks disagree.
    """

    def __init__(
        self, schedule: object, model: nn.Module, config: MonitorConfig, timeout_s: float, probe: object = None
    ):
        self.ranks = Ranks(model, timeout_s) if world_size() > 1 else None
        own: list[Block] = []
        try:
            self._schedule = _checked(schedule, model)
            _check_probe(probe, model, self._schedule)
            _check_quantities(config)
            own = find_blocks(model, config.blocks)
            told = self._described(model, own)
        except (TypeError, ValueError) as error:
            if self.ranks is not None:
                self.ranks.tell(str(error))
            raise
        everybody = [told] if self.ranks is None else self.ranks.tell(told)
        for rank, said in enumerate(everybody):
            if isinstance(said, str):
                raise ValueError(f"rank {rank}: {said}")
        self._stages = _in_order(everybody)
        self.blocks = self._blocks(own)
        self.heads = max((stage.heads for stage in self._stages if stage.heads is not None), default=None)
        self.peers = told.peers
        self._rank_of = {everybody[peer].index: peer for peer in told.peers} if self.ranks else {}

    def run(self, model: nn.Module, inputs: dict) -> object:
        """Run a batch through the stages, all of which call it, and return what this one gives.

        The first stage gets what its forward has names for, the others the outputs of the stage before, and by name
        what their forward has names for beyond those. Outputs go over the host, as the probe is small. What a stage
        raises is an error on all ranks.
        """
        here, error, output = self._schedule._stage.stage_index, None, None
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
        everybody = [] if self.ranks is None else self.ranks.tell(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, said in enumerate(everybody):
            if said is not None:
                raise RuntimeError(f"probe: rank {rank} failed: {said}")
        return output

    def _received(self, here: int) -> list[Tensor] | None:
        """What the stage before has given, on the host; None: it has failed."""
        if here == 0:
            return []
        told: list = [None]
        dist.recv_object_list(told, self._rank_of[here - 1], group=self._group)
        return told[0]

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self.ranks is None else self.ranks.group

    def _described(self, model: nn.Module, own: Sequence[Block]) -> _Stage:
        schedule, stage = self._schedule, self._schedule._stage
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
        here = self._schedule._stage.stage_index
        names = [name for stage in self._stages for name in stage.names]
        blocks: list[Block] = []
        for stage in self._stages:
            # Stages that count their blocks from 0 each would all have a block of the same name.
            prefix = "" if len(set(names)) == len(names) else f"stage{stage.index}."
            there = zip(stage.names, stage.stacks, stage.held, strict=True)
            of_stage = [Block(0, name, "", Elsewhere(*held), stack) for name, stack, held in there]
            for block in own if stage.index == here else of_stage:
                blocks.append(replace(block, index=len(blocks), name=prefix + block.name))
        return blocks

    def meta(self, model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
        """As `meta_of`, with the parameters of the whole model."""
        meta = meta_of(model, config, blocks)
        meta["model"]["parameters"] = sum(stage.parameters for stage in self._stages)
        return meta

    def forget_model(self) -> None:
        """Hold nothing of the model any more, nor the schedule, which has it."""
        super().forget_model()
        vars(self).pop("_schedule", None)

    # ---- what taps need of the schedule ------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> int:
        """What the gradients of a backward pass are multiples of, before the schedule divides them."""
        return self._schedule._n_microbatches if self._schedule.scale_grads else 1

    @property
    def schedule(self) -> PipelineScheduleSingle:
        """As it was given."""
        return self._schedule


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
    """`ValueError` for quantities that no sum over stages gives."""
    for name in config.names:
        if name in _ACROSS:
            raise ValueError(f"quantities: {name!r} {_ACROSS[name]}, which no stage of a pipeline sees; leave it out")


def _check_probe(probe: object, model: nn.Module, schedule: PipelineScheduleSingle) -> None:
    """`ValueError` where the first stage cannot be called with a batch of the probe."""
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
