"""The way of a packet into the timeline: nothing waits, nothing blocks, nothing is lost silently."""

import errno
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers.packets import TRAINING, packet_of, panel_of

from inflection_fast.measure import recorder as module
from inflection_fast.measure.hooks import WarnOnce
from inflection_fast.measure.packet import MeasuredStep
from inflection_fast.measure.recorder import Recorder
from inflection_fast.timeline import Timeline, TimelineWriter

L, H = 2, 3


@pytest.fixture
def packet():
    return packet_of(L, H, TRAINING)


def writer(folder):
    return TimelineWriter(folder, layers=["a", "b"], heads=H, meta={}, columns=panel_of(TRAINING).columns)


def recorder_of(folder, packet, **settings):
    row = panel_of(TRAINING).row
    return Recorder(writer(folder), packet, row, WarnOnce(logging.getLogger("inflection_fast")), **settings)


def record(recorder, packet, step):
    packet["step"]["loss"].fill_(float(step))
    packet["step"]["losses"].fill_(1)
    recorder.record(of_step(step), packet)


def of_step(step):
    return MeasuredStep(step, frozenset({"step", *TRAINING}), frozenset(), False, 0.0)


class SlowDevice:
    """Copies as a device makes them: begun at once, finished when `finish` says so."""

    def __init__(self):
        self.begun, self.calls = [], []

    def start(self, host, source):
        arrival = threading.Event()
        arrival.synchronize = arrival.wait
        self.begun.append((arrival, host, source.clone()))
        return arrival

    def before_overwriting(self):
        self.calls.append("before_overwriting")

    def finish(self):
        for arrival, host, source in self.begun:
            host.copy_(source)
            arrival.set()
        self.begun.clear()


def test_rows_are_read_when_their_copy_has_arrived_and_nobody_waits(tmp_path, packet):
    device = SlowDevice()
    recorder = recorder_of(tmp_path, packet, copies=device)
    for step in range(5):
        record(recorder, packet, step)  # returns, though no copy has arrived
    assert not Timeline.load(tmp_path).steps.size
    device.finish()
    recorder.drain()
    timeline = Timeline.load(tmp_path)
    assert timeline.steps.tolist() == timeline.loss.tolist() == [0, 1, 2, 3, 4]
    recorder.before_overwriting()
    assert device.calls == ["before_overwriting"]
    recorder.close()


def test_a_full_ring_drops_and_counts_and_says_so_once(tmp_path, packet, caplog, monkeypatch):
    monkeypatch.setattr(module, "RING_BYTES", 0)
    device = SlowDevice()
    recorder = recorder_of(tmp_path, packet, copies=device)
    for step in range(module.MIN_SLOTS + 3):
        record(recorder, packet, step)
    assert recorder.dropped == 3
    device.finish()
    recorder.drain()
    record(recorder, packet, 100)  # slots are free again
    device.finish()
    recorder.close()
    assert Timeline.load(tmp_path).steps.tolist() == [*range(module.MIN_SLOTS), 100]
    assert [r.getMessage() for r in caplog.records] == [
        f"the timeline cannot be written fast enough: step {module.MIN_SLOTS} is missing from it"
    ]


def test_a_slot_that_is_used_again_does_not_change_rows(packet, monkeypatch):
    monkeypatch.setattr(module, "RING_BYTES", 0)
    recorder = recorder_of(None, packet)
    packet["attention"]["rows"].fill_(1.0)
    for step in range(3 * module.MIN_SLOTS):
        packet["attention"]["max_logit"].fill_(step)
        packet["activation_grad"]["squares"].fill_(step**2)
        packet["activation_grad"]["count"].fill_(1)
        record(recorder, packet, step)
        recorder.drain()
    timeline = recorder.writer.timeline
    assert timeline.activation_grad[:, 1].tolist() == timeline.max_logit[:, 1, 2].tolist() == timeline.steps.tolist()
    recorder.close()


def test_a_dead_thread_costs_a_warning_and_no_row(tmp_path, packet, caplog):
    recorder = recorder_of(tmp_path, packet)
    record(recorder, packet, 0)
    recorder.drain()
    recorder._filled.put(None)  # ends the thread
    recorder._thread.join()
    for step in (1, 2):
        record(recorder, packet, step)
    recorder.drain()
    assert recorder.writer.timeline.steps.tolist() == [0, 1, 2]
    record(recorder, packet, 3)
    recorder.close()
    assert Timeline.load(tmp_path).loss.tolist() == [0, 1, 2, 3]
    warnings = [r.getMessage() for r in caplog.records]
    assert warnings == ["the thread that writes the timeline has died; measuring goes on in memory"]


def test_a_row_that_cannot_be_finished_costs_that_row(tmp_path, packet, caplog, monkeypatch):
    append = TimelineWriter.append

    def picky(self, step, **signals):
        if step == 1:
            raise ArithmeticError("no")
        append(self, step, **signals)

    monkeypatch.setattr(TimelineWriter, "append", picky)
    recorder = recorder_of(tmp_path, packet)
    for step in range(3):
        record(recorder, packet, step)
    recorder.close()
    assert Timeline.load(tmp_path).steps.tolist() == [0, 2]
    assert [r.getMessage() for r in caplog.records] == ["step 1 is missing from the timeline: ArithmeticError('no')"]
    assert recorder.dropped == 1


