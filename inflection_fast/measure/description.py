"""What a timeline says about the model that it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

from torch import nn

from ..blocks import Block
from .config import MonitorConfig

__all__ = ["heads_of", "meta_of"]

_PACKAGES = ("inflection_fast", "torch", "transformers", "peft")
_HEAD_COUNT_NAMES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")


def heads_of(blocks: Sequence[Block]) -> int | None:
    """The number of attention heads as the modules of the blocks state it, the largest; None if none does."""
    stated = [_stated(block.module) for block in blocks]
    return max((count for count in stated if count is not None), default=None)


def _stated(block: nn.Module) -> int | None:
    modules = list(block.modules())
    for holder in [*modules, *(getattr(module, "config", None) for module in modules)]:
        for name in _HEAD_COUNT_NAMES:
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def meta_of(model: nn.Module, config: MonitorConfig, blocks: Sequence[Block]) -> dict:
    """Model, stacks of blocks, configuration and versions, as they are stored in the timeline."""
    inner = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return {
        "model": {
            "class": type(inner).__name__,
            "model_type": getattr(getattr(inner, "config", None), "model_type", None),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "stacks": _stacks_of(blocks),
        "config": config.as_dict(),
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name)},
    }


def _stacks_of(blocks: Sequence[Block]) -> list[dict]:
    """Each stack with the indices of its blocks, its number of parameters, and how many of them train."""
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(block.stack, []).append(block)
    described = []
    for name, held in stacks.items():
        parameters = {id(p): p for block in held if block.module is not None for p in block.module.parameters()}
        described.append(
            {
                "name": name,
                "layers": [block.index for block in held],
                "parameters": sum(p.numel() for p in parameters.values()),
                "trainable": sum(p.numel() for p in parameters.values() if p.requires_grad),
            }
        )
    return described
