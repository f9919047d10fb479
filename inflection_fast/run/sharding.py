"""Training and evaluation of a model that is sharded over the processes of a run (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer

from inflection_fast.blocks import find_blocks
from inflection_fast.run.processes import FSDP

__all__ = ["ShardedTrainer", "accelerate_shards", "shard", "sharding_arguments", "whole_weights"]


class ShardedTrainer(Trainer):
    """A Trainer with FSDP2 that also works on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        """Enable FSDP2 on CPUs, where it works with gloo, but Accelerate does not enable it."""
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # both keep a copy
            self.is_fsdp_enabled = True


def sharding_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of TrainingArguments with which each block of the model is a shard group of its own."""
    classes = sorted({type(block.module).__name__ for block in find_blocks(model)})
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": classes}}


@contextmanager
def accelerate_shards(shards: bool) -> Iterator[None]:
    """Set whether Accelerate shards the models that it prepares, by a variable that it also sets itself."""
    before = os.environ.get(FSDP)
    os.environ[FSDP] = str(shards).lower()
    try:
        yield
    finally:
        os.environ.pop(FSDP)
        if before is not None:
            os.environ[FSDP] = before


def shard(model: nn.Module) -> None:
    """Shard a model in place as training does. A call for all processes; a sharded model stays as it is."""
    if not isinstance(model, FSDPModule):
        for block in find_blocks(model):
            fully_shard(block.module)
        fully_shard(model)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU of the first process; empty in the others. A call for all processes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:  # a parameter with several names becomes one tensor again
            weights[name] = weights[names.setdefault(parameter, name)]
    return weights
