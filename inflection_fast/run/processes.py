"""Several processes that make one run together, as torchrun and `accelerate launch` start them.

All of them take the same path through the stages and train together (DDP, or FSDP2). The first reads before the others,
writes, and speaks. Its errors end them all.
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
PATIENCE = timedelta(days=1)  # a large data set is read, and a report drawn, by one process
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # how `accelerate launch` says it

_apart = False  # this process works while the others do not


class FirstFailed(UserError):
    """What the first process has said already."""


def count() -> int:
    """How many processes make the run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return count() == 1 or int(os.environ["RANK"]) == 0


def join(config: RunConfig) -> RunConfig:
    """Meets the other processes of a run, if there are any, and returns the settings as this launch means them.

    UserError where the models cannot be divided as asked, or a batch cannot be divided evenly.
    """
    if _launched_with(DEEPSPEED):
        raise UserError("DeepSpeed divides the gradients that are measured: launch the run with DDP or FSDP")
    if _launched_with(FSDP):
        config = dataclasses.replace(config, parallel="fsdp")
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else the first process alone reads the weights
    if count() == 1:
        if config.parallel == "fsdp":
            raise UserError(
                "parallel is fsdp, which divides the model among processes, and there is one: start several with"
                " torchrun --nproc-per-node N -m inflection_fast"
            )
        return config
    trainings = {"measure.train": config.measure.train, "tune.train": config.tune.train}
    if config.source is not None:
        trainings["source.train"] = config.source.train
    for name, train in trainings.items():
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
    """What `work` returns in the first process, for all of them; it is not called in the others.

    The result is pickled. What `work` raises is raised in the first process, and `FirstFailed` in the others.
    """
    if count() == 1 or _apart:
        return work()
    told: list[tuple[bool, Result | None]] = [(False, None)]
    if not first():
        _broadcast(told)
    else:
        try:
            told = [(True, _alone(work))]
        except Exception:
            _broadcast(told)
            raise
        _broadcast(told)
    succeeded, result = told[0]
    if not succeeded:
        raise FirstFailed("the first process has failed")
    return result  # type: ignore[return-value]  # that of `work`, which has succeeded


def in_turn(work: Callable[[], Result]) -> Result:
    """What `work` returns in each process; the first one calls it before the others, for caches and downloads."""
    if count() == 1 or _apart:
        return work()
    mine: list[Result] = []
    alone(lambda: mine.append(work()))
    return mine[0] if mine else _alone(work)


def _alone(work: Callable[[], Result]) -> Result:
    global _apart
    _apart = True
    try:
        return work()
    finally:
        _apart = False


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        from torch import distributed

        distributed.barrier(_group())


def _broadcast(told: list) -> None:
    from torch import distributed

    distributed.broadcast_object_list(told, src=0, group=_group())


@functools.cache
def _group() -> ProcessGroup:
    """A group on the host, apart from that of the training, which gives up waiting sooner."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=PATIENCE)
