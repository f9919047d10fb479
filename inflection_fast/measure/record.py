"""Where measured steps go: the timeline, the thread that writes it, and the alerts that it raises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ..alerts import Alert, AlertWatch, log_alerts
from ..timeline import Timeline, TimelineWriter
from ..timeline.writer import KEPT_BYTES
from .distributed import Join, Layout, Ranks
from .packet import Packet
from .recorder import PATIENCE_S, Recorder, WarnOnce

__all__ = ["Record"]

logger = logging.getLogger(__name__)


class Record:
    """The timeline of a monitor, opened when the number of heads is known, and its recorder, made with the packet.

    Args:
        out: folder of the file; None: in memory only.
        layers: names of the blocks.
        resume_at: the step from which an existing file is continued; None: there must be none.
        watch: raises alerts; None: there are none.
        on_alert: called with them.
    """

    def __init__(
        self,
        out: Path | None,
        layers: list[str],
        resume_at: int | None,
        watch: AlertWatch | None,
        on_alert: Callable[[list[Alert]], None] | None,
    ):
        self._out, self._layers, self._resume_at = out, layers, resume_at
        self._watch, self._on_alert = watch, on_alert
        self._writer: TimelineWriter | None = None
        self.recorder: Recorder | None = None
        self.warn = WarnOnce(logger)

    @property
    def is_open(self) -> bool:
        """Whether there is a timeline already."""
        return self._writer is not None

    def open(self, heads: int, meta: dict, *, writes: bool = True) -> None:
        """Open the timeline, in memory where this process does not write. `ValueError` if it is of another run.

        `OSError` if the disk refuses.
        """
        self._writer = self._opened(self._out if writes else None, heads, meta)

    def open_or_keep(self, heads: int, meta: dict, *, writes: bool = True) -> None:
        """As `open`; a disk that refuses costs the file, not the training: the last rows are kept in memory."""
        self.guarded(lambda: self.open(heads, meta, writes=writes))
        if self._writer is None:
            self._writer = self._opened(None, heads, meta, keep_bytes=KEPT_BYTES)

    def _opened(self, folder: Path | None, heads: int, meta: dict, **options) -> TimelineWriter:
        writer = TimelineWriter(
            folder, layers=self._layers, heads=heads, meta=meta, resume_at=self._resume_at, **options
        )
        if self._watch is not None:
            self._watch.resume(writer.timeline)
        return writer

    def start(
        self, packet: Packet, layout: Layout, ranks: Ranks | None, sharded_outputs: set[int], rank_timeout_s: float
    ) -> None:
        """Record `packet` from now on, joined with those of `ranks`."""
        keeps, join, patience_s = layout.writes or self._out is None, None, PATIENCE_S
        if ranks is not None:
            join = Join(ranks, layout, packet, sharded_outputs, self.warn)
            patience_s += rank_timeout_s
        # The recorder outlives a monitor that is forgotten: nothing here may hold on to it.
        watch, on_alert = self._watch if layout.writes else None, self._on_alert
        told = None if watch is None else lambda step, row: log_alerts(watch.push(step, row), on_alert)
        self.recorder = Recorder(
            self._writer, packet, self.warn, join=join, told=told, keeps=keeps, patience_s=patience_s
        )

    @property
    def timeline(self) -> Timeline:
        """All that was recorded, waiting for what is on its way. `RuntimeError` before it was opened."""
        if self._writer is None:
            raise RuntimeError("Monitor.timeline before the context was entered: nothing was measured")
        if self.recorder is not None:
            self.recorder.drain()
        return self._writer.timeline

    @property
    def dropped(self) -> int:
        """Measured steps that are missing from the timeline: the disk or a rank was too slow, or a row failed."""
        given_up = 0 if self._writer is None else self._writer.given_up
        return given_up + (0 if self.recorder is None else self.recorder.dropped)

    def close(self) -> None:
        """Finish and close the timeline, which stays readable."""
        if self.recorder is not None:
            self.recorder.close()
        elif self._writer is not None:
            self.guarded(self._writer.close)

    def guarded(self, write: Callable[[], None]) -> None:
        """Run a write to the disk; one that is refused is told."""
        try:
            write()
        except OSError as error:
            self.warn("disk", f"{self._out}: {error}; measuring goes on in memory")
