"""`inflection-fast exec`: scripts that know nothing of the monitor are measured."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import programs
from helpers.loops_to_exec import Net, batches
from helpers.rank_processes import free_port
from torch import nn

from inflection_fast import Monitor, MonitorConfig, Timeline
from inflection_fast.integrations import launch
from inflection_fast.integrations.loops import LoopMonitor

HERE = Path(__file__).parent
SCRIPT = str(HERE / "helpers" / "loops_to_exec.py")
PYTHON = [sys.executable, SCRIPT]


LAUNCH = {"num_processes": "1", "num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}


def run(name, folder):
    """The finished process of a command under exec."""
    words, options, environment = [*PYTHON, name, str(folder)], ("--every", "2"), {"PYTHONPATH": [str(HERE)]}
    if name == "distributed":
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words[1:]]
    elif name == "accelerate":
        settings = [word for item in LAUNCH.items() for word in (f"--{item[0]}", item[1])]
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *settings, *words[1:]]
        options = ("--every", "1")
    elif name == "llama_factory":
        arguments = {"output_dir": str(folder / "run"), "max_steps": 3, "use_cpu": True, "report_to": "none"}
        (folder / "a.yaml").write_text(yaml.safe_dump({**arguments, "save_strategy": "no", "disable_tqdm": True}))
        words = [sys.executable, "-m", "helpers.llama_factory", "train", str(folder / "a.yaml")]
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port())}
    elif name == "collapse":
        options = ("--every", "1", "--fail-on", "max_logit")
    elif name == "nothing":
        (folder / "sitecustomize.py").write_text("print('mine')\n")
        options, environment = ("--fail-on", "any"), {"PYTHONPATH": [str(folder)]}
    path = os.pathsep.join(filter(None, [*environment.pop("PYTHONPATH"), os.environ.get("PYTHONPATH")]))
    words = ["-m", "inflection_fast", "exec", *options, "--out", folder / "out", "--", *words]
    return programs.run(
        words, folder, environment={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """By name, the folder and the finished process of a command under exec. All start at once, two of them run."""
    names = ("distributed", "both", "accelerate", "llama_factory", "collapse", "nothing")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    pool = ThreadPoolExecutor(2)
    runs = {name: pool.submit(run, name, folder) for name, folder in folders.items()}
    yield lambda name: (folders[name], runs[name].result())
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def truth():
    """The steps of the bare loop, measured by hand."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, MonitorConfig(every=2)) as monitor:
        for x, y in batches():
            nn.functional.cross_entropy(model(x), y).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline


def assert_same(timeline, truth, ranks=1):
    assert timeline.steps.tolist() == truth.steps.tolist()
    # Ranks that see the same batch have each of its outputs twice, and half of the gradient at each of them.
    scales = {"entropy": 1.0, "activation_grad": ranks**-0.5, "parameter_grad": 1.0}
    for name, scale in scales.items():
        np.testing.assert_allclose(getattr(timeline, name), scale * getattr(truth, name), rtol=1e-4, err_msg=name)


def test_torchrun_is_measured_over_its_processes_as_by_hand_and_three_lines_are_printed(truth, finished):
    folder, done = finished("distributed")
    assert done.returncode == 0, done.stderr
    assert "the script ran to its end" in done.stdout
    assert_same(Timeline.load(folder / "out"), truth, ranks=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("inflection-fast: ")]
    assert len(said) == 3 and said[0] == "inflection-fast: No alert was raised.", done.stderr
    assert said[1].startswith("inflection-fast: why: ") and said[2].startswith("inflection-fast: next: ")
    assert str(folder / "out") in said[2]


def test_lightning_and_the_trainer_are_measured_by_their_callbacks_each_into_a_folder(truth, finished):
    folder, done = finished("both")
    assert done.returncode == 0, done.stderr
    assert_same(Timeline.load(folder / "out"), truth)
    timeline = Timeline.load(folder / "out-2")
    assert timeline.steps.tolist() == [0, 2] and np.isfinite(timeline.loss).all()
    assert "training 1 of 2: No alert" in done.stderr and "training 2 of 2: No alert" in done.stderr


