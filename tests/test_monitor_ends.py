"""How a monitor ends: closed, forgotten, its model thrown away, its process forked or interrupted."""

import gc
import logging
import os
import subprocess
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import programs
from helpers.monitored import EVERY_STEP, train
from helpers.tiny_models import loss_of, model_and_batch, one_thread  # noqa: F401

from inflection_fast.measure import Monitor
from inflection_fast.timeline import Timeline


def test_a_closed_monitor_holds_no_model():
    model, batch = model_and_batch("bert")
    monitor = train(model, batch, 2, probe=[batch])
    alive = weakref.ref(model.bert.encoder.layer[0]), weakref.ref(model)
    del model
    gc.collect()
    assert [one() for one in alive] == [None, None]
    assert monitor.timeline.steps.tolist() == [0, 1]
    assert [block.name for block in monitor.blocks] == [f"bert.encoder.layer.{i}" for i in range(3)]


def test_a_model_that_is_thrown_away_under_an_open_monitor_stops_nothing(caplog):
    model, batch = model_and_batch("bert")
    with Monitor(model, EVERY_STEP) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
        del model
        gc.collect()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                monitor.step()
    assert np.isfinite(monitor.timeline.entropy).all((1, 2)).tolist() == [True, False, False, False]
    assert len(caplog.records) == 1 and "saw no training forward" in caplog.text


def test_a_monitor_that_is_thrown_away_detaches_and_finishes_its_file(tmp_path):
    model, batch = model_and_batch("bert")
    monitor = Monitor(model, EVERY_STEP, tmp_path).__enter__()
    loss_of(model(**batch)).backward()
    monitor.step()
    thread, alive = monitor._record.recorder._thread, weakref.ref(monitor)
    assert thread.is_alive() and any(module._forward_hooks for module in model.modules())
    gc.disable()  # it holds nothing that holds it, so no collection, whose time and thread nobody knows, is waited for
    try:
        del monitor
        assert alive() is None
    finally:
        gc.enable()
    assert Timeline.load(tmp_path).steps.tolist() == [0]
    assert not any(module._forward_hooks for module in model.modules())
    assert not thread.is_alive()


def test_a_model_that_is_saved_as_a_whole_takes_hooks_along_that_do_nothing(tmp_path):
    model, batch = model_and_batch("bert")
    with Monitor(model, EVERY_STEP) as monitor:
        for _ in range(2):
            expected = loss_of(model(**batch))
            expected.backward()
            monitor.step()
            torch.save(model, tmp_path / "whole.pt")  # the next step is a measured one
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert again.bert.encoder.layer[0]._forward_hooks
    assert torch.equal(loss_of(again(**batch)), expected)
    assert monitor.timeline.steps.tolist() == [0, 1] and np.isfinite(monitor.timeline.entropy).all()


def test_a_monitor_that_is_collected_while_another_one_attaches_does_not_hang():
    from inflection_fast.measure import hooks

    forgotten = hooks.force_eager()
    forgotten.__enter__()

    def attach():
        with hooks._lock:  # a collection may come at any time
            forgotten.__exit__(None, None, None)

    thread = threading.Thread(target=attach, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_of_a_data_loader_leave_the_timeline_alone(tmp_path):
    model, batch = model_and_batch("bert")
    rows = [{name: value[i] for name, value in batch.items()} for i in range(3)]
    with Monitor(model, EVERY_STEP, tmp_path) as monitor:
        for _ in range(2):  # the second loader is forked while the thread runs
            loader = torch.utils.data.DataLoader(rows, batch_size=3, num_workers=1, multiprocessing_context="fork")
            for one in loader:
                loss_of(model(**one)).backward()
                monitor.step()
    assert Timeline.load(tmp_path).steps.tolist() == [0, 1]


def test_a_killed_run_keeps_what_was_written_and_is_continued_there(tmp_path):
    code = (
        "import os, sys, torch\n"
        "from helpers.tiny_models import model_and_batch\n"
        "from inflection_fast import Monitor, MonitorConfig\n"
        "model, batch = model_and_batch('bert')\n"
        "with Monitor(model, MonitorConfig(every=1, rows=5), sys.argv[1]) as monitor:\n"
        "    for step in range(6):\n"
        "        model(**batch)['loss'].backward()\n"
        "        monitor.step()\n"
        "        if step == 3: monitor.timeline\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "out"
    ended = programs.run(["-c", code, out], tmp_path)
    assert ended.returncode == -9, ended.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last row may be torn
        kept = Timeline.load(out).steps.tolist()
    assert kept == list(range(len(kept))) and 4 <= len(kept) <= 6
    model, batch = model_and_batch("bert")
    with Monitor(model, EVERY_STEP, out, start_step=3) as monitor:  # the checkpoint is older than the file
        loss_of(model(**batch)).backward()
        monitor.step()
    assert Timeline.load(out).steps.tolist() == [0, 1, 2, 3]


def test_ctrl_c_keeps_every_step_that_was_measured(tmp_path):
    code = (
        "import sys, torch\n"
        "from helpers.loops_to_exec import Net, batches\n"
        "from inflection_fast import Monitor, MonitorConfig\n"
        "model = Net()\n"
        "monitor = Monitor(model, MonitorConfig(every=1), sys.argv[1]).__enter__()\n"  # nobody closes it
        "for x, y in batches(6):\n"
        "    torch.nn.functional.cross_entropy(model(x), y).backward()\n"
        "    monitor.step()\n"
        "raise KeyboardInterrupt\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True)
    assert ended.returncode != 0 and b"KeyboardInterrupt" in ended.stderr
    timeline = Timeline.load(tmp_path)
    assert timeline.steps.tolist() == [0, 1, 2, 3, 4, 5] and not timeline.truncated
