"""The processes of one run, as torchrun and `accelerate launch` start them.

All processes go through the same stages and train together (DDP or FSDP2). The first process reads before the others,
writes the files and prints. An error of the first process ends all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from inflection_fast.run.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from inflection_fast.run.config import RunConfig

__all__ = ["FSDP", "FirstFailed", "alone", "count", "first", "in_turn", "join", "wait"]

Result = TypeVar("Result")
TIMEOUT = timedelta(days=1)  # others wait while the first process reads a large data set or draws a report
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # variables of `accelerate launch`

_working_alone = False  # this process runs the work of `alone` or `in_turn`


class FirstFailed(UserError):
    """The first process has failed, and has printed its error."""


def count() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return count() == 1 or int(os.environ["RANK"]) == 0


def join(config: RunConfig) -> RunConfig:
    """Connect to the other processes of a run, if there are any, and return the settings with those of the launch.

    UserError if the models cannot be sharded as asked, or a batch cannot be divided evenly.
    """
    if _launched_with(DEEPSPEED):
        raise UserError("DeepSpeed shards the gradients that are measured: launch the run with DDP or FSDP")
    if _launched_with(FSDP):
        config = dataclasses.replace(config, parallel="fsdp")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # true: only the first process reads the weights
    if count() == 1:
        if config.parallel == "fsdp":
            raise UserError(
                "parallel is fsdp, which shards the model over several processes, and there is one: start several"
                " with torchrun --nproc-per-node N -m inflection_fast"
            )
        return config
    for name, train in config.trainings.items():
        if train.batch_size % count():
            raise UserError(
                f"{name}.batch_size is {train.batch_size}, which {count()} processes cannot divide evenly: give a"
                f" multiple of {count()}"
            )
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    _group()
    return config


def _launched_with(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def alone(work: Callable[[], Result]) -> Result:
    """Call `work` in the first process only, and return its result in all processes.

    The result is pickled. An exception of `work` is raised in the first process, and `FirstFailed` in the others.
    """
    if count() == 1 or _working_alone:
        return work()
    outcome: list[tuple[bool, Result | None]] = [(False, None)]
    try:
        if first():
            outcome = [(True, _alone(work))]
    except Exception:
        _broadcast(outcome)
        raise
    _broadcast(outcome)
    succeeded, result = outcome[0]
    if not succeeded:
        raise FirstFailed("the first process has failed")
    return result  # type: ignore[return-value]  # that of `work`, which has succeeded


def in_turn(work: Callable[[], Result]) -> Result:
    """Call `work` in every process, in the first one before the others: for caches and downloads."""
    if count() == 1 or _working_alone:
        return work()
    result: list[Result] = []
    alone(lambda: result.append(work()))
    return result[0] if result else _alone(work)


def _alone(work: Callable[[], Result]) -> Result:
    global _working_alone
    _working_alone = True
    try:
        return work()
    finally:
        _working_alone = False


def wait() -> None:
    """Wait for all processes."""
    if count() > 1:
        from torch import distributed

        distributed.barrier(_group())


def _broadcast(objects: list) -> None:
    from torch import distributed

    distributed.broadcast_object_list(objects, src=0, group=_group())


@functools.cache
def _group() -> ProcessGroup:
    """A process group on the host with a long timeout; that of the training has a shorter one."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=TIMEOUT)
