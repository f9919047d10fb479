"""The sums of a measured step: one piece of memory, laid out from the accumulators that quantities declare.

Sums add and maxima combine by max, so micro-batches, shards and ranks may divide a step in any way. What is not linear
(means, square roots, standard errors) is computed by each quantity's `values`, on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..alerts import Alert
from ..quantities.quantity import Accumulator
from ..timeline import Column

__all__ = [
    "CudaCopies", "Field", "Fields", "HostCopies", "HostTask", "MeasuredStep", "Packet", "Piece", "Row", "StepSums",
]  # fmt: skip

_KINDS = (("float64", "sum"), ("float32", "sum"), ("float32", "max"))  # in the order of their memory


@dataclass(frozen=True)
class Field:
    """One accumulator of one quantity."""

    quantity: str
    name: str
    accumulator: Accumulator
    shape: tuple[int, ...]
    start: int  # bytes

    @property
    def kind(self) -> int:
        """Which of the three kinds of memory it lies in."""
        return _KINDS.index((self.accumulator.dtype, self.accumulator.join))

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.start + math.prod(self.shape) * (8 if self.kind == 0 else 4)


class Fields:
    """The layout of a packet: float64 sums, then float32 sums, then float32 maxima.

    Args:
        declared: quantity -> name -> accumulator; the order of quantities is their order in memory, in each kind.
        sizes: quantity -> axis -> size, "layer" and "head" among them.
    """

    def __init__(self, declared: Mapping[str, Mapping[str, Accumulator]], sizes: Mapping[str, Mapping[str, int]]):
        self.declared, self.sizes = declared, sizes
        self.all: list[Field] = []
        self.bounds = [0]  # of the three kinds
        for kind in range(len(_KINDS)):
            start = self.bounds[-1]
            for quantity, accumulators in declared.items():
                for name, accumulator in accumulators.items():
                    shape = tuple(sizes[quantity][axis] for axis in accumulator.axes)
                    field = Field(quantity, name, accumulator, shape, start)
                    if field.kind == kind:
                        self.all.append(field)
                        start = field.end
            self.bounds.append(start)

    @property
    def nbytes(self) -> int:
        """Of a packet; a multiple of 8, so that packets may lie side by side."""
        return -(-self.bounds[-1] // 8) * 8

    @property
    def heads(self) -> int:
        """Size of the axis "head"."""
        return next(iter(self.sizes.values()))["head"]

    def only(self, quantities: Iterable[str]) -> Fields:
        """The layout of a packet with those quantities alone."""
        wanted = set(quantities)
        return Fields({name: one for name, one in self.declared.items() if name in wanted}, self.sizes)

    def with_heads(self, heads: int) -> Fields:
        """The layout for another number of heads."""
        return Fields(self.declared, {name: {**sizes, "head": heads} for name, sizes in self.sizes.items()})

    def region(self, quantities: Iterable[str]) -> list[tuple[int, int]]:
        """Bytes [start, end) in each kind of `quantities`, which are adjacent."""
        wanted = set(quantities)
        found = []
        for kind in range(len(_KINDS)):
            fields = [field for field in self.all if field.kind == kind and field.quantity in wanted]
            start = fields[0].start if fields else self.bounds[kind]
            end = fields[-1].end if fields else start
            found.append((start, end))
        return found


class Views(Mapping):
    """The accumulators of a quantity: `sums["x"] += ...` and `sums["x"][layer] = ...` write to the packet.

    `TypeError` for an assignment of another tensor, which would not change the packet.
    """

    def __init__(self, quantity: str, views: dict[str, Tensor]):
        self._quantity, self._views = quantity, views

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        if self._views.get(name) is not value:
            raise TypeError(
                f"quantity {self._quantity!r}: accumulator {name!r} is fixed memory, whose shape does not depend on "
                f"the batch; write to it in place, as by sums[{name!r}] += ... or sums[{name!r}].copy_(...)"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


class Packet:
    """Sums and maxima of a step: preallocated bytes, copied as a whole, with named views.

    `packet["attention"]["rows"]` is the view of that accumulator in `data`, uint8. `sums` (float64), `parts` (float32)
    and `maxima` (float32) are flat views of all accumulators of a kind. Sums begin at 0, and maxima at -inf.
    """

    def __init__(self, fields: Fields, device: torch.device | str = "cpu", data: Tensor | None = None):
        self.fields = fields
        fresh = data is None
        self.data = torch.zeros(fields.nbytes, dtype=torch.uint8, device=device) if data is None else data
        views: dict[str, dict[str, Tensor]] = {name: {} for name in fields.declared}
        for field in fields.all:
            dtype = torch.float64 if field.kind == 0 else torch.float32
            views[field.quantity][field.name] = self.data[field.start : field.end].view(dtype).view(field.shape)
        self._views = {name: Views(name, of) for name, of in views.items()}
        first, second, third, last = fields.bounds
        self.sums = self.data[first:second].view(torch.float64)
        self.parts, self.maxima = self.data[second:third].view(torch.float32), self.data[third:last].view(torch.float32)
        if fresh:
            self.reset()

    def __getitem__(self, quantity: str) -> Views:
        return self._views[quantity]

    def __contains__(self, quantity: str) -> bool:
        return quantity in self._views

    def reset(self) -> None:
        """Forget everything."""
        self.data.zero_()
        if len(self.maxima):
            self.maxima.fill_(-torch.inf)

    def add(self, part: Packet, region: list[tuple[int, int]]) -> None:
        """Add a packet of the quantities of `region` alone, which is their `fields.region`."""
        for (start, end), dtype, piece in zip(region, _DTYPES, (part.sums, part.parts, part.maxima), strict=True):
            if start < end:
                whole = self.data[start:end].view(dtype)
                torch.maximum(whole, piece, out=whole) if piece is part.maxima else whole.add_(piece)

    def with_heads(self, heads: int) -> Packet:
        """The same values for another number of heads; further heads are left out."""
        wider = Packet(self.fields.with_heads(heads), self.data.device)
        for name, views in self._views.items():
            for field, view in views.items():
                axes = self.fields.declared[name][field].axes
                target = wider[name][field]
                if "head" in axes:
                    at = axes.index("head")
                    shared = min(target.shape[at], view.shape[at])
                    target, view = target.narrow(at, 0, shared), view.narrow(at, 0, shared)
                target.copy_(view)
        return wider


_DTYPES = (torch.float64, torch.float32, torch.float32)


@dataclass(eq=False)
class Piece:
    """What one micro-batch adds to a step."""

    forward: Packet | None  # of its forward; None: added to the step already, or dropped
    backward: Packet | None  # of its backward pass

    def __getitem__(self, quantity: str) -> Views:
        """The accumulators of a quantity."""
        packet = self.backward if self.backward is not None and quantity in self.backward else self.forward
        if packet is None:
            raise KeyError(quantity)
        return packet[quantity]


class StepSums:
    """The packet of a measured step and those of its micro-batches; the memory is reused from step to step.

    Args:
        fields: layout of the packet: the quantities of `forward`, then those of `backward`, then the others.
        forward: quantities summed in the forward; they count once a backward pass goes through the micro-batch.
        backward: quantities whose taps may run again for a micro-batch; they are added at the end of the step.
        device: of all packets.
    """

    def __init__(self, fields: Fields, forward: Iterable[str], backward: Iterable[str], device: torch.device):
        self._groups = tuple(forward), tuple(backward)
        self._device = device
        self._lay_out(fields)
        self.packet = Packet(fields, device)
        self._free: tuple[list[Packet], list[Packet]] = ([], [])
        self._open: list[Piece] = []
        self.fixed = False  # whether the number of heads can still change

    def _lay_out(self, fields: Fields) -> None:
        self.fields = fields
        self._parts = tuple(fields.only(group) for group in self._groups)
        self._regions = tuple(fields.region(group) for group in self._groups)

    @property
    def heads(self) -> int:
        """Size of the axis "head"."""
        return self.fields.heads

    def begin(self) -> None:
        """Forget the step before."""
        for piece in self._open:
            self._release(0, piece.forward)
            self._release(1, piece.backward)
            piece.forward = piece.backward = None
        self._open = []
        self.packet.reset()

    def piece(self) -> Piece:
        """Memory for a micro-batch."""
        piece = Piece(self._taken(0), self._taken(1))
        self._open.append(piece)
        return piece

    def count(self, piece: Piece) -> None:
        """A backward pass goes through the micro-batch: add the sums of its forward, once."""
        if piece.forward is not None:
            self.packet.add(piece.forward, self._regions[0])
            self._release(0, piece.forward)
            piece.forward = None

    def forget(self, piece: Piece) -> None:
        """Leave the micro-batch out."""
        if piece in self._open:
            self._open.remove(piece)
            self._release(0, piece.forward)
            self._release(1, piece.backward)
            piece.forward = piece.backward = None

    def finish(self) -> Packet:
        """The packet of the step, with the sums of backward passes."""
        for piece in self._open:
            if piece.forward is None and piece.backward is not None:  # a backward pass went through it
                self.packet.add(piece.backward, self._regions[1])
                self._release(1, piece.backward)
                piece.backward = None
        return self.packet

    def resize(self, heads: int) -> None:
        """Change the number of heads, before the layout is fixed."""
        self._lay_out(self.fields.with_heads(heads))
        self.packet = self.packet.with_heads(heads)
        self._free = ([], [])
        for piece in self._open:
            piece.forward = None if piece.forward is None else piece.forward.with_heads(heads)
            piece.backward = None if piece.backward is None else piece.backward.with_heads(heads)

    def _taken(self, group: int) -> Packet:
        free = self._free[group]
        return free.pop() if free else Packet(self._parts[group], self._device)

    def _release(self, group: int, packet: Packet | None) -> None:
        if packet is not None:
            packet.reset()
            self._free[group].append(packet)


# ---- copies to the host ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HostTask:
    """Work of a quantity that the recorder's thread does on the host; see `Quantity.later`."""

    quantity: str
    finish: Callable[..., None]
    tensors: Sequence[Tensor]  # on the host after `arrived`
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, quantity: str, finish: Callable[..., None], tensors: Sequence[Tensor]) -> HostTask:
        """Start the copy of the tensors to the host."""
        if not any(tensor.is_cuda for tensor in tensors):
            return cls(quantity, finish, tensors, None)
        pinned = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in tensors]
        copies = [host.copy_(one, non_blocking=True) for host, one in zip(pinned, tensors, strict=True)]
        arrived = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
        arrived.record()
        return cls(quantity, finish, copies, arrived)


