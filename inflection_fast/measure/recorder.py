"""The way of a packet from the device into the timeline, on which the training never waits.

The training's thread starts a copy into a free slot of a ring and goes on; a second thread waits for the copy, finishes
the numbers and appends them. Where no slot is free, because the disk stalls, the packet is dropped and counted.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter

import torch
from torch import Tensor

from ..timeline import TimelineWriter
from .packet import Packet, row_of

__all__ = ["Recorder", "WarnOnce"]

RING_BYTES = 2**20  # of memory for the ring, if that gives a number of slots between these
MIN_SLOTS, MAX_SLOTS = 8, 256
PATIENCE_S = 60.0  # how long reading or closing a timeline waits for a disk that hangs
POLL_S = 0.2  # how often somebody who waits looks whether the thread still lives


class WarnOnce:
    """Warnings of a run, each kind once: what fails in one step fails in thousands."""

    def __init__(self, logger: logging.Logger):
        self._logger, self._given = logger, set()

    def __call__(self, kind: str, message: str) -> None:
        """Log `message` unless one of its kind was logged before."""
        if kind not in self._given:
            self._given.add(kind)
            self._logger.warning("%s", message)


class HostCopies:
    """Copies within the memory of the host, which are there at once."""

    def start(self, host: Tensor, source: Tensor) -> None:
        """Copy `source` into `host`; nothing to wait for afterwards."""
        host.copy_(source)

    def before_overwriting(self) -> None:
        """The source may be written again."""


class CudaCopies:
    """Copies into pinned memory on a stream of their own, so that the stream of the training does not wait for them."""

    def __init__(self, device: torch.device):
        self._device, self._stream, self._last = device, torch.cuda.Stream(device), None

    def start(self, host: Tensor, source: Tensor) -> torch.cuda.Event:
        """Begin to copy `source` into `host`, which is pinned, and return the event that ends it."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
            self._last = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            self._last.record(self._stream)
        return self._last

    def before_overwriting(self) -> None:
        """Make the device, not the host, finish the copy before it writes to its source again."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)


class Recorder:
    """Appends packets to a timeline from a thread of its own.

    A child process that was forked owns neither the thread nor the file: there, all methods do nothing. When the disk
    refuses rows they stay in memory, and when the thread has died, whoever reads or closes the timeline does its work.
    """

    def __init__(
        self,
        writer: TimelineWriter,
        packet: Packet,
        warn: WarnOnce,
        copies=None,
        *,
        join: Callable[[int, Packet | None], int] | None = None,
        told: Callable[[int, dict], None] | None = None,
        keeps: bool = True,
        patience_s: float = PATIENCE_S,
    ):
        """Record `packet`.

        Args:
            writer: of the timeline.
            packet: what the training's thread fills.
            warn: once of each kind.
            copies: how packets come to the host.
            join: makes the packet of this process that of all, in place, for every step in order, and returns how many
                processes are missing from it; called with None for a step that was dropped here, which the others must
                not wait for.
            told: called with the measured signals of every step that has any, after it was appended.
            keeps: whether rows are appended at all.
            patience_s: how long reading and closing wait for the thread.
        """
        self._without_slot = self._unfinished = 0  # packets that are missing; each is counted by one thread alone
        self._join, self._told, self._keeps, self._patience_s = join, told, keeps, patience_s
        self._writer, self._packet, self._warn = writer, packet, warn
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

    def record(self, step: int, began: float) -> None:
        """Copy the packet as it is now; its row is that of `step`, whose measuring `began` at that `perf_counter`."""
        if os.getpid() != self._owner:
            return
        if not self._thread.is_alive():
            self._warn("thread", "the thread that writes the timeline has died; measuring goes on in memory")
            self._finish_all(store=self._writer.keep)
        if not self._free:
            self._without_slot += 1
            self._warn("dropped", f"the timeline cannot be written fast enough: step {step} is missing from it")
            if self._join is not None:
                self._filled.put((None, None, step, 0.0))
            return
        slot = self._free.popleft()
        arrival = self._copies.start(self._ring[slot], self._packet.data)
        self._filled.put((slot, arrival, step, 1e3 * (perf_counter() - began)))

    def before_overwriting(self) -> None:
        """Call it before the packet is written again."""
        self._copies.before_overwriting()

    @property
    def dropped(self) -> int:
        """Packets that are in no row: no slot was free, here or in a process that is joined, or finishing failed."""
        return self._without_slot + self._unfinished

    # ---- the other thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._filled.get()) is not None:
            self._finish(item, self._writer.append)

    def _finish(self, item, store) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        slot, arrival, step, measure_ms = item
        measured = ()
        try:
            if slot is None:
                self._join(step, None)
                return
            row, measured = self._row(slot, arrival, step)
            if self._keeps:
                store(step, **row, measure_ms=measure_ms)
        except OSError as error:
            self._warn("disk", f"{self._writer.path}: {error}; measuring goes on in memory")
        except Exception as error:
            self._unfinished += slot is not None  # else it was counted when it was dropped
            self._warn("row", f"step {step} is missing from the timeline: {error!r}")
        finally:
            if slot is not None:
                self._free.append(slot)
        if self._told is not None and measured:
            self._told(step, {name: row[name] for name in measured})

    def _row(self, slot: int, arrival, step: int) -> tuple[dict, set[str]]:
        """The finished numbers in a slot, which do not refer to its memory, and which of them were measured."""
        if arrival is not None:
            arrival.synchronize()
        packet = Packet.like(self._packet, self._ring[slot])
        missing = 0 if self._join is None else self._join(step, packet)
        row = row_of(packet.data.numpy(), packet.layers, packet.heads, probe=packet.probe)
        return row | {"missing_ranks": missing}, packet.measured() | {"missing_ranks"}

    def _finish_all(self, store) -> None:
        while not self._filled.empty():
            item = self._filled.get()
            if item is not None:
                self._finish(item, store)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Wait until everything recorded so far is in the timeline, but not for ever."""
        if os.getpid() != self._owner or self._closed:
            return
        if threading.current_thread() is self._thread:  # where the garbage collector may run, and end a monitor
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
                return  # it hangs in the disk, which `drain` has told
        try:
            self._writer.close()
        except OSError as error:
            self._warn("disk", f"{self._writer.path}: {error}; its last steps are in memory only")
