"""Freeze a model except the planned blocks, as Spectrum does, or except the last blocks and the head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..blocks import Block
from .handle import Handle, slots
from .planned import Layers

__all__ = ["Unfrozen", "unfreeze", "unfreeze_top"]


class Unfrozen(Handle):
    """Train the parameters of the planned blocks and of `also`, and freeze all others.

    `also` are full names of modules or parameters, such as a new head ("classifier"). Make the optimizer afterwards: an
    existing one keeps its parameters. Quantised integer weights stay frozen. `remove()` of the returned handle restores
    every `requires_grad`; it may be omitted.

    `ValueError` for a plan of another model, an index out of range, a name without parameters, or blocks that are
    unfrozen already.
    """

    name = "unfreezing"
    settings = ("also", "parameters")

    def __init__(self, model: nn.Module, plan: Layers, *, also: Sequence[str] = ()):
        if isinstance(also, str):
            raise TypeError(f"also: expected a sequence of names of modules, got the string {also!r}")
        super().__init__(model, plan)
        self.also = list(also)
        self._before = [(slot, slot.trains) for slot in slots(model)]
        trained = {id(p) for block in self.blocks for p in block.module.parameters()}
        for name in self.also:
            within = [p for full, p in model.named_parameters() if f"{full}.".startswith(f"{name}.")]
            if not within:
                raise ValueError(f"also: {type(model).__name__} has no parameters under {name!r}")
            trained |= {id(p) for p in within}
        self.parameters = 0
        for parameter in model.parameters():
            trains = id(parameter) in trained and parameter.is_floating_point()
            parameter.requires_grad_(trains)
            self.parameters += parameter.numel() if trains else 0
        self._hold()

    def _remove(self) -> None:
        for slot, trained in self._before:
            if slot.parameter is not None:
                slot.parameter.requires_grad_(trained)


unfreeze = Unfrozen


def unfreeze_top(model: nn.Module, blocks: Sequence[Block], top: int, head: Sequence[str] | None = None) -> list[str]:
    """Make the last `top` of `blocks` and the head trainable, freeze all else, and return the trainable names.

    `head` are full names of modules or parameters; None: every parameter that the model registers after its last block.
    A weight shared with the embeddings counts as an embedding, and is frozen. `ValueError` for more blocks than there
    are, a name without parameters, or nothing to train; the model is then unchanged.
    """
    if not 0 <= top <= len(blocks):
        raise ValueError(f"top: expected 0 to {len(blocks)}, the number of blocks, got {top}")
    named = dict(model.named_parameters())
    order = list(named)
    inside = {id(p): block.index for block in blocks for p in block.module.parameters()}
    last = max(i for i, name in enumerate(order) if id(named[name]) in inside)
    for prefix in head or ():
        if not any(f"{name}.".startswith(f"{prefix}.") for name in order):
            raise ValueError(f"head: the model has no parameters under {prefix!r}")
    trains = {}
    for i, (name, parameter) in enumerate(named.items()):
        if id(parameter) in inside:
            chosen = inside[id(parameter)] >= len(blocks) - top
        elif head is None:
            chosen = i > last
        else:
            chosen = any(f"{name}.".startswith(f"{prefix}.") for prefix in head)
        trains[name] = chosen and parameter.is_floating_point()
    if not any(trains.values()):
        raise ValueError("top: it is 0 and the model has no separate head, so nothing would be trained")
    for name, parameter in named.items():
        parameter.requires_grad_(trains[name])
    return [name for name in order if trains[name]]
