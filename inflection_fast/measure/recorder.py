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
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

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


class Recorder:
    """Appends packets to a timeline in a thread of its own.

    In a forked child process all methods do nothing: it has neither the thread nor the file. Rows that the disk refuses
    stay in memory. If the thread has died, reading or closing the timeline does its work.

    Args:
        writer: of the timeline.
        packet: one of the layout that is recorded.
        row: computes the columns, see `Panel.row`.
        warn: logs each kind of warning once.
        copies: how packets get to the host.
        join: turns the packet of this process into that of all ranks, in place, for every step in order; returns the
            number of missing processes. Called with None for a step dropped here, so that other ranks do not wait.
        finish: does the host tasks of quantities in the sums of a packet, before it is joined.
        decide: called with the row of all ranks of every step with a probe run (empty: not known); returns the steps
            to the next run.
        on_finished: called with every row that has values, after it was appended.
        stores_rows: whether rows are appended.
        patience_s: how long reading and closing wait for the thread.
    """

    def __init__(
        self,
        writer: TimelineWriter,
        packet: Packet,
        row: Callable[..., dict],
        warn: WarnOnce,
        copies=None,
        *,
        join: Callable[..., int] | None = None,
        finish: Callable[[Packet, Sequence[HostTask]], None] | None = None,
        decide: Callable[[dict], int] | None = None,
        on_finished: Callable[[Row], None] | None = None,
        stores_rows: bool = True,
        patience_s: float = PATIENCE_S,
    ):
        self._without_slot = self._unfinished = 0  # packets that are missing; each is counted by one thread alone
        self._decide, self._finish_later = decide, finish
        self.last: Row | None = None  # the row that was finished last
        self._join, self._on_finished, self._stores_rows, self._patience_s = join, on_finished, stores_rows, patience_s
        self._writer, self._fields, self._row_of, self._warn = writer, packet.fields, row, warn
        pinned = packet.data.device.type == "cuda"
        self._copies = copies or (CudaCopies(packet.data.device) if pinned else HostCopies())
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
            self._warn("thread", "the thread that writes the timeline has died; measuring goes on in memory")
            self._finish_all(store=self._writer.keep)
        if not self._free:
            self._without_slot += 1
            message = f"the timeline cannot be written fast enough: step {measured.step} is missing from it"
            self._warn("dropped", message)
            if self._join is not None:
                self._filled.put((measured, None, None, 0.0))
            return
        slot = self._free.popleft()
        arrival = self._copies.start(self._ring[slot], packet.data)
        self._filled.put((measured, slot, arrival, 1e3 * (perf_counter() - measured.began)))

    def before_overwriting(self) -> None:
        """Call it before the packet is written again."""
        self._copies.before_overwriting()

    @property
    def dropped(self) -> int:
        """Packets without a row: no slot was free on some rank, or computing the row failed."""
        return self._without_slot + self._unfinished

    # ---- the other thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._filled.get()) is not None:
            self._finish(item, self._writer.append)

    def _finish(self, item, store) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        measured, slot, arrival, measure_ms = item
        step, row, decided = measured.step, {}, self._decide is None or not measured.probed
        try:
            if slot is None:
                if self._join is not None:
                    self._join(step, None)
                return
            row = self._row(measured, slot, arrival)
            if not decided and self._decide is not None and row["missing_ranks"] == 0:
                row["probe_every"], decided = float(self._decide(row)), True
            if self._stores_rows:
                store(step, **row, measure_ms=measure_ms)
        except OSError as error:
            self._warn("disk", f"{self._writer.path}: {error}; measuring goes on in memory")
        except Exception as error:
            self._unfinished += slot is not None  # a dropped one was counted already
            self._warn("row", f"step {step} is missing from the timeline: {error!r}")
        finally:
            if not decided and self._decide is not None:
                self._decide({})
            if slot is not None:
                self._free.append(slot)
        if row:
            self.last = Row(step, row | {"measure_ms": measure_ms})
            if self._on_finished is not None:
                self._on_finished(self.last)

    def _row(self, measured: MeasuredStep, slot: int, arrival) -> dict:
        """The columns of a slot, in memory of their own."""
        if arrival is not None:
            arrival.synchronize()
        packet = Packet(self._fields, data=self._ring[slot])
        if measured.later and self._finish_later is not None:
            self._finish_later(packet, measured.later)
        missing = 0 if self._join is None else self._join(measured.step, packet, measured.sharded_outputs)
        return self._row_of(packet, measured.due, alone=missing > 0) | {"missing_ranks": float(missing)}

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
            self._finish_all(self._writer.append)
            return
        reached, waited, self._hangs = threading.Event(), 0.0, False
        self._filled.put(reached)
        while not reached.wait(POLL_S):
            waited += POLL_S
            if not self._thread.is_alive():
                self._warn("thread", "the thread that writes the timeline has died; it is written when it is closed")
                self._finish_all(store=self._writer.keep)
            elif waited > self._patience_s:
                self._hangs = True
                hangs = f"writing the timeline hangs for {self._patience_s:.0f} s; its last steps may be missing"
                self._warn("hangs", hangs)
                return

    def close(self) -> None:
        """Finish what was recorded, end the thread and close the file. Safe to call twice."""
        if os.getpid() != self._owner or self._closed:
            return
        self.drain()
        self._closed = True
        self._filled.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(POLL_S if self._hangs else self._patience_s)
            if self._thread.is_alive():
                return  # the disk stalls; `drain` has warned
            # A closed recorder must not keep quantities alive, which may hold the model.
            self._row_of, self._finish_later = (lambda *_, **__: {}), None
        try:
            self._writer.close()
        except OSError as error:
            self._warn("disk", f"{self._writer.path}: {error}; its last steps are in memory only")


