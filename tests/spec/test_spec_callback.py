"""InflectionCallback: the Monitor under transformers.Trainer."""

import numpy as np
import pytest
import torch
from models import batch, build, expected
from monitored import assert_row
from state import state_of
from torch.utils.data import Dataset

from inflection_fast import InflectionCallback, MonitorConfig, Timeline

CONFIG = MonitorConfig(every=1, rows=None)


class Sentences(Dataset):
    def __init__(self, n=12):
        self.rows = batch("bert", rows=n, seed=4)

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, i):
        return {name: value[i] for name, value in self.rows.items()}


def trainer(model, folder, callback, **options):
    from transformers import Trainer, TrainingArguments

    options = {
        "per_device_train_batch_size": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    } | options
    arguments = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", seed=5, **options
    )
    callbacks = [callback] if callback else []
    job = Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(4), callbacks=callbacks)
    job.model_accepts_loss_kwargs = False  # this head ignores them, and the accumulated loss would not be divided
    return job


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_step_equals_the_truth_before_clipping(tmp_path, accumulation):
    model, seen = build("bert"), []
    callback = InflectionCallback(CONFIG, tmp_path / "run")
    twin = build("bert")
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw), with_kwargs=True)
    trainer(model, tmp_path, callback, max_grad_norm=1e-3, gradient_accumulation_steps=accumulation).train()
    truth = expected(
        twin, "bert", [{k: v for k, v in one.items() if torch.is_tensor(v)} for one in seen[:accumulation]]
    )
    timeline = callback.timeline
    assert timeline.steps.tolist() == [0, 1, 2]
    assert_row(timeline, 0, truth, rtol=1e-3)
    assert truth["parameter_grad"].max() > 1e-3
    assert np.isfinite(timeline.loss).all()
    assert Timeline.load(tmp_path / "run").steps.tolist() == [0, 1, 2]


def test_training_is_equal_to_the_bit_and_evaluation_is_not_measured(tmp_path):
    results = []
    for callback in (None, InflectionCallback(CONFIG)):
        model = build("bert", dropout=0.1)
        before = state_of(model)[0]["bert.encoder.layer.0"][3]
        trainer(model, tmp_path, callback, eval_strategy="steps", eval_steps=1).train()
        assert state_of(model)[0]["bert.encoder.layer.0"][3] == before
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_callback_detaches_when_training_raises(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = build("bert")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        with InflectionCallback(CONFIG, tmp_path / "run") as callback:
            job = trainer(model, tmp_path, callback)
            job.add_callback(Stop())
            job.train()
    after = state_of(model)
    assert after[1:] == before[1:]
    assert {n: m[3] for n, m in after[0].items()} == {n: m[3] for n, m in before[0].items()}
    assert Timeline.load(tmp_path / "run").steps.tolist() == [0]
