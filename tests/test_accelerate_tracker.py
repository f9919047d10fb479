"""A loop of Accelerate is measured by one argument of its Accelerator."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from helpers.loops_to_exec import Net, batches
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import Monitor, MonitorConfig
from inflection_fast.integrations.accelerate import InflectionTracker


class Keeps(GeneralTracker):
    name, requires_logging_directory = "keeps", False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def kept(losses, loss):
    losses.append(loss.item())
    return loss


@pytest.mark.parametrize("late", [False, True], ids=["before prepare", "after prepare"])
def test_the_loop_is_measured_by_optimizer_steps(tmp_path, late):
    torch.manual_seed(0)
    other = Net()
    with Monitor(other, MonitorConfig(every=1)) as monitor:
        for x, y in batches(2):
            (nn.functional.cross_entropy(other(x), y) / 2).backward()
        monitor.step()
    torch.manual_seed(0)
    tracker, keeps = InflectionTracker(MonitorConfig(every=1), tmp_path / "out", keys=("loss",)), Keeps()
    accelerator = Accelerator(cpu=True, log_with=[tracker, keeps], gradient_accumulation_steps=2)
    if not late:
        accelerator.init_trackers("measured")
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if late:
        accelerator.init_trackers("measured")
    losses = []
    for x, y in batches(6):
        with accelerator.accumulate(model):
            accelerator.backward(kept(losses, nn.functional.cross_entropy(model(x), y)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    timeline = tracker.timeline
    assert timeline.steps.tolist() == [0, 1, 2] and tracker.tracker.timeline.steps.tolist() == [0, 1, 2]
    np.testing.assert_allclose(timeline.loss, np.reshape(losses, (3, 2)).mean(1), rtol=1e-5)
    for name in ("entropy", "activation_grad", "parameter_grad"):
        actual, expected = getattr(timeline, name)[0], getattr(monitor.timeline, name)[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, err_msg=name)
    assert [step for step, _ in keeps.rows] == [0, 1, 2]
    assert keeps.rows[1][1]["inflection/loss"] == pytest.approx(timeline.loss[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_before_a_model_is_trained_there_is_a_sentence():
    with pytest.raises(RuntimeError, match="call init_trackers before the first forward pass"):
        _ = InflectionTracker().timeline
