"""The loss of a step is the one that the Trainer takes, whoever computes it."""

import numpy as np
import pytest
import torch
from helpers.callbacks import CONFIG, items, model, trainer_of  # noqa: F401
from helpers.tiny_models import one_thread  # noqa: F401
from torch.nn import functional as F

from inflection_fast.integrations import InflectionCallback


def smoothed(outputs, labels, num_items_in_batch=None):
    loss = F.cross_entropy(outputs["logits"], labels, label_smoothing=0.3, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", ["model", "label_smoothing", "compute_loss_func", "overridden"])
def test_the_loss_is_the_one_that_the_trainer_logs(model, items, tmp_path, kind, micro_batches):
    callback = InflectionCallback(CONFIG)
    settings = {"logging_strategy": "steps", "logging_steps": 1, "gradient_accumulation_steps": micro_batches}
    if kind == "label_smoothing":
        settings["label_smoothing_factor"] = 0.3
    trainer = trainer_of(model, items * micro_batches, tmp_path, [callback], **settings)
    if kind == "compute_loss_func":
        trainer.compute_loss_func = smoothed
    if kind == "overridden":
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: 3 * compute_loss(*args, **kwargs)
    before = vars(trainer).get("training_step")
    trainer.train()
    assert vars(trainer).get("training_step") is before
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][::2]
    scale = micro_batches if kind in ("model", "overridden") else 1  # which the Trainer does not divide by there
    np.testing.assert_allclose(callback.timeline.loss * scale, logged, rtol=1e-3, atol=1e-4)
    assert np.isfinite(callback.timeline.activation_grad).all() and torch.is_grad_enabled()
