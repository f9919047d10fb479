"""The parameters of the blocks: their gradients, their change by the optimizer, and slow work on copies of them.

Slow work runs in a thread of the lowest priority. When such a quantity is due, as many of its parameters as fit into
`COPY_BYTES` are copied to the host; the others follow at the next such steps. Results go into the sums of the next
measured step. While the thread is busy nothing is copied, so the work does not pile up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import Queue, SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .. import ops
from ..blocks import Block
from ..quantities.dtensors import full_of, local_of
from ..quantities.quantity import Parameters, Quantity, Update
from .packet import MeasuredStep, Packet, StepSums
from .panel import Panel
from .placements import when_gathered
from .ranks import Layout
from .schedule import MOST_LISTS, BoundedDict

__all__ = [
    "COPY_BYTES", "Background", "BlockParameters", "Updates", "clip_by_known", "gradients_of",
    "observing_parameter_gradients", "scale_of", "total_squares",
]  # fmt: skip

COPY_BYTES = 2**28  # limit of the copies of one step; at least one parameter is copied
_LOWEST_PRIORITY = 19
_POLL_S = 0.01
_PATIENCE_S = 60.0  # for the last results, when a monitor is closed


class BlockParameters:
    """The parameters of the blocks for taps: `inflection_fast.quantities.quantity.Parameters`."""

    def __init__(self, blocks: Sequence[Block], device: torch.device):
        self._blocks, self._device, self._layout = blocks, device, Layout()
        self.parameters: tuple[nn.Parameter, ...] = ()
        self.layers: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self._marks: dict[frozenset[int], Tensor] = BoundedDict(MOST_LISTS)
        self.look()

    def look(self) -> None:
        """Find the present parameters: adapters may be added and removed during training."""
        first: dict[nn.Parameter, tuple[int, str]] = {}
        for block in self._blocks:
            for name, parameter in block.module.named_parameters():
                first.setdefault(parameter, (block.index, name))
        self.parameters = tuple(first)
        self.layers = tuple(layer for layer, _ in first.values())
        self.names = tuple(name for _, name in first.values())

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
        """Whether no trainable parameter has a gradient, and there is one."""
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        return bool(trained) and all(parameter.grad is None for parameter in trained)

    def gradients(self) -> tuple[list[int], list[str], list[Tensor]]:
        """Layers, names and gradients of the trainable ones that have a gradient; of a sparse one its values."""
        found = [(layer, name, p) for layer, name, p in self if p.requires_grad and p.grad is not None]
        return [layer for layer, *_ in found], [name for _, name, _ in found], gradients_of(p for _, _, p in found)

    def squares(self, tensors: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """[L] float64: this rank's part of the summed squares by layer."""
        if not tensors:
            return torch.zeros(len(self._blocks), dtype=torch.float64, device=self._device)
        squares = self._layout.parameter_squares(tensors, layers).to(self._device)
        return torch.cat([squares, squares.new_zeros(len(self._blocks) - len(squares))])

    def marked(self, layers: Iterable[int]) -> Tensor:
        """[L] float64, 1 at `layers`; cached, because a copy from the host takes time."""
        key = frozenset(layers)
        if key not in self._marks:
            marks = [float(layer in key) for layer in range(len(self._blocks))]
            self._marks[key] = torch.tensor(marks, dtype=torch.float64).to(self._device, non_blocking=True)
        return self._marks[key]


@contextmanager
def observing_parameter_gradients(
    model: nn.Module, parameters: BlockParameters, hear: Callable[[int, str, nn.Parameter, Tensor], None]
) -> Iterator[None]:
    """Call `hear(layer, name, parameter, gradient)` for every gradient of a trainable parameter in a backward pass.

    Under FSDP2 it is the gradient of the gathered parameter, before it is averaged and sharded.
    """
    places = {parameter: (layer, name) for layer, name, parameter in parameters if parameter.requires_grad}
    hooked: dict[nn.Parameter, nn.Parameter] = {}  # gathered by FSDP2, often the same tensor in several forwards
    with ExitStack() as attached:

        def listen(parameter: nn.Parameter, gathered: nn.Parameter) -> None:
            if parameter in places and gathered.requires_grad and hooked.get(parameter) is not gathered:
                hooked[parameter] = gathered
                arrives = partial(hear, *places[parameter], parameter)
                attached.enter_context(gathered.register_hook(arrives))

        for parameter in places:
            listen(parameter, parameter)
        for handle in when_gathered(model, listen):
            attached.enter_context(handle)
        yield


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The existing gradients; of a sparse one its coalesced values."""
    gradients = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
    return [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]


def total_squares(
    parameters: Sequence[nn.Parameter], blocks: Sequence[Block], known: Tensor | None, loss_scale: float | Tensor = 1.0
) -> Tensor:
    """Sum of squares of the gradients of `parameters`, or of this rank's parts of them, float64 [].

    `known` [<= L] are the sums of the blocks for gradients `loss_scale` times as large. They are used unless blocks
    share parameters or have others than `parameters`; without them all gradients are read.
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


