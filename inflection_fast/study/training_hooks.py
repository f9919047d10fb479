"""What some kinds of adaptation add to a training: calls between steps, or groups of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from inflection_fast.act.lisa import lisa
from inflection_fast.study.adaptation import Adaptation
from inflection_fast.study.arms_interventions import intervention_hooks, rate_groups
from inflection_fast.study.training_loop import TrainingHooks

__all__ = ["training_hooks"]


def training_hooks(
    adaptation: Adaptation, model: nn.Module, steps: int, seed: int, learning_rate: float
) -> TrainingHooks:
    """Arguments of `train` for a kind of adaptation; none for most."""
    if adaptation.kind == "adalora":
        return _adalora(model)
    if adaptation.kind == "lisa":
        return _lisa(model, seed, **adaptation.options)
    if "rates" in adaptation.options:
        return {"parameters": rate_groups(adaptation, model, learning_rate)}
    if "intervention" in adaptation.options:
        return intervention_hooks(adaptation, model, steps)
    return {}


def _adalora(model: nn.Module) -> TrainingHooks:
    """AdaLoRA prunes by the gradients of every step. peft adds the penalty for its factors to the loss by itself."""
    tuner: Any = model.base_model  # peft's AdaLoraModel
    return {"after_step": tuner.update_and_allocate}


def _lisa(model: nn.Module, seed: int, blocks: int, every: int) -> TrainingHooks:
    """The embeddings, the head and a few blocks drawn anew every so many steps are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    handle = lisa(model, active=blocks, interval=every, seed=seed)
    return {"parameters": parameters, "after_step": lambda step: handle.step()}
