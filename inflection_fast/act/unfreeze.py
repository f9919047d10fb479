"""Train all parameters of the planned blocks, and freeze the others, as Spectrum does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .handle import Handle, slots
from .planned import Layers

__all__ = ["Unfrozen", "unfreeze"]


class Unfrozen(Handle):
    """Train the parameters of the planned blocks and of `also`, and freeze all others.

    `also` are full names of modules or parameters, such as a new head ("classifier"). Make the optimizer afterwards: an
    existing one keeps its parameters. Quantised integer weights stay frozen. `remove()` of the returned handle restores
    every `requires_grad`; it may be omitted.

    `ValueError` for a plan of another model, an index out of range, a name without parameters, or blocks that are
    unfrozen already.
    """

    name = "unfreezing"

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

    def _settings(self) -> dict:
        return {"also": self.also, "parameters": self.parameters}

    def _remove(self) -> None:
        for slot, trained in self._before:
            if slot.parameter is not None:
                slot.parameter.requires_grad_(trained)


unfreeze = Unfrozen
