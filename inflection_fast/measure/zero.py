"""What DeepSpeed leaves to be measured: it reduces gradients by itself, after and beside the backward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ..quantities import Quantity

__all__ = ["reachable", "under_deepspeed"]

logger = logging.getLogger(__name__)

# Of ZeRO 3 every parameter is a share with an id; of ZeRO 1 and 2 it is linked to its share in the optimizer.
_MARKS = ("ds_id", "_hp_mapping")
_TAPS = ("on_parameter_gradient", "on_backward_end", "before_update", "after_update")


def under_deepspeed(model: nn.Module) -> bool:
    """Whether a model is an engine of DeepSpeed, or has parameters that ZeRO divides among ranks."""
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return True
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in _MARKS)


def reachable(quantities: Sequence[Quantity], model: nn.Module, *, deepspeed: bool = False) -> list[Quantity]:
    """The quantities that can be measured on `model`; under DeepSpeed those that read no gradient of a parameter.

    At the end of a backward pass a rank has its own gradients there, or none, and not those of the batch. What is left
    out is said in one warning. `ValueError` if nothing is left.
    """
    if not (deepspeed or under_deepspeed(model)):
        return list(quantities)
    refused = [one for one in quantities if any(_listens(one, tap) for tap in _TAPS)]
    left = [one for one in quantities if one not in refused]
    if refused:
        names = ", ".join(one.name for one in refused)
        sentence = (
            f"{names}: not measured under DeepSpeed, which reduces the gradients of parameters by itself, so that a"
            " rank does not see those of the batch; use DDP or FSDP2 to measure them"
        )
        if not left:
            raise ValueError(sentence)
        logger.warning("%s", sentence)
    return left


def _listens(quantity: Quantity, tap: str) -> bool:
    return getattr(type(quantity), tap) is not getattr(Quantity, tap)
