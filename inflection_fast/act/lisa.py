"""LISA (Pan et al. 2024, arXiv 2403.17919): a few random blocks train for an interval, then others do.

Embeddings and head train all the time, as in the paper; the blocks in between take turns. Frozen blocks have no
gradients, and an optimizer with weight decay or moments leaves parameters without gradients alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from ..decide import Plan
from .handle import Scheduled, check_steps, parameters_in, slots

__all__ = ["Lisa", "lisa"]


class Lisa(Scheduled):
    """Which of the chosen blocks train, by optimizer step."""

    name = "LISA"

    def __init__(
        self, model: nn.Module, where: Plan | Sequence[int] | int | None, active: int, interval: int, seed: int
    ):
        check_steps("active", active)
        check_steps("interval", interval)
        check_steps("seed", seed, 0)
        super().__init__(model, where)
        if active > len(self.blocks):
            raise ValueError(f"active: {active} blocks were asked for, there are {len(self.blocks)} to choose from")
        self.active, self.interval, self.seed = active, interval, seed
        self._trainable = [[slot for slot in slots(block.module) if slot.trains] for block in self.blocks]
        frozen = [block.index for block, held in zip(self.blocks, self._trainable, strict=True) if not held]
        if frozen:
            raise ValueError(f"model: blocks {frozen} have no parameters that train; unfreeze them first")
        self._update()
        self._hold()

    @property
    def training(self) -> list[int]:
        """Indices of the blocks that train now."""
        draw = np.random.default_rng([self.seed, self.steps_done // self.interval])
        return sorted(self.layers[i] for i in draw.choice(len(self.blocks), self.active, replace=False))

    def _update(self) -> None:
        chosen = set(self.training)
        for block, held in zip(self.blocks, self._trainable, strict=True):
            for parameter in parameters_in(held):
                parameter.requires_grad_(block.index in chosen)
                if block.index not in chosen:
                    parameter.grad = None  # of the interval before: an optimizer would go on stepping with it

    def _settings(self) -> dict:
        return {"active": self.active, "interval": self.interval, "seed": self.seed}

    def _words(self) -> str:
        return (
            f"LISA: {self.active} of {len(self.blocks)} blocks train at a time, drawn anew every {self.interval} steps."
        )

    def _remove(self) -> None:
        for held in self._trainable:
            for parameter in parameters_in(held):
                parameter.requires_grad_(True)


def lisa(
    model: nn.Module,
    layers: Plan | Sequence[int] | int | None = None,
    *,
    active: int = 2,
    interval: int = 20,
    seed: int = 0,
) -> Lisa:
    """Let `active` random blocks of `layers` (None: all) train at a time, drawn anew every `interval` optimizer steps.

    The draw depends on `seed` and the step alone: the same on every rank, and after a resume (`load_state_dict`, or the
    callback). What trains outside of these blocks is not touched. Make the optimizer before, over all parameters: those
    that are frozen for an interval have no gradient, and are left alone. Call `step()` of the handle after every
    `optimizer.step()`, or give `callback()` to the Trainer. Under DDP use `find_unused_parameters=True` or build DDP
    anew per interval: its buckets expect the parameters that trained when it was made.

    `ValueError` for numbers out of range, blocks without trainable parameters, or a second LISA on the same blocks.
    """
    return Lisa(model, layers, active, interval, seed)