class Record:
    """The timeline of a monitor, opened when the number of heads is known, and its recorder.

    Args:
        out: folder of the file; None: in memory only.
        layers: names of the blocks.
        panel: the quantities, whose columns it has.
        resume_at: the step from which an existing file is continued; None: there must be none.
        watch: raises alerts; None: no alerts.
        on_alert: called with alerts.
        on_row: called with finished rows, by `deliver_rows`.
        if_exists: what to do with a timeline in `out`; see `inflection_fast.timeline.folder_for`.
    """

    def __init__(
        self,
        out: str | os.PathLike | None,
        layers: list[str],
        panel: Panel,
        resume_at: int | None,
        watch: AlertWatch | None,
        on_alert: Callable[[list[Alert]], None] | None,
        on_row: Callable[[Row], None] | None,
        if_exists: str,
    ):
        if if_exists not in IF_EXISTS:
            raise ValueError(f"if_exists: expected one of {', '.join(IF_EXISTS)}, got {if_exists!r}")
        self._layers, self._resume_at = layers, resume_at
        self.folder: Path | None = None if out is None else Path(out)
        self._if_exists, self._on_row = if_exists, on_row
        self._panel, self._watch, self._on_alert = panel, watch, on_alert
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)  # which wait for `deliver_rows`
        self._writer: TimelineWriter | None = None
        self._heads, self.writes = 0, True  # whether this process keeps the file
        self.recorder: Recorder | None = None
        self.budget: ProbeBudget | None = None
        self.warn = panel.warn = WarnOnce(logger)

    def choose_folder(self, also: tuple[str, ...]) -> None:
        """Choose the folder of a new timeline and of the files `also`, if this process writes one."""
        if self.folder is not None and self._resume_at is None and self.writes:
            self.folder = folder_for(self.folder, self._if_exists, also)

    def is_open(self, heads: int) -> bool:
        """Whether the timeline is open for this number of heads."""
        return self._writer is not None and self._heads == heads

    def open(self, heads: int, meta: dict) -> None:
        """Open the timeline, in memory where this process does not write. `ValueError` if it is of another run."""
        folder = self.folder if self.writes else None
        if self._writer is not None:  # opened with another number of heads; nothing was written yet
            self._writer.close()
            self._resume_at = self._resume_at or 0
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
            layers=self._layers,
            heads=heads,
            meta=meta,
            columns=self._panel.columns,
            axes=self._panel.axes,
            resume_at=self._resume_at,
            keep_bytes=keep_bytes,
        )
        if self._watch is not None:
            self._watch.resume(writer.timeline)
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
        budget, panel, decide = self.budget, self._panel, None
        if join is not None and budget is not None:
            decide = lambda row: budget.decide(*(_number(row.get(name)) for name in ("probe_ms", "step_ms")))  # noqa: E731
        watch, on_alert = self._watch if layout.writes else None, self._on_alert
        rows = self._rows if layout.writes and self._on_row is not None else deque(maxlen=0)

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
            self._panel.row,
            self.warn,
            join=join,
            finish=finish,
            decide=decide,
            on_finished=on_finished,
            stores_rows=stores_rows,
            patience_s=patience_s,
        )
        return self.recorder

    def record(self, measured: MeasuredStep, packet: Packet) -> None:
        """Copy the packet as it is now; see `Recorder`."""
        if self.recorder is not None:
            self.recorder.record(measured, packet)

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
        while self._rows and self._on_row is not None:
            row = self._rows.popleft()
            try:
                self._on_row(row)
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
