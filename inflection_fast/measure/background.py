"""Slow work on parameters, in a thread of the lowest importance, on copies that the training does not wait for.

At a step at which such a quantity is due, as many of its parameters as fit into `COPY_BYTES` are copied to the host,
in turn: those that do not fit come at the next such steps. A thread measures them one after the other. What is done
goes into the sums of the next measured step. While it is still busy nothing is copied, so it never falls behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from queue import Queue, SimpleQueue

import numpy as np
import torch
from torch import Tensor

from ..quantities.quantity import Quantity
from .gradients import BlockParameters
from .packet import Packet, StepSums
from .panel import Panel
from .placements import full_of
from .ranks import Layout

__all__ = ["COPY_BYTES", "Background"]

COPY_BYTES = 2**28  # of parameters that are copied in one step, but at least one parameter
_LEAST_IMPORTANCE = 19
_POLL_S = 0.01
_PATIENCE_S = 60.0  # for the last results, when a monitor is closed


class Background:
    """The thread that measures parameters for the quantities of a panel. It is started with the first copy."""

    def __init__(self, panel: Panel):
        self._panel, self._rank, self._world = panel, 0, 1
        self._next: dict[str, int] = {}  # by quantity, which of its parameters comes next
        self._todo: Queue = Queue()
        self._done: SimpleQueue = SimpleQueue()  # (quantity, results or what was raised)
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks, which divide the parameters among them."""
        self._rank, self._world = layout.data_rank * layout.tensor + layout.tensor_rank, layout.world

    def copy(self, listening: Sequence[Quantity], parameters: BlockParameters) -> None:
        """Begin to measure parameters as they are now. Every rank calls it at the same steps."""
        busy = self._todo.unfinished_tasks > 0
        if busy and self._world == 1:
            return
        for quantity in listening:
            wanted = [one for one in parameters if quantity.wants(*one)]
            if not wanted:
                continue
            room, first = COPY_BYTES, self._next.get(quantity.name, 0)
            for turn in range(len(wanted)):
                place = (first + turn) % len(wanted)
                layer, name, parameter = wanted[place]
                if turn and parameter.numel() * parameter.element_size() > room:
                    break
                room -= parameter.numel() * parameter.element_size()
                self._next[quantity.name] = (place + 1) % len(wanted)
                whole = full_of(parameter.detach())  # a collective call, where it is sharded
                if place % self._world == self._rank and not busy:
                    self._start(quantity, layer, name, whole)

    def _start(self, quantity: Quantity, layer: int, name: str, whole: Tensor) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="inflection_fast background", daemon=True)
            self._thread.start()
        arrived = None
        if whole.device.type == "cuda":
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            host.copy_(whole, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record()
        else:
            host = whole.clone()
        self._todo.put((quantity, layer, name, host, arrived))

    def _work(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_IMPORTANCE)  # of this thread, on Linux
        except (AttributeError, OSError):
            pass  # another system: as important as the rest
        while (item := self._todo.get()) is not None:
            quantity, layer, name, host, arrived = item
            try:
                while arrived is not None and not arrived.query():
                    time.sleep(_POLL_S)
                with torch.no_grad():
                    found = quantity.in_background(layer, name, host)
            except Exception as error:
                found = error
            self._done.put((quantity.name, found))
            self._todo.task_done()

    def add(self, packet: Packet) -> frozenset[str]:
        """Add what is done to the sums of a step; returns the quantities that it is of."""
        finished = set()
        while not self._done.empty():
            name, found = self._done.get()
            finished.add(name)
            if isinstance(found, Exception):
                self._panel.fail(name, found, "in_background")
                continue
            try:
                _add(packet, name, found)
            except Exception as error:
                self._panel.fail(name, error, "in_background")
        return frozenset(finished)

    def alone(self, sums: StepSums) -> frozenset[str]:
        """Make `sums` those of a last row, which holds what is done and nothing else."""
        sums.begin()
        self._panel.begin(())
        finished = self.add(sums.packet)
        self._panel.mark_failures(sums.packet)
        return finished

    def close(self) -> bool:
        """Wait for what is on its way, but not for ever. Returns whether there may be results that no step has yet."""
        if not self._next or os.getpid() != self._owner:
            return False
        if self._thread is not None:
            with self._todo.all_tasks_done:
                self._todo.all_tasks_done.wait_for(lambda: not self._todo.unfinished_tasks, _PATIENCE_S)
            self._todo.put(None)
        self._next.clear()
        return self._world > 1 or not self._done.empty()


def _add(packet: Packet, name: str, found: Mapping[str, np.ndarray]) -> None:
    sums = packet[name]
    for field, value in found.items():
        view = sums[field]
        if np.shape(value) != tuple(view.shape):
            raise ValueError(
                f"accumulator {field!r} has shape {tuple(view.shape)}, in_background gave {np.shape(value)}"
            )
        host = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
        host.numpy()[...] = value
        there = host.to(view.device, non_blocking=True)
        if packet.fields.declared[name][field].join == "max":
            torch.maximum(view, there, out=view)
        else:
            view += there
