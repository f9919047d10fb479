"""Measured steps that wait until their optimizer has stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..quantities.quantity import Parameters, Quantity, Update
from .packet import Packet
from .panel import Panel
from .recorder import Measured

__all__ = ["Updates"]


class Updates:
    """Keeps the packet of a step from `Monitor.step` until the next one, when the weights are those after the update.

    Forward and backward change no weight, so nothing has to be attached to the model in between. Which optimizers have
    stepped is heard from torch.optim.
    """

    def __init__(self, model: nn.Module):
        self._waiting: tuple[Measured, Packet, list[Quantity]] | None = None
        self._stepped: dict[int, Optimizer] = {}
        self._handle = None

    def begin(self, measured: Measured, packet: Packet, listening: Sequence[Quantity]) -> bool:
        """Keep a copy of the packet, because the next step writes to the same memory; False if nobody listens."""
        if not listening:
            return False
        own = Packet(packet.fields, data=packet.data.clone())
        self._waiting = measured, own, list(listening)
        stepped = self._stepped = {}

        def note(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            stepped[id(optimizer)] = optimizer

        self._handle = register_optimizer_step_post_hook(note)
        return True

    def finish(self, panel: Panel, parameters: Parameters, hand_over: Callable[[Measured, Packet], None]) -> None:
        """Hand over the step that was waiting, if there is one, with what its update has added."""
        if self._waiting is None:
            return
        (measured, packet, listening), self._waiting = self._waiting, None
        self._handle.remove()
        ours = {id(parameter) for parameter in parameters.parameters}
        optimizers = tuple(
            optimizer
            for optimizer in self._stepped.values()
            if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])
        )
        self._stepped = {}
        panel.tell_late("after_update", listening, packet, Update(parameters, optimizers))
        hand_over(measured, packet)
