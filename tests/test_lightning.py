"""Lightning's Trainer is measured as a plain loop is."""

import copy

import numpy as np
import pytest
import torch
from helpers.loops_to_exec import Net, batches
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import Monitor, MonitorConfig

pl = pytest.importorskip("lightning.pytorch")

from inflection_fast.integrations.lightning import VARIABLE, LightningCallback, from_environment  # noqa: E402

CONFIG = MonitorConfig(every=2)
QUIET = {
    "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "max_epochs": 1,
}  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self, net, labels=True):
        super().__init__()
        self.net, self.labels = net, labels

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Keeps(pl.loggers.Logger):
    name, version = "keeps", 0

    def __init__(self, fails=False):
        super().__init__()
        self.rows, self.fails = [], fails

    def log_metrics(self, metrics, step=None):
        if "inflection/alerts" in metrics:
            if self.fails:
                raise ConnectionError("the logger is away")
            self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def loader(count=4, width=16):
    return torch.utils.data.DataLoader([(x[..., :width], y) for x, y in batches(count)], batch_size=None)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def by_hand(net, parts=1):
    net = copy.deepcopy(net)
    optimizer, data = torch.optim.SGD(net.parameters(), lr=0.1), iter(batches(4 * parts))
    losses = []
    with Monitor(net, CONFIG) as monitor:
        for _ in range(4):
            total = 0.0
            for _ in range(parts):
                x, y = next(data)
                loss = nn.functional.cross_entropy(net(x), y) / parts
                loss.backward()
                total += loss.item()
            monitor.step()
            losses.append(total)
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline, losses[::2]


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulated"])
def test_fit_measures_what_a_plain_loop_measures(net, tmp_path, parts):
    timeline, losses = by_hand(net, parts)
    callback, logger = LightningCallback(CONFIG, tmp_path / "out", keys=("loss",)), Keeps()
    settings = {"callbacks": [callback], "logger": [logger, Keeps(fails=True)], "gradient_clip_val": 1e-3}
    if parts == 1:  # with clipping the weights go another way, so that only the first step is the same
        settings.pop("gradient_clip_val")
    trainer = pl.Trainer(**QUIET, **settings, accumulate_grad_batches=parts, default_root_dir=tmp_path)
    trainer.fit(Module(net), loader(4 * parts))
    measured, same = callback.timeline, slice(None) if parts == 1 else slice(1)
    assert measured.steps.tolist() == [0, 2]
    for name in ("entropy", "activation_grad", "parameter_grad"):
        actual, expected = getattr(measured, name)[same], getattr(timeline, name)[same]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(measured.loss[same], losses[same], rtol=1e-5)
    assert [step for step, _ in logger.rows] == [0, 2]
    assert logger.rows[0][1]["inflection/entropy/min"] == pytest.approx(measured.entropy[0].mean(1).min())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_logger_that_raises_is_told_once(net, tmp_path, caplog):
    callback = LightningCallback(CONFIG)
    trainer = pl.Trainer(**QUIET, callbacks=[callback], logger=Keeps(fails=True), default_root_dir=tmp_path)
    trainer.fit(Module(net), loader())
    assert trainer.global_step == 4 and caplog.text.count("the logger is away") == 1


def test_a_training_that_raises_leaves_the_model_as_it_was(net, tmp_path):
    callback = LightningCallback(CONFIG)
    trainer = pl.Trainer(**QUIET, callbacks=[callback], logger=False, default_root_dir=tmp_path)
    with pytest.raises(AssertionError, match="expecting embedding dimension of 16"):
        trainer.fit(Module(net), loader(width=7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_environment_adds_the_callback_to_every_trainer(net, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() == []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "out"))
    (entry,) = [type("Entry", (), {"name": "inflection_fast", "load": lambda self: from_environment})()]
    monkeypatch.setattr("lightning.fabric.utilities.registry.entry_points", lambda group: [entry])
    trainer = pl.Trainer(**QUIET, logger=False, default_root_dir=tmp_path)
    trainer.fit(Module(net), loader())
    from inflection_fast import Timeline

    assert Timeline.load(tmp_path / "out").steps.tolist() == [0]


@pytest.mark.sources
def test_the_entry_points_name_the_factory():
    from pathlib import Path

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for group in ("lightning.pytorch", "pytorch_lightning"):
        _, _, rest = text.partition(f'[project.entry-points."{group}.callbacks_factory"]\n')
        assert rest.startswith('inflection_fast = "inflection_fast.integrations.lightning:from_environment"')


def test_validation_alone_measures_nothing_and_says_what_does(net, tmp_path):
    with pytest.raises(RuntimeError, match=r"trainer\.fit\(\) is measured"):
        _ = LightningCallback(CONFIG).timeline
