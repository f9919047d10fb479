"""From the sums on the device to rows of the timeline, without a wait of the training.

The training thread starts a copy into a free slot of a ring and queues a `MeasuredStep`. The recorder's thread waits
for the copy, joins it with those of the other ranks, computes the columns, appends them and raises alerts. If no slot
is free, because the disk stalls, the step is dropped and counted.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch

from ..alerts import Alert, AlertWatch, log_alerts
from ..quantities import Step
from ..timeline import IF_EXISTS, Timeline, TimelineWriter, folder_for
from ..timeline.writer import KEPT_BYTES
from .hooks import WarnOnce
from .packet import CudaCopies, HostCopies, HostTask, MeasuredStep, Packet, Row
from .panel import Panel
from .ranks import Join, Layout, Ranks
from .schedule import ProbeBudget

__all__ = ["Record", "Recorder"]

logger = logging.getLogger(__name__)

RING_BYTES = 2**20  # memory of the ring, with a number of slots between these
MIN_SLOTS, MAX_SLOTS = 8, 256
PATIENCE_S = 60.0  # how long reading or closing a timeline waits for a stalled disk
POLL_S = 0.2  # interval at which a waiting caller checks that the thread is alive
KEPT_ROWS = 1024  # finished rows that wait for `Monitor.step`; beyond that the oldest are dropped


@dataclass(eq=False)
class Recorder:
    """Appends packets to a timeline in a thread of its own.

    In a forked child process all methods do nothing: it has neither the thread nor the file. Rows that the disk refuses
    stay in memory. If the thread has died, reading or closing the timeline does its work.
    """

    writer: TimelineWriter
    packet: InitVar[Packet]  # one of the layout that is recorded
    row: Callable[..., dict]  # computes the columns, see `Panel.row`
    warn: WarnOnce
    copies: Any = None  # how packets get to the host; None: as their device needs
    _: KW_ONLY
    # Turns the packet of this process into that of all ranks, in place, for every step in order; returns the number of
    # missing processes. Called with None for a step dropped here, so that other ranks do not wait.
    join: Callable[..., int] | None = None
    # Does the host tasks of quantities in the sums of a packet, before it is joined.
    finish: Callable[[Packet, Sequence[HostTask]], None] | None = None
    # Called with the row of all ranks of every step with a probe run (empty: not known); returns the steps to the next.
    decide: Callable[[dict], int] | None = None
    on_finished: Callable[[Row], None] | None = None  # called with every row that has values, after it was appended
    stores_rows: bool = True  # whether rows are appended
    patience_s: float = PATIENCE_S  # how long reading and closing wait for the thread

    def __post_init__(self, packet: Packet):
        self._without_slot = self._unfinished = 0  # packets that are missing; each is counted by one thread alone
        self.last: Row | None = None  # the row that was finished last
        self._fields = packet.fields
        pinned = packet.data.device.type == "cuda"
        self.copies = self.copies or (CudaCopies(packet.data.device) if pinned else HostCopies())
        slots = min(max(RING_BYTES // packet.data.nbytes, MIN_SLOTS), MAX_SLOTS)
        self._ring = torch.empty(slots, packet.data.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._free = deque(range(slots))
        self._filled: SimpleQueue = SimpleQueue()
        self._owner = os.getpid()
        self._closed = self._hangs = False
        self._thread = threading.Thread(target=self._work, name="inflection_fast timeline", daemon=True)
        self._thread.start()

    def record(self, measured: MeasuredStep, packet: Packet) -> None:
        """Copy the packet as it is now."""
        if os.getpid() != self._owner:
            return
        if not self._thread.is_alive():
            self.warn("thread", "the thread that writes the timeline has died; measuring goes on in memory")
            self._finish_all(store=self.writer.keep)
        if not self._free:
            self._without_slot += 1
            message = f"the timeline cannot be written fast enough: step {measured.step} is missing from it"
            self.warn("dropped", message)
            if self.join is not None:
                self._filled.put((measured, None, None, 0.0))
            return
        slot = self._free.popleft()
        arrival = self.copies.start(self._ring[slot], packet.data)
        self._filled.put((measured, slot, arrival, 1e3 * (perf_counter() - measured.began)))

    def before_overwriting(self) -> None:
        """Call it before the packet is written again."""
        self.copies.before_overwriting()

    @property
    def dropped(self) -> int:
        """Packets without a row: no slot was free on some rank, or computing the row failed."""
        return self._without_slot + self._unfinished

    # ---- the other thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._filled.get()) is not None:
            self._finish(item, self.writer.append)

    def _finish(self, item, store) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        measured, slot, arrival, measure_ms = item
        step, row, decided = measured.step, {}, self.decide is None or not measured.probed
        try:
            if slot is None:
                if self.join is not None:
                    self.join(step, None)
                return
            row = self._row(measured, slot, arrival)
            if not decided and self.decide is not None and row["missing_ranks"] == 0:
                row["probe_every"], decided = float(self.decide(row)), True
            if self.stores_rows:
                store(step, **row, measure_ms=measure_ms)
        except OSError as error:
            self.warn("disk", f"{self.writer.path}: {error}; measuring goes on in memory")
        except Exception as error:
            self._unfinished += slot is not None  # a dropped one was counted already
            self.warn("row", f"step {step} is missing from the timeline: {error!r}")
        finally:
            if not decided and self.decide is not None:
                self.decide({})
            if slot is not None:
                self._free.append(slot)
        if row:
            self.last = Row(step, row | {"measure_ms": measure_ms})
            if self.on_finished is not None:
                self.on_finished(self.last)

    def _row(self, measured: MeasuredStep, slot: int, arrival) -> dict:
        """The columns of a slot, in memory of their own."""
        if arrival is not None:
            arrival.synchronize()
        packet = Packet(self._fields, data=self._ring[slot])
        if measured.later and self.finish is not None:
            self.finish(packet, measured.later)
        missing = 0 if self.join is None else self.join(measured.step, packet, measured.sharded_outputs)
        return self.row(packet, measured.due, alone=missing > 0) | {"missing_ranks": float(missing)}

    def _finish_all(self, store) -> None:
        while not self._filled.empty():
            item = self._filled.get()
            if item is not None:
                self._finish(item, store)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait, up to a limit, until everything recorded so far is in the timeline."""
        if os.getpid() != self._owner or self._closed:
            return
        if threading.current_thread() is self._thread:  # the garbage collector may close a monitor in this thread
            self._finish_all(self.writer.append)
            return
        reached, waited, self._hangs = threading.Event(), 0.0, False
        self._filled.put(reached)
        while not reached.wait(POLL_S):
            waited += POLL_S
            if not self._thread.is_alive():
                self.warn("thread", "the thread that writes the timeline has died; it is written when it is closed")
                self._finish_all(store=self.writer.keep)
            elif waited > self.patience_s:
                self._hangs = True
                hangs = f"writing the timeline hangs for {self.patience_s:.0f} s; its last steps may be missing"
                self.warn("hangs", hangs)
                return

    def close(self) -> None:
        """Finish what was recorded, end the thread and close the file. Safe to call twice."""
        if os.getpid() != self._owner or self._closed:
            return
        self.drain()
        self._closed = True
        self._filled.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(POLL_S if self._hangs else self.patience_s)
            if self._thread.is_alive():
                return  # the disk stalls; `drain` has warned
            # A closed recorder must not keep quantities alive, which may hold the model.
            self.row, self.finish = (lambda *_, **__: {}), None
        try:
            self.writer.close()
        except OSError as error:
            self.warn("disk", f"{self.writer.path}: {error}; its last steps are in memory only")


