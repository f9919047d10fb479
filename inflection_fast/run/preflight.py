"""Everything that can be known about a run before its first training step, found out by doing it once on two texts."""

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
    """Reads the data, builds the model, measures one step of it and injects, for the stages that are still to be done.

    UserError for what would fail later: packages, data, training arguments, modules to train, attention that cannot be
    measured, modules to inject. Nothing is written.
    """
    for package in [*(["peft"] if tune else []), *(["matplotlib", "rich"] if report else [])]:
        import_module(package)
    config = stages.config
    source = measure and config.source is not None and not stages.done("source")
    measure = measure and not stages.done("measure")
    tune = tune and not stages.done("tune")  # the baselines train as it does
    if not (source or measure or tune):
        return
    _check_arguments(stages, source=source, measure=measure, tune=tune)
    if measure and stages.sharded and config.measure.overhead_pairs:
        stages.say("measure: steps will not be timed, because the processes divide the model")
    labels = stages.target.labels
    if source:
        _ = stages.source_data  # read now, so that it is refused now
    model = stages.load(None, labels) if source else stages.start()
    try:
        if source or measure:
            _measure_one_step(stages, stages.shallow(model))
        if tune:
            _inject(stages, model)
    finally:
        del model
        gc.collect()


def _check_arguments(stages: Stages, *, source: bool, measure: bool, tune: bool) -> None:
    from inflection_fast.run.training import check_arguments

    config = stages.config
    trainings = {
        "source.train": config.source.train if source and config.source is not None else None,
        "measure.train": config.measure.train if measure else None,
        "tune.train": config.tune.train if tune else None,
    }
    for name, training in trainings.items():
        if training is not None:
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
            f"model {stages.config.model.path}: no softmax attention is seen in its blocks, so there is no entropy and"
            " layers are chosen by gradients alone"
        )
    model.zero_grad(set_to_none=True)


def _inject(stages: Stages, model: Any) -> None:
    """Puts LoRA on the blocks. A model whose blocks differ need not have the modules in all of them."""
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