def test_accelerate_launch_counts_optimizer_steps_and_takes_the_loss_that_was_differentiated(finished):
    folder, done = finished("accelerate")
    assert done.returncode == 0, done.stderr
    timeline = Timeline.load(folder / "out")
    assert timeline.steps.tolist() == [0, 1, 2, 3]  # eight micro-batches
    assert (timeline.parameter_grad > 1e-2).all()  # before clipping to 1e-3
    torch.manual_seed(0)
    model = Net()
    losses = [nn.functional.cross_entropy(model(x), y).item() for x, y in batches(2)]
    assert timeline.loss[0] == pytest.approx(np.mean(losses), rel=1e-5), (timeline.loss, losses)


def test_llama_factory_is_measured_through_the_torchrun_that_it_starts(finished):
    """A stand-in of its launcher, which passes the environment on."""
    folder, done = finished("llama_factory")
    assert done.returncode == 0, done.stderr
    timeline = Timeline.load(folder / "out")
    assert timeline.steps.tolist() == [0, 2] and np.isfinite(timeline.loss).all()


def test_an_alert_to_fail_on_sets_the_exit_status(finished):
    folder, done = finished("collapse")
    assert done.returncode == 3 and "because of: max_logit" in done.stderr, done.stderr
    assert "the script ran to its end" in done.stdout and "was raised: " in done.stderr.replace(
        "were raised", "was raised"
    )
    assert launch._alerted([folder / "out"], ["rank_lost"]) == 0
    assert launch._alerted([folder / "out"], ["any"]) == launch._alerted([folder / "out"], ["max_logit"]) == 3


def test_a_script_that_trains_nothing_is_said_in_one_sentence_and_keeps_its_status(finished):
    """And a sitecustomize of its own is run, though ours hides it."""
    _, done = finished("nothing")
    assert done.returncode == 5 and done.stdout.splitlines()[-2:] == ["mine", "no training here"]
    assert done.stderr.count("inflection-fast: ") == 1 and "nothing was measured: the command trained no" in done.stderr


def test_misuse_is_named(tmp_path, capsys):
    assert launch.command(["--out", str(tmp_path), "--", "/no/such/command"]) == 127
    assert "the command cannot be run" in capsys.readouterr().err
    for words, sentence in (([], "expected -- and a command"), (["--every", "0", "--", "true"], "at least 1, got '0'")):
        with pytest.raises(SystemExit) as stopped:
            launch.command(words)
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


# ---- the loop monitor itself -----------------------------------------------------------------------------------------


def test_a_gradient_scaler_ends_the_step_once_and_its_scale_is_taken_out(truth):
    torch.manual_seed(0)
    loops = LoopMonitor(MonitorConfig(every=2))
    model = Net()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    calls = nn.Module.__call__, torch.optim.Optimizer.__init__, torch.amp.GradScaler.step
    loops.start()
    for x, y in batches():
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    loops.close()
    assert_same(loops.monitor.timeline, truth)
    assert loops.monitor.timeline.skipped.tolist() == [0, 0]
    assert calls == (nn.Module.__call__, torch.optim.Optimizer.__init__, torch.amp.GradScaler.step)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_closure_ends_the_step_after_it_ran(truth):
    torch.manual_seed(0)
    loops = LoopMonitor(MonitorConfig(every=2))
    loops.start()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    loops.close()
    assert_same(loops.monitor.timeline, truth)


def test_what_fails_is_told_and_the_training_goes_on(tmp_path):
    told = []
    loops = LoopMonitor(MonitorConfig(every=1), tmp_path / "file" / "x", report=told.append)
    (tmp_path / "file").write_text("no folder")
    loops.start()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    loops.close()
    assert len(told) == 1 and "measuring failed" in told[0]


def test_other_modules_and_optimizers_are_not_taken_for_the_model():
    told = []
    loops = LoopMonitor(MonitorConfig(every=1), report=told.append)
    loops.start()
    teacher, model, plain = Net(), Net(), nn.Linear(WIDTH := 16, WIDTH)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():
        teacher(x), plain(x).sum().backward()  # in training mode; no optimizer holds the teacher
        other.step()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    loops.close()
    assert loops.monitor.timeline.steps.tolist() == [0, 1, 2, 3] and not told
