"""LISA (Pan et al. 2024, arXiv 2403.17919): a few random blocks train for an interval, then others.

Embeddings and head always train, as in the paper. Frozen blocks have no gradients, and an optimizer skips parameters
without gradients, also with weight decay or moments.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from .handle import Scheduled, check_integer, parameters_in, slots
from .planned import Layers

__all__ = ["Lisa", "lisa"]


class Lisa(Scheduled):
    """Train `active` random blocks of `layers` (None: all), drawn again every `interval` optimizer steps.

    The draw depends only on `seed` and the step: it is the same on every rank, and after a resume (`load_state_dict`,
    or the callback). Parameters outside these blocks are not changed. Make the optimizer before, over all parameters:
    it skips those that are frozen for an interval, because they have no gradient. Call `step()` of the handle after
    every `optimizer.step()`, or give `callback()` to the Trainer. With DDP use `find_unused_parameters=True` or make
    DDP again in every interval: its buckets expect the parameters that trained when it was made.

    `ValueError` for numbers out of range, blocks without trainable parameters, or a second LISA on the same blocks.
    """

    name = "LISA"
    settings = ("active", "interval", "seed")

    def __init__(self, model: nn.Module, layers: Layers = None, *, active: int = 2, interval: int = 20, seed: int = 0):
        check_integer("active", active)
        check_integer("interval", interval)
        check_integer("seed", seed, 0)
        super().__init__(model, layers)
        if active > len(self.blocks):
            raise ValueError(f"active: expected at most {len(self.blocks)}, the number of blocks, got {active}")
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
                    parameter.grad = None  # else the optimizer would use that of the last interval again

    def _words(self) -> str:
        return f"LISA: {self.active} of {len(self.blocks)} blocks train, drawn again every {self.interval} steps."

    def _remove(self) -> None:
        for held in self._trainable:
            for parameter in parameters_in(held):
                parameter.requires_grad_(True)


lisa = Lisa