@dataclass(frozen=True)
class MeasuredStep:
    """What the training thread knows of a measured step, besides its packet."""

    step: int
    due: frozenset[str]  # quantities that were measured
    sharded_outputs: frozenset[int]  # layers whose output the ranks of one batch have split
    probed: bool  # the probe was run
    began: float  # `perf_counter` at its end less the time that measuring took so far
    later: tuple[HostTask, ...] = ()


class HostCopies:
    """Copies within host memory, complete on return."""

    def start(self, host: Tensor, source: Tensor) -> None:
        """Copy `source` into `host`."""
        host.copy_(source)

    def before_overwriting(self) -> None:
        """The source may be written again."""


class CudaCopies:
    """Copies into pinned memory on a stream of their own; the training's stream does not wait for them."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    def start(self, host: Tensor, source: Tensor) -> torch.cuda.Event:
        """Start to copy `source` into pinned `host`; returns the event of the end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
            self._last = copied = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
            copied.record(self._stream)
        return copied

    def before_overwriting(self) -> None:
        """Make the device, not the host, wait for the copy before the next write to its source."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)


@dataclass(frozen=True, eq=False)
class Row:
    """A measured step as it is in the timeline."""

    step: int
    # By name: masked arrays with the axes of `timeline.columns`, or numbers; only what was measured.
    columns: Mapping[str, np.ndarray | float]
    described: Mapping[str, Column] = dataclasses.field(default_factory=dict)  # what the columns are
    alerts: tuple[Alert, ...] = ()  # raised by this row

    def scalars(self) -> dict[str, float]:
        """Each measured column as its mean over the measured places."""
        means = {name: np.ma.mean(value) for name, value in self.columns.items()}
        return {name: float(mean) for name, mean in means.items() if mean is not np.ma.masked}