def clip_by_known(
    parameters: list[nn.Parameter],
    max_norm: float,
    blocks: Sequence[Block],
    known: Tensor | None,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Clip gradients by their norm, and return it, float32 []; `known` as in `total_squares`, before `scaler`."""
    if known is None:
        return full_of(nn.utils.clip_grad_norm_(parameters, max_norm))
    scale = 1.0 if scaler is None else scale_of(scaler, known.device)
    norm = total_squares(parameters, blocks, known, scale).sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """The scale of `scaler`, float64 []; unlike its `get_scale` it does not wait for the device."""
    return scaler.scale(torch.ones((), device=device)).double()  # its square may exceed float32


# ---- the optimizer's step --------------------------------------------------------------------------------------------


class Updates:
    """Keeps the packet of a step until the weights are updated: the next `Monitor.step` or forward.

    Forward and backward change no weight, so the model needs no hook in between. A hook of torch.optim tells which
    optimizers have stepped.
    """

    def __init__(self, model: nn.Module):
        self._waiting: tuple[MeasuredStep, Packet, list[Quantity]] | None = None
        self._stepped: dict[int, Optimizer] = {}
        self._handle: RemovableHandle | None = None

    def begin(self, measured: MeasuredStep, packet: Packet, listening: Sequence[Quantity]) -> bool:
        """Keep a copy of the packet, because the next step writes to the same memory; False if nothing listens."""
        if not listening:
            return False
        self._waiting = measured, Packet(packet.fields, data=packet.data.clone()), list(listening)
        stepped = self._stepped = {}

        def note(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            stepped[id(optimizer)] = optimizer

        self._handle = register_optimizer_step_post_hook(note)
        return True

    def finish(self, panel: Panel, parameters: Parameters, hand_over: Callable[[MeasuredStep, Packet], None]) -> None:
        """Hand over the waiting step, if there is one, with the values of its update."""
        if self._waiting is None:
            return
        (measured, packet, listening), self._waiting = self._waiting, None
        if self._handle is not None:
            self._handle.remove()
        ours = {id(parameter) for parameter in parameters.parameters}
        optimizers = tuple(
            optimizer
            for optimizer in self._stepped.values()
            if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"])
        )
        self._stepped = {}
        panel.notify_late("after_update", listening, packet, Update(parameters, optimizers))
        hand_over(measured, packet)


# ---- slow work -------------------------------------------------------------------------------------------------------


class Background:
    """The thread that measures copies of parameters; it starts with the first copy."""

    def __init__(self, panel: Panel):
        self._panel, self._rank, self._world = panel, 0, 1
        self._next: dict[str, int] = {}  # by quantity, which of its parameters comes next
        self._todo: Queue = Queue()
        self._done: SimpleQueue = SimpleQueue()  # (quantity, results or what was raised)
        self._thread: threading.Thread | None = None
        self._owner = os.getpid()

    def share(self, layout: Layout) -> None:
        """Divide the parameters of a stage among its ranks."""
        self._rank = layout.data_rank * layout.tensor + layout.tensor_rank
        self._world = layout.world // layout.stages

    def copy(self, listening: Sequence[Quantity], parameters: BlockParameters) -> None:
        """Start to measure the present parameters. Every rank calls it at the same steps."""
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
                whole = full_of(parameter.detach())  # a collective call where it is sharded
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
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # of this thread, on Linux
        except (AttributeError, OSError):
            pass  # another system: normal priority
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
        """Add finished results to the sums of a step; returns their quantities."""
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
        """Make `sums` those of a last row with nothing but finished results."""
        sums.begin()
        self._panel.begin(())
        finished = self.add(sums.packet)
        self._panel.mark_failures(sums.packet)
        return finished

    def close(self) -> bool:
        """Wait for running work, up to a limit. Returns whether there may be results that are in no step yet."""
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
