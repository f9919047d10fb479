"""Which quantities can be measured under DeepSpeed, which reduces gradients of parameters itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ..quantities import Quantity
from .panel import overrides

__all__ = ["reachable", "under_deepspeed"]

logger = logging.getLogger(__name__)

# In ZeRO 3 every parameter is a shard with an id; in ZeRO 1 and 2 it refers to its shard in the optimizer.
_MARKS = ("ds_id", "_hp_mapping")
_TAPS = ("on_parameter_gradient", "on_backward_end", "before_update", "after_update")


def under_deepspeed(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine, or has parameters that ZeRO shards."""
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return True
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in _MARKS)


def reachable(quantities: Sequence[Quantity], model: nn.Module, *, deepspeed: bool = False) -> list[Quantity]:
    """The quantities that can be measured on `model`; under DeepSpeed those that read no gradients of parameters.

    At the end of a backward pass DeepSpeed leaves a rank its own gradients or none, not those of the batch. One warning
    names the quantities that are left out. `ValueError` if nothing is left.
    """
    if not (deepspeed or under_deepspeed(model)):
        return list(quantities)
    refused = [one for one in quantities if any(overrides(one, tap) for tap in _TAPS)]
    left = [one for one in quantities if one not in refused]
    if refused:
        names = ", ".join(one.name for one in refused)
        sentence = (
            f"{names}: not measured under DeepSpeed, which reduces the gradients of parameters by itself, so a rank"
            " does not see those of the batch; use DDP or FSDP2 to measure them"
        )
        if not left:
            raise ValueError(sentence)
        logger.warning("%s", sentence)
    return left