@dataclass(eq=False)
class Record:
    """The timeline of a monitor, opened when the number of heads is known, and its recorder."""

    out: InitVar[str | os.PathLike | None]  # folder of the file; None: in memory only
    layers: list[str]  # names of the blocks
    panel: Panel  # the quantities, whose columns it has
    resume_at: int | None  # the step from which an existing file is continued; None: there must be none
    watch: AlertWatch | None  # raises alerts; None: no alerts
    on_alert: Callable[[list[Alert]], None] | None
    on_row: Callable[[Row], None] | None  # called with finished rows, by `deliver_rows`
    if_exists: str  # what to do with a timeline in `out`; see `inflection_fast.timeline.folder_for`

    def __post_init__(self, out: str | os.PathLike | None):
        if self.if_exists not in IF_EXISTS:
            raise ValueError(f"if_exists: expected one of {', '.join(IF_EXISTS)}, got {self.if_exists!r}")
        self.folder: Path | None = None if out is None else Path(out)
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)  # which wait for `deliver_rows`
        self._writer: TimelineWriter | None = None
        self._heads, self.writes = 0, True  # whether this process keeps the file
        self.recorder: Recorder | None = None
        self.budget: ProbeBudget | None = None
        self.warn = self.panel.warn = WarnOnce(logger)

    def choose_folder(self, also: tuple[str, ...]) -> None:
        """Choose the folder of a new timeline and of the files `also`, if this process writes one."""
        if self.folder is not None and self.resume_at is None and self.writes:
            self.folder = folder_for(self.folder, self.if_exists, also)

    def is_open(self, heads: int) -> bool:
        """Whether the timeline is open for this number of heads."""
        return self._writer is not None and self._heads == heads

    def open(self, heads: int, meta: dict) -> None:
        """Open the timeline, in memory where this process does not write. `ValueError` if it is of another run."""
        folder = self.folder if self.writes else None
        if self._writer is not None:  # opened with another number of heads; nothing was written yet
            self._writer.close()
            self.resume_at = self.resume_at or 0
        self._writer, self._heads = self._opened(folder, heads, meta), heads

    def open_or_keep(self, heads: int, meta: dict) -> None:
        """As `open`; if the disk refuses, the last rows are kept in memory."""
        try:
            self.open(heads, meta)
        except OSError as error:
            self._warn_disk(error)
            self._writer, self._heads = self._opened(None, heads, meta, keep_bytes=KEPT_BYTES), heads

    def _opened(self, folder: Path | None, heads: int, meta: dict, keep_bytes: int | None = None) -> TimelineWriter:
        writer = TimelineWriter(
            folder,
            layers=self.layers,
            heads=heads,
            meta=meta,
            columns=self.panel.columns,
            axes=self.panel.axes,
            resume_at=self.resume_at,
            keep_bytes=keep_bytes,
        )
        if self.watch is not None:
            self.watch.resume(writer.timeline)
        return writer

    def start(
        self, packet: Packet, layout: Layout, ranks: Ranks | None, probed: Collection[str], rank_timeout_s: float
    ) -> Recorder:
        """Create the recorder of packets like `packet`, joined with those of `ranks`. `open` was called before."""
        if self._writer is None:
            raise RuntimeError("Record.start before open: there is no timeline")
        stores_rows, join, patience_s = layout.writes or self.folder is None, None, PATIENCE_S
        if ranks is not None:
            join = Join(ranks, layout, packet.fields, probed, self.warn)
            patience_s += rank_timeout_s
        # The recorder outlives a monitor that is garbage collected: nothing here may refer to the monitor.
        budget, panel, decide = self.budget, self.panel, None
        if join is not None and budget is not None:
            decide = lambda row: budget.decide(*(_number(row.get(name)) for name in ("probe_ms", "step_ms")))  # noqa: E731
        watch, on_alert = self.watch if layout.writes else None, self.on_alert
        rows = self._rows if layout.writes and self.on_row is not None else deque(maxlen=0)

        def finish(packet: Packet, later: Sequence[HostTask]) -> None:
            took_ms = panel.finish_later(packet, later)
            packet[Step.name]["probe_ms"] += took_ms
            if budget is not None:
                budget.later_ms = took_ms

        def on_finished(row: Row) -> None:
            found = [] if watch is None else watch.push(row.step, row.columns)
            rows.append(replace(row, described=panel.columns, alerts=tuple(found)))
            log_alerts(found, on_alert)

        self.recorder = Recorder(
            self._writer,
            packet,
            self.panel.row,
            self.warn,
            join=join,
            finish=finish,
            decide=decide,
            on_finished=on_finished,
            stores_rows=stores_rows,
            patience_s=patience_s,
        )
        return self.recorder

    @property
    def timeline(self) -> Timeline:
        """All recorded rows; waits for those in the queue. `RuntimeError` before it was opened."""
        if self._writer is None:
            raise RuntimeError("Monitor.timeline before the context was entered: nothing was measured")
        if self.recorder is not None:
            self.recorder.drain()
        return self._writer.timeline

    def scalars(self) -> dict[str, float]:
        """The last row, each column as its mean over the measured places."""
        if self.recorder is None:
            return {}
        self.recorder.drain()
        return {} if self.recorder.last is None else self.recorder.last.scalars()

    def deliver_rows(self) -> None:
        """Call `on_row` with the rows finished since the last call."""
        while self._rows and self.on_row is not None:
            row = self._rows.popleft()
            try:
                self.on_row(row)
            except Exception as error:
                self.warn("on_row", f"on_row failed for the row of step {row.step}: {error!r}")

    @property
    def dropped(self) -> int:
        """Measured steps that are not in the timeline: the disk or a rank was too slow, or a row failed."""
        given_up = 0 if self._writer is None else self._writer.given_up
        return given_up + (0 if self.recorder is None else self.recorder.dropped)

    def close(self) -> None:
        """Finish and close the timeline, which stays readable, and deliver the last rows."""
        if self.recorder is not None:
            self.recorder.close()
        elif self._writer is not None:
            self.guarded(self._writer.close)
        self.deliver_rows()

    def guarded(self, write: Callable[[], None]) -> None:
        """Run a write to the disk; an `OSError` becomes a warning."""
        try:
            write()
        except OSError as error:
            self._warn_disk(error)

    def _warn_disk(self, error: OSError) -> None:
        self.warn("disk", f"{self.folder}: {error}; measuring goes on in memory")


def _number(value) -> float | None:
    return None if value is None or value.mask else float(value)
