"""A study that takes seconds: a tiny model, made-up texts, four steps."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from helpers import tiny_texts
from helpers.tiny_texts import BAD, GOOD, OTHER
from inflection_fast.run.config import DataConfig, ModelConfig
from inflection_fast.study.arms import arms
from inflection_fast.study.config import (
    LoopConfig,
    MeasuredConfig,
    RegimeConfig,
    SizesConfig,
    SourcesConfig,
    StudyConfig,
    TransferConfig,
    TuningConfig,
    WaveConfig,
)


def write_texts(path: Path, count: int, seed: int, labels=("negative", "positive")) -> Path:
    """`count` different texts whose words tell their label."""
    import random

    rng = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(count):
            label = i % len(labels)
            words = rng.sample(OTHER, rng.randint(3, 9)) + rng.sample((BAD, GOOD)[label % 2], 2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), labels[label]])
    return path


def tiny_study(folder: Path, **changes) -> StudyConfig:
    """Settings of a study in `folder`, whose data and model are made where they are not there."""
    if not (folder / "model").is_dir():
        tiny_texts.bert(folder / "model")
        write_texts(folder / "a.csv", 160, seed=1)
        write_texts(folder / "b.csv", 240, seed=2)
    data = {name: DataConfig(str(folder / f"{name}.csv"), labels=("negative", "positive")) for name in "ab"}
    settings = {
        "model": ModelConfig(str(folder / "model"), max_length=16),
        "transfers": {"one": TransferConfig(data["a"], data["b"])},
        "regimes": {"under": RegimeConfig(epochs=1), "over": RegimeConfig(steps=6)},
        "tuning": TuningConfig(("one/under", "one/over"), seed=0),
        "output": str(folder / "study"),
        "waves": (WaveConfig(("greedy", "random", "all", "head")),),
        "seeds": (1, 2),
        "draws": 2,
        "source": SourcesConfig(limit=48, test=24),
        "target": SizesConfig(train=64, test=48, least_test=16, validation=32),
        "train": LoopConfig(steps=4, batch_size=16),
        "measured": MeasuredConfig(top=1, every=1),
        "blocks": 2,
        "rank": 3,
        "everywhere_rank": 4,
    }
    return StudyConfig(**{**settings, **changes})


@contextmanager
def added_arms(**classes: type) -> Iterator[None]:
    """Arms by name, as if an installed package added them by entry points."""
    points = [SimpleNamespace(name=n, value=f"mine:{c.__name__}", load=lambda c=c: c) for n, c in classes.items()]
    arms.cache_clear()
    try:
        with patch("inflection_fast.study.arms.entry_points", lambda group: points):
            yield
    finally:
        arms.cache_clear()