def test_a_disk_that_hangs_does_not_hang_the_end(tmp_path, packet, caplog, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(TimelineWriter, "_write", lambda self, message: released.wait())
    recorder = recorder_of(tmp_path, packet, patience_s=0.3)
    record(recorder, packet, 0)
    recorder.close()
    assert "hangs" in caplog.text and recorder._thread.is_alive()
    released.set()
    recorder._thread.join()


def test_the_thread_itself_may_close(tmp_path, packet, monkeypatch):
    """The garbage collector runs in any thread, and closes the recorder of a monitor that it finds thrown away."""
    append = TimelineWriter.append

    def collecting(self, step, **signals):
        append(self, step, **signals)
        if step == 1:
            recorder.close()

    monkeypatch.setattr(TimelineWriter, "append", collecting)
    recorder = recorder_of(tmp_path, packet, copies=(device := SlowDevice()))
    for step in range(4):
        record(recorder, packet, step)
    device.finish()
    recorder._thread.join(30)
    assert not recorder._thread.is_alive() and Timeline.load(tmp_path).steps.tolist() == [0, 1, 2, 3]


def test_a_full_disk_that_empties_loses_nothing(tmp_path, packet, caplog, monkeypatch):
    write, full = TimelineWriter._write, [True]

    def failing(self, message):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, message)

    monkeypatch.setattr(TimelineWriter, "_write", failing)
    recorder = recorder_of(tmp_path, packet)
    for step in range(3):
        record(recorder, packet, step)
    recorder.drain()
    full[0] = False
    record(recorder, packet, 3)
    recorder.close()
    assert Timeline.load(tmp_path).steps.tolist() == [0, 1, 2, 3]
    assert len(caplog.records) == 1 and "No space left" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_touches_neither_the_file_nor_the_thread(tmp_path, packet):
    recorder = recorder_of(tmp_path, packet)
    record(recorder, packet, 0)
    recorder.drain()
    data = (tmp_path / "timeline.arrows").read_bytes()
    child = os.fork()
    if child == 0:  # a worker of a data loader, which leaves through every door that there is
        try:
            recorder.record(of_step(1), packet)
            recorder.drain()
            recorder.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "timeline.arrows").read_bytes() == data
    record(recorder, packet, 2)
    recorder.close()
    assert Timeline.load(tmp_path).steps.tolist() == [0, 2]


def test_pieces_of_the_ring_are_as_many_as_fit(packet):
    large = packet_of(126, 128, TRAINING)  # 405B
    for one, slots in ((packet, module.MAX_SLOTS), (large, module.MIN_SLOTS)):
        recorder = recorder_of(None, one)
        assert len(recorder._free) == slots
        recorder.close()
    assert large.data.nbytes < 2**20


def test_a_process_that_ends_without_closing_keeps_what_it_measured(tmp_path):
    """Ctrl-C ends the interpreter in order, a kill does not: rows that were drained are there in both cases."""
    code = (
        "import os, sys, logging\n"
        "from inflection_fast.measure import MonitorConfig\n"
        "from inflection_fast.timeline import TimelineWriter\n"
        "from inflection_fast.measure.hooks import WarnOnce\n"
        "from inflection_fast.measure.packet import MeasuredStep, Packet\n"
        "from inflection_fast.measure.panel import Panel\n"
        "from inflection_fast.measure.recorder import Recorder\n"
        "panel = Panel(MonitorConfig().instances())\n"
        "packet = Packet(panel.fields(1, 1))\n"
        "out = TimelineWriter(sys.argv[1], layers=['a'], heads=1, meta={}, columns=panel.columns)\n"
        "recorder = Recorder(out, packet, panel.row, WarnOnce(logging.getLogger()))\n"
        "for step in range(4): recorder.record(MeasuredStep(step, frozenset(), frozenset(), False, 0.0), packet)\n"
        "recorder.drain()\n"
        "os.kill(os.getpid(), int(sys.argv[2]))\n"
    )
    for signal in (9, 2):
        folder = tmp_path / str(signal)
        command = [sys.executable, "-c", code, str(folder), str(signal)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(command, env=environment, capture_output=True)
        assert ended.returncode != 0
        assert Timeline.load(folder).steps.tolist() == [0, 1, 2, 3]


def test_copies_on_a_device_run_beside_its_stream_and_only_the_device_waits(monkeypatch):
    """The order of what is put on streams, seen by stand-ins for them: no call here makes the host wait."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            told.append(f"{self.name} waits for the event")

        def __enter__(self):
            told.append(f"on {self.name}")

        def __exit__(self, *exception):
            told.append(f"off {self.name}")

    class Event:
        def __init__(self, blocking):
            assert blocking  # whoever waits for it sleeps instead of spinning

        def record(self, stream):
            told.append(f"event on {stream.name}")

    class Host:
        def copy_(self, source, non_blocking):
            assert non_blocking
            told.append(f"copy {source}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    copies = module.CudaCopies("cuda")
    copies.before_overwriting()  # nothing was copied yet
    assert told == []
    copies.start(Host(), "packet")
    copies.before_overwriting()
    assert told == [
        "side waits for main", "on side", "copy packet", "event on side", "off side",
        "main waits for the event",
    ]  # fmt: skip
