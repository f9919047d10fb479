"""The blocks of a plan in a model: those that were measured, or an error that says what differs."""

from __future__ import annotations

from collections.abc import Sequence

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..blocks import Block, find_blocks
from ..decide import Plan

__all__ = ["Layers", "blocks_of", "every_block", "model_type_of", "planned_blocks", "unwrapped"]

Layers = Plan | Sequence[int] | int | None  # a plan or indices of blocks; None: all blocks


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, if there is one. `ValueError` for other wrappers, which come after adapters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, peft.PeftModel):
        return model.get_base_model()
    owner = type(model).__module__
    if owner.startswith("torch.nn.parallel.") or owner.startswith("torch.distributed."):
        raise ValueError(
            f"model: it is wrapped by {type(model).__name__}; pass the model inside (model.module), and wrap the result"
        )
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: it is compiled; pass the model that was compiled (model._orig_mod), and compile the result"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model: it has adapters already, but is not a PeftModel; pass the PeftModel itself, or merge or unload the "
            "adapters first"
        )
    return model


def planned_blocks(model: nn.Module, plan: Plan) -> list[Block]:
    """The blocks `plan.layers` of `model` (unwrapped). `ValueError` if the plan was made for another model."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    if not plan.layers:
        raise ValueError(f"plan: it is empty, so there are no blocks to act on. {plan.summary}")
    blocks = every_block(model, plan)
    return [blocks[layer] for layer in plan.layers]


def every_block(model: nn.Module, plan: Plan) -> list[Block]:
    """All blocks of `model` (unwrapped), chosen or not. `ValueError` if `plan` was made for another model."""
    made_for, given = plan.model.get("model_type"), model_type_of(model)
    if made_for is not None and made_for != given:
        raise ValueError(f"plan: it was made for a model of type {made_for}, this one is {given}")
    names = plan.model["layers"]
    blocks = find_blocks(model, [_module(name) for name in names] if plan.model.get("named") else None)
    if len(blocks) != len(names):
        raise ValueError(f"plan: it was made for a model of {len(names)} blocks, this one has {len(blocks)}")
    for block, name in zip(blocks, names, strict=True):
        ours, planned = f".{_module(block.name)}", f".{_module(name)}"
        if not (ours.endswith(planned) or planned.endswith(ours)):
            raise ValueError(
                f"plan: it was made for a model with {name} as block {block.index}, this one has {block.name}"
            )
        if block.path != _module(block.name):
            raise ValueError(
                f"model: a part of it is wrapped ({block.path}); apply this before wrapping, compiling or sharding"
            )
    return blocks


def blocks_of(model: nn.Module, layers: Layers) -> list[Block]:
    """The blocks of a plan or of indices; None: all. `ValueError` for an index out of range, or one that repeats."""
    if isinstance(layers, Plan):
        return planned_blocks(model, layers)
    blocks = find_blocks(model)
    if layers is None:
        return blocks
    named = layers if isinstance(layers, Sequence) and not isinstance(layers, (str, bytes)) else [layers]
    wanted = [layer for layer in named if isinstance(layer, int) and not isinstance(layer, bool)]
    if len(wanted) < len(named):
        raise TypeError(f"layers: expected a Plan or indices of blocks, got {layers!r}")
    if not wanted:
        raise ValueError("layers: expected at least one index, got none; omit the argument for all blocks")
    wrong = [layer for layer in wanted if not 0 <= layer < len(blocks)]
    if wrong or len(set(wanted)) != len(wanted):
        raise ValueError(f"layers: expected distinct indices from 0 to {len(blocks) - 1}, got {wanted}")
    return [blocks[layer] for layer in sorted(wanted)]


def model_type_of(model: nn.Module) -> str | None:
    """`config.model_type`; None if there is none."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _module(name: str) -> str:
    """The name of the module in the name of a block, also of one that runs several times (`layers.0@1`)."""
    return name.partition("@")[0]
