"""The quantities of one monitor: their memory and columns, which taps they listen to, and the rows of their values."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..quantities import Step
from ..quantities.quantity import Accumulator, Column, MeasuredModel, Quantity, Sums
from ..timeline import Timeline
from .packet import Fields, HostTask, Packet, Piece

__all__ = ["FAILED", "MACHINERY", "Panel", "overrides"]

MACHINERY = "monitor"  # name in the packet of the monitor's own memory: which quantities have failed
FAILED = "failed"
_TAKEN = ("layer", "step", "steps", "layers", "meta", "columns", "truncated")  # names of the timeline itself
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BACKWARD = ("on_output_gradient", "on_parameter_gradient")
_FORWARD = ("on_attention", "on_cross_attention", "on_attention_call", "on_block", "on_submodule", "on_model_output")
_WHOLE = ("on_backward_end", "before_update", "after_update", "on_probe", "in_background")
TAPS = (*_FORWARD, *_BACKWARD, *_WHOLE)


class Panel:
    """Copies of the given quantities, and `Step`, for one monitor.

    Raises:
        ValueError: two quantities have one name, or a name is not valid.
    """

    def __init__(self, quantities: Sequence[Quantity], *, with_step: bool = True):
        self.quantities: dict[str, Quantity] = {}
        for quantity in (*((Step(),) if with_step else ()), *quantities):
            name = quantity.name
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name == MACHINERY:
                raise ValueError(f"quantities: {type(quantity).__name__}.name is {name!r}; expected a name like 'rank'")
            if name in self.quantities:
                raise ValueError(f"quantities: {name!r} is given twice")
            on_training = quantity.data != "probe" and any(overrides(quantity, tap) for tap in (*_FORWARD, *_BACKWARD))
            if on_training and overrides(quantity, "on_probe"):
                raise ValueError(
                    f"quantity {name!r} listens to the training and to the probe; state data = 'probe', or make it two"
                )
            self.quantities[name] = copy.copy(quantity)
            vars(self.quantities[name])["later"] = partial(self._keep, name)
        self._listeners = {tap: tuple(q for q in self.quantities.values() if overrides(q, tap)) for tap in TAPS}
        self.probing = False  # the taps are those of the probe set
        self._step = 0  # the step under way
        self.due: frozenset[str] = frozenset()
        self.failures: dict[str, Exception] = {}  # of the step under way, by quantity
        self.later: list[HostTask] = []  # of the step under way
        self.warn: Callable[[str, str], None] = _log_only

    # ---- what they declare -------------------------------------------------------------------------------------------

    def prepare(self, model: MeasuredModel) -> None:
        """Call `prepare` of every quantity, and check their declarations. `ValueError` names what is wrong."""
        for quantity in self.quantities.values():
            quantity.prepare(model)
        owners: dict[str, str] = {}
        for name, quantity in self.quantities.items():
            for column, said in quantity.columns.items():
                if column in owners:
                    raise ValueError(f"quantities: {owners[column]!r} and {name!r} both name a column {column!r}")
                owners[column] = name
                self._check_column(quantity, column, said)
            for field, accumulator in quantity.accumulators.items():
                _check_axes(quantity, f"accumulator {field!r}", accumulator.axes)
                if accumulator.held == "heads" and accumulator.axes[:1] != ("layer",):
                    raise ValueError(
                        f"quantity {name!r}: accumulator {field!r} is held by 'heads' and so needs 'layer' first"
                    )
        sizes: dict[str, tuple[int, str]] = {}
        for name, quantity in self.quantities.items():
            for axis, size in _sizes(quantity).items():
                if axis in sizes and sizes[axis][0] != size and _in_columns(quantity, axis):
                    raise ValueError(
                        f"quantities: axis {axis!r} has {sizes[axis][0]} places in {sizes[axis][1]!r} and {size} in "
                        f"{name!r}; give one of them another name"
                    )
                if _in_columns(quantity, axis):
                    sizes[axis] = size, name

    @staticmethod
    def _check_column(quantity: Quantity, name: str, column: Column) -> None:
        where = f"quantity {quantity.name!r}: column {name!r}"
        if not _NAME.fullmatch(name) or hasattr(Timeline, name) or name in _TAKEN:
            raise ValueError(f"{where} cannot be named so; expected a name like 'residual_rms'")
        _check_axes(quantity, f"column {name!r}", column.axes)
        if column.count is None:
            if overrides(quantity, "in_background"):
                raise ValueError(f"{where} needs a count: background results are not in every step")
            return
        if column.count not in quantity.accumulators:
            raise ValueError(f"{where} counts by {column.count!r}, which is none of its accumulators")
        axes = quantity.accumulators[column.count].axes
        if axes != column.axes[: len(axes)]:
            raise ValueError(f"{where} has axes {column.axes} and counts by {column.count!r} with axes {axes}")

    @property
    def columns(self) -> dict[str, Column]:
        """All columns by name, with their quantity."""
        return {
            column: replace(said, quantity=name)
            for name, quantity in self.quantities.items()
            for column, said in quantity.columns.items()
        }

    @property
    def axes(self) -> dict[str, list[str] | int]:
        """Places, or their number, of axes of columns other than layers and heads."""
        return {
            axis: places if isinstance(places, int) else [str(place) for place in places]
            for quantity in self.quantities.values()
            for axis, places in quantity.axes.items()
            if _in_columns(quantity, axis)
        }

    def forget(self) -> None:
        """Drop all quantities, which may refer to the model."""
        self.quantities = {}
        self._listeners = dict.fromkeys(TAPS, ())

    def has(self, tap: str) -> bool:
        """Whether any quantity overrides a tap."""
        return bool(self._listeners[tap])

    def for_probe(self) -> Panel:
        """A panel of the quantities with `data = "probe"`."""
        panel = Panel((), with_step=False)
        panel.quantities = {name: one for name, one in self.quantities.items() if one.data == "probe"}
        panel._listeners = {tap: tuple(q for q in of if q.data == "probe") for tap, of in self._listeners.items()}
        panel.probing, panel.warn = True, lambda kind, message: self.warn(kind, message)
        return panel

    def of_group(self, group: str) -> list[str]:
        """Names of the quantities of a memory group: "backward", "forward", "whole" or "probe"; see `StepSums`."""
        return [name for name, quantity in self.quantities.items() if _group(quantity, self.probing) == group]

    def fields(self, layers: int, heads: int) -> Fields:
        """The layout of a packet."""
        declared: dict[str, Mapping[str, Accumulator]] = {MACHINERY: {FAILED: Accumulator(("quantity",), held="part")}}
        sizes: dict[str, dict[str, int]] = {
            MACHINERY: {"layer": layers, "head": heads, "quantity": len(self.quantities)}
        }
        for group in ("forward", "backward", "whole", "probe"):
            for name in self.of_group(group):
                declared[name] = self.quantities[name].accumulators
                sizes[name] = {"layer": layers, "head": heads, **_sizes(self.quantities[name])}
        return Fields(declared, sizes)

    # ---- who listens -------------------------------------------------------------------------------------------------

    def begin(self, due: Collection[str], step: int = 0) -> None:
        """Begin `step`, in which the quantities `due` and `Step` are measured."""
        self._step = step
        self.due = (frozenset(due) | {Step.name}) & set(self.quantities)
        self.failures, self.later = {}, []

    def listening(self, tap: str) -> list[Quantity]:
        """The quantities to call for a tap: due, not failed, and for the data of this panel."""
        return [
            quantity
            for quantity in self._listeners[tap]
            if quantity.name in self.due
            and quantity.name not in self.failures
            and (quantity.data == "probe") == self.probing
        ]

    def notify(
        self, tap: str, packet: Packet | Piece, event: object, quantities: Iterable[Quantity] | None = None
    ) -> None:
        """Call a tap of `quantities` (None: all that listen); one that raises has no values in this step."""
        for quantity in self.listening(tap) if quantities is None else quantities:
            if quantity.name in self.failures:
                continue
            try:
                with torch.no_grad():
                    getattr(quantity, tap)(packet[quantity.name], event)
            except Exception as error:
                self.fail(quantity.name, error, tap)

    def notify_late(self, tap: str, quantities: Iterable[Quantity], packet: Packet, event: object) -> None:
        """As `notify`, for a finished step: a quantity that raises is marked in its packet at once."""
        for quantity in quantities:
            self.notify_one(packet, quantity.name, tap, partial(getattr(quantity, tap), packet[quantity.name], event))

    def notify_one(self, packet: Packet, name: str, where: str, call: Callable[[], None]) -> None:
        """Call a quantity for a finished step; if it raises, that is marked in its packet at once."""
        try:
            with torch.no_grad():
                call()
        except Exception as error:
            packet[MACHINERY][FAILED][list(self.quantities).index(name)] = 1
            self._warn_failed(name, error, where)

    def fail(self, name: str, error: Exception, where: str) -> None:
        """Give a quantity no values in this step."""
        self.failures[name] = error
        self._warn_failed(name, error, where)

    def _warn_failed(self, name: str, error: Exception, where: str) -> None:
        message = f"measured step {self._step} failed for quantity {name!r} in {where}: {error!r}; it has no values"
        self.warn(f"quantity {name}", message)

    def mark_failures(self, packet: Packet, *, everything: bool = False) -> None:
        """Write to the packet which quantities have failed, for all ranks."""
        flags = packet[MACHINERY][FAILED]
        if everything:
            flags.fill_(1)
            return
        for place, name in enumerate(self.quantities):
            if name in self.failures:
                flags[place] = 1

    def _keep(self, name: str, sums: Sums, finish: Callable[..., None], *tensors: Tensor) -> None:
        self.later.append(HostTask.of(name, finish, tensors))

    def finish_later(self, packet: Packet, later: Iterable[HostTask]) -> float:
        """Run the host tasks of quantities on the sums in `packet`; returns the milliseconds."""
        started = perf_counter()
        for work in later:
            if work.arrived is not None:
                work.arrived.synchronize()
            self.notify_one(packet, work.quantity, "later", partial(work.finish, packet[work.quantity], *work.tensors))
        return 1e3 * (perf_counter() - started)

    # ---- values ------------------------------------------------------------------------------------------------------

    def row(self, packet: Packet, due: Collection[str], *, alone: bool = False) -> dict[str, np.ma.MaskedArray]:
        """The columns of a step, from its packet on the host; masked where nothing was measured.

        Args:
            packet: joined over ranks.
            due: the quantities that were measured.
            alone: other ranks are missing; quantities that need all ranks have no values.
        """
        failed = np.from_dlpack(packet[MACHINERY][FAILED])
        row: dict[str, np.ma.MaskedArray] = {}
        for place, (name, quantity) in enumerate(self.quantities.items()):
            if name not in due or failed[place] != 0 or (alone and _needs_all_ranks(quantity)):
                continue
            sums = {field: np.from_dlpack(view).astype(np.float64) for field, view in packet[name].items()}
            try:
                with np.errstate(all="ignore"):  # a run that diverges has NaN and inf
                    row |= self._columns_of(quantity, sums, packet.fields.sizes[name])
            except Exception as error:
                self._warn_failed(name, error, "values")
        return row

    @staticmethod
    def _columns_of(quantity: Quantity, sums: dict[str, np.ndarray], sizes: Mapping[str, int]) -> dict:
        values, found = quantity.values(sums), {}
        unknown = sorted(set(values) - set(quantity.columns))
        if unknown:
            raise ValueError(f"values() returned {unknown}, which are not among its columns")
        for name, value in values.items():
            column = quantity.columns[name]
            shape = tuple(sizes[axis] for axis in column.axes)
            value = np.asarray(value, np.float64)
            if value.shape != shape:
                raise ValueError(f"column {name!r} has shape {value.shape} where its axes {column.axes} say {shape}")
            mask = np.zeros(shape, bool)
            if column.count is not None:
                counted = ~(sums[column.count] == 0)  # NaN counts: it was measured
                mask |= ~counted.reshape(counted.shape + (1,) * (len(shape) - counted.ndim))
            found[name] = np.ma.array(np.where(mask, np.nan, value), mask=mask)
        return found


def overrides(quantity: Quantity, tap: str) -> bool:
    """Whether a quantity listens to a tap."""
    return getattr(type(quantity), tap) is not getattr(Quantity, tap) or tap in vars(quantity)


def _group(quantity: Quantity, probing: bool) -> str:
    if not probing and (quantity.data == "probe" or overrides(quantity, "on_probe")):
        return "probe"
    if any(overrides(quantity, tap) for tap in _BACKWARD):
        return "backward"
    return "forward" if any(overrides(quantity, tap) for tap in _FORWARD) else "whole"


def _sizes(quantity: Quantity) -> dict[str, int]:
    return {axis: places if isinstance(places, int) else len(places) for axis, places in quantity.axes.items()}


def _in_columns(quantity: Quantity, axis: str) -> bool:
    return any(axis in column.axes for column in quantity.columns.values())


def _check_axes(quantity: Quantity, what: str, axes: Sequence[str]) -> None:
    sizes = _sizes(quantity)
    for axis in axes:
        if axis in ("layer", "head"):
            continue
        if axis not in sizes:
            raise ValueError(
                f"quantity {quantity.name!r}: {what} has an axis {axis!r} of unknown size; expected 'layer', 'head' or "
                "one that `axes` gives a size before the first step, because no shape may depend on the batch"
            )
        if sizes[axis] < 1:
            raise ValueError(f"quantity {quantity.name!r}: axis {axis!r} has no places")


def _needs_all_ranks(quantity: Quantity) -> bool:
    return any(one.gradient_power or one.held == "part" for one in quantity.accumulators.values())


def _log_only(kind: str, message: str) -> None:
    logging.getLogger(__name__).warning("%s", message)
