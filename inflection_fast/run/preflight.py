"""Checks of a whole run before its first training step: every part of it is tried once, on two texts."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

import numpy as np

from inflection_fast.decide import Plan
from inflection_fast.run.errors import user_errors
from inflection_fast.run.stages import Stages

__all__ = ["check_before_training"]

TEXTS = 2


def check_before_training(stages: Stages, *, measure: bool, tune: bool, report: bool = False) -> None:
    """Read the data, build the model, measure one step of it and inject, for the stages that are not finished.

    UserError for what would fail later: packages, data, training arguments, modules to train, attention that cannot be
    measured, modules to inject. Nothing is written.
    """
    for package in [*(["peft"] if tune else []), *(["matplotlib", "rich"] if report else [])]:
        import_module(package)
    config = stages.config
    source = measure and config.source is not None and not stages.done("source")
    measure = measure and not stages.done("measure")
    tune = tune and not stages.done("tune")  # the baselines train in the same way
    if not (source or measure or tune):
        return
    _check_arguments(stages, {"source.train": source, "measure.train": measure, "tune.train": tune})
    if measure and stages.sharded and config.measure.overhead_pairs:
        stages.say("measure: steps will not be timed, because the model is sharded")
    labels = stages.target.labels
    if source:
        _ = stages.source_data  # read it now, for its errors
    model = stages.load(None, labels) if source else stages.start()
    try:
        if source or measure:
            _measure_one_step(stages, stages.shallow(model))
        if tune:
            _inject(stages, model)
    finally:
        del model
        gc.collect()


def _check_arguments(stages: Stages, wanted: dict[str, bool]) -> None:
    from inflection_fast.run.training import check_arguments

    for name, training in stages.config.trainings.items():
        if wanted[name]:
            with user_errors(ValueError, RuntimeError, ImportError, about=name):
                check_arguments(training)


def _measure_one_step(stages: Stages, model: Any) -> None:
    """One monitored step, without a probe and without a file."""
    import torch

    from inflection_fast.measure import Monitor

    device = "cuda" if torch.cuda.is_available() and not stages.sharded else "cpu"  # a GPU may not hold the whole model
    model.to(device).train()
    batch = {name: value.to(device) for name, value in stages.few(TEXTS).items()}
    where = f"model {stages.config.model.path} cannot be measured"
    with user_errors(ValueError, RuntimeError, NotImplementedError, about=where):
        with Monitor(model, stages.config.measure.monitor, alerts=None) as monitor:
            model(**batch).loss.backward()
            monitor.step()
    if "attention" in stages.config.measure.monitor.names and np.isnan(monitor.timeline.entropy).all():
        stages.say(
            f"model {stages.config.model.path}: its blocks have no softmax attention that can be measured, so there is"
            " no entropy, and layers are chosen by gradients alone"
        )
    model.zero_grad(set_to_none=True)


def _inject(stages: Stages, model: Any) -> None:
    """Put LoRA on all blocks, or, where blocks differ and some lack the modules, on any one of them."""
    from inflection_fast.blocks import find_blocks

    names = stages.config.measure.monitor.blocks
    blocks = [block.name for block in find_blocks(model, names)]
    made_for = {"layers": blocks, "model_type": model.config.model_type, "named": names is not None}
    refused: list[ValueError] = []
    for layers in [range(len(blocks)), *([i] for i in range(len(blocks)))]:
        plan = Plan(
            layers=tuple(layers),
            summary="",
            reasons=dict.fromkeys(layers, ""),
            scores=np.full(len(blocks), np.nan),
            profile={},
            config={},
            model=made_for,
        )
        try:
            stages.injected(model, plan)
            return
        except ValueError as error:
            refused.append(error)
    with user_errors(about="tune.lora"):
        raise refused[0]
