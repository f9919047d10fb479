"""Gradients of a whole model, from the sums of squares of its blocks and what lies outside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..blocks import Block
from .placements import local_of
from .ranks import Layout
from .schedule import MOST_LISTS, Recent

__all__ = ["BlockParameters", "gradients_of", "scale_of", "squares_of_all"]


class BlockParameters:
    """The parameters of the blocks as taps get them: `inflection_fast.quantities.quantity.Parameters`."""

    def __init__(self, blocks: Sequence[Block], device: torch.device):
        self._blocks, self._device, self._layout = blocks, device, Layout()
        self.parameters: tuple[nn.Parameter, ...] = ()
        self.layers: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self._marks: dict[frozenset[int], Tensor] = Recent(MOST_LISTS)
        self.look()

    def look(self) -> None:
        """Find the parameters that there are now: adapters may come and go while a model trains."""
        first: dict[nn.Parameter, tuple[int, str]] = {}
        for block in self._blocks:
            for name, parameter in block.module.named_parameters():
                first.setdefault(parameter, (block.index, name))
        self.parameters = tuple(first)
        self.layers, self.names = (tuple(one[i] for one in first.values()) for i in (0, 1))

    def share(self, layout: Layout) -> None:
        """Hold them as one of several ranks."""
        self._layout = layout

    def __iter__(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        return zip(self.layers, self.names, self.parameters, strict=True)

    @property
    def trained(self) -> tuple[int, ...]:
        """Layers with trainable parameters."""
        return tuple(dict.fromkeys(layer for layer, _, parameter in self if parameter.requires_grad))

    @property
    def lost_gradients(self) -> bool:
        """Whether there are trainable parameters and none of them has a gradient."""
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        return bool(trained) and all(parameter.grad is None for parameter in trained)

    def gradients(self) -> tuple[list[int], list[str], list[Tensor]]:
        """Layers, names and gradients of the trainable ones that have a gradient; of a sparse one its values."""
        found = [(layer, name, p) for layer, name, p in self if p.requires_grad and p.grad is not None]
        layers, names = ([one[i] for one in found] for i in (0, 1))
        return layers, names, gradients_of(p for _, _, p in found)

    def squares(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """[L] float64: this rank's part of the summed squares by layer."""
        if not tensors:
            return torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)
        squares = self._layout.parameter_squares(tensors, layers).to(self._device)
        return torch.cat([squares, squares.new_zeros(len(self._blocks) - len(squares))])

    def marked(self, layers: Iterable[int]) -> Tensor:
        """[L] float64, 1 at `layers`. Kept for the next step, because a copy from the host takes its time."""
        key = frozenset(layers)
        if key not in self._marks:
            marks = [float(layer in key) for layer in range(len(self._blocks))]
            self._marks[key] = torch.tensor(marks, dtype=torch.float64).to(self._device, non_blocking=True)
        return self._marks[key]


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are; of a sparse one its values, each position once."""
    gradients = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
    return [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]


def squares_of_all(
    parameters: Sequence[nn.Parameter], blocks: Sequence[Block], known: Tensor | None, loss_scale: float | Tensor = 1.0
) -> Tensor:
    """Sum of squares of the gradients of `parameters`, or of this rank's parts of them, float64 [].

    `known` are the sums of the blocks, [<= L], of gradients that were `loss_scale` times as large. They are used if
    they are about just these parameters; None, or blocks that share parameters or have others: all are summed.
    """
    of_blocks = [p for block in blocks for p in block.module.parameters() if p.requires_grad and p.grad is not None]
    distinct = set(of_blocks)
    if known is None or len(distinct) < len(of_blocks) or not distinct <= set(parameters):
        known, distinct = None, set()
    rest = [local_of(gradient) for gradient in gradients_of(p for p in dict.fromkeys(parameters) if p not in distinct)]
    total = 0.0 if known is None else known.double().sum() / loss_scale**2
    if rest:
        total = total + ops.sum_of_squares(rest, [0] * len(rest))[0]
    device = parameters[0].device if parameters else None
    return total if isinstance(total, Tensor) else torch.zeros((), dtype=torch.float64, device=device)


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """What `scaler` multiplies losses by, float64 [], without waiting for the device as its `get_scale` does."""
    return scaler.scale(torch.ones((), device=device)).double()  # its square may be more than a float32 holds
