"""Gradients, change of features and linear probes of every block: of trainings measured all along, and of sources."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.study.probes import block_probes
from inflection_fast.study.training_hooks import training_hooks
from inflection_fast.study.training_loop import batch_of, evaluate, train
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from inflection_fast.study.work import Work

__all__ = ["gradients", "probes"]

PROBE_TEXTS = 64  # on which features are compared with those before training
MEASURED_STEPS = 7


def gradients(work: Work, transfer: str, regime: str, arm: str, name: str) -> dict[str, Any]:
    """Measure one arm at the first seed, and keep the result under `name`."""
    return work.store.get(name, lambda: _measured(work, transfer, regime, arm, name))


def probes(work: Work, transfer: str, regime: str, name: str) -> dict[str, Any]:
    """Accuracy of a probe on every block of the source model, on validation texts of the target; kept under `name`."""

    def compute() -> dict[str, Any]:
        seed = work.config.tuning.seed
        texts = work.texts(transfer).split(seed).validation
        accuracy = block_probes(work.start(transfer, regime, seed), texts, work.config.train)
        return {"transfer": transfer, "regime": regime, "n": len(texts), "accuracy": accuracy}

    return work.store.get(name, compute)


def _measured(work: Work, transfer: str, regime: str, arm: str, name: str) -> dict[str, Any]:
    config, seed = work.config, work.config.seeds[0]
    loop, steps = config.train, config.train.steps
    rate = work.rate(arm, regime)
    seen = work.seen(transfer, regime, arm, seed)
    seen.learning_rate = rate
    adaptation = work.chosen(arm, seen)
    split = work.texts(transfer).split(seed)
    before = block_probes(work.start(transfer, regime, seed), split.validation, loop)
    adapted = work.adapted(transfer, regime, seed, adaptation)
    probe = batch_of(split.validation, np.arange(min(PROBE_TEXTS, len(split.validation))), loop.device)
    del probe["labels"]
    every = max(1, steps // (MEASURED_STEPS - 1))
    settings = MonitorConfig(every=every, signals=("activation_grad", "delta_cka"), cka_pooling="mean")
    folder = work.store.path(name.removesuffix(".json"))
    shutil.rmtree(folder, ignore_errors=True)
    with Monitor(adapted, settings, folder, probe=[probe], alerts=None) as monitor:
        trained = train(
            adapted,
            split.train,
            loop,
            learning_rate=rate,
            seed=seed,
            after_backward=lambda step: monitor.step(),
            **training_hooks(adaptation, adapted, steps, seed, rate),
        )
    timeline = Timeline.load(folder)
    metrics = evaluate(adapted, split.test, loop)
    return {
        "transfer": transfer,
        "regime": regime,
        "arm": arm,
        "seed": seed,
        "layers": list(adaptation.layers),
        "steps": timeline.steps.tolist(),
        "activation_grad": _table(timeline.activation_grad),
        "delta_cka": _table(timeline.delta_cka),
        "losses": trained.losses,
        "probes_before": before,
        "probes_after": block_probes(adapted, split.validation, loop),
        "accuracy": metrics["accuracy"],
    }


def _table(values: np.ndarray) -> list[list[float | None]]:
    return [[float(f"{x:.5g}") if np.isfinite(x) else None for x in row] for row in values]
