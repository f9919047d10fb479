"""Under DeepSpeed, gradients of parameters are refused in a sentence; all else is measured.

On a stand-in of its engine's class and on the marks that ZeRO leaves on parameters; and with the package itself, where
it is installed. It compiles a part of itself at first, for minutes.
"""

import numpy as np
import pytest
from helpers import tiny_models, trainers
from helpers.rank_processes import run_ranks, told
from helpers.rank_training import whole
from helpers.tiny_models import one_thread  # noqa: F401
from torch import nn

from inflection_fast import Monitor, MonitorConfig
from inflection_fast.integrations import InflectionCallback

CONFIG = MonitorConfig(quantities=("attention", "activation_grad", "parameter_grad", "update"), every=1)


class DeepSpeedEngine(nn.Module):
    """Stands in for the class of that name: a wrapper that is called and trained."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def divided(model, mark):
    """The model with parameters marked as ZeRO marks those that it divides."""
    for parameter in model.parameters():
        setattr(parameter, mark, 0)
    return model


@pytest.mark.parametrize("shard", [DeepSpeedEngine, "ds_id", "_hp_mapping"], ids=["engine", "stage 3", "stage 1 and 2"])
def test_gradients_of_parameters_are_refused_and_the_rest_is_measured(shard, caplog):
    model, batch = tiny_models.model_and_batch("bert")
    wrapped = divided(model, shard) if isinstance(shard, str) else shard(model)
    with Monitor(wrapped, CONFIG) as monitor:
        wrapped(**batch).loss.backward()
        monitor.step()
    timeline = monitor.timeline
    assert np.isfinite(timeline.entropy).all() and np.isfinite(timeline.activation_grad).all()
    assert "parameter_grad" not in timeline.columns and "update_ratio" not in timeline.columns
    assert caplog.text.count("parameter_grad, update: not measured under DeepSpeed") == 1


def test_nothing_left_is_an_error():
    model, _ = tiny_models.model_and_batch("bert")
    with pytest.raises(ValueError, match="use DDP or FSDP2 to measure them"):
        Monitor(divided(model, "ds_id"), MonitorConfig(quantities=("parameter_grad",)))


def test_the_callback_refuses_where_the_trainer_trains_with_deepspeed(tmp_path, caplog):
    model = trainers.classifier()
    args = trainers.arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 0}}  # of which no parameter shows anything
    callback = InflectionCallback(MonitorConfig(every={"parameter_grad": 2, "attention": 3}))
    state = type("State", (), {"global_step": 0})()
    callback.on_train_begin(args, state, None, model=model)
    callback.close()
    assert "parameter_grad: not measured under DeepSpeed" in caplog.text
    assert callback.monitor.timeline.meta["config"]["every"] == {"attention": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """ZeRO 1, 2 and 3 on two processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed, with DS_BUILD_OPS=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_SIZE", "2")  # so that it does not ask MPI
        return run_ranks("zero_scenarios.py", tmp_path_factory.mktemp("zero"), 2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_package_itself_is_measured_as_one_process_is(trained, stage):
    found = told(trained, f"zero{stage}")
    config = MonitorConfig(every=2, rows=None, quantities=("attention", "activation_grad", "delta_cka"))
    expected = whole("llama", config)
    assert found["steps"] == expected["steps"] == [0, 2]
    for name in ("entropy", "max_logit", "activation_grad", "loss"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found["delta_cka"], expected["delta_cka"], atol=1e-5)
    assert "parameter_grad" not in found["columns"]
    assert sum("parameter_grad: not measured under DeepSpeed" in one for one in found["messages"]) == 1
