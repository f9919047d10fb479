"""What some kinds of adaptation do between the steps of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.study.adaptation import Adaptation
from inflection_fast.study.training_loop import TrainingHooks

__all__ = ["training_hooks"]


def training_hooks(adaptation: Adaptation, model: nn.Module, steps: int, seed: int) -> TrainingHooks:
    """Arguments of `train` for a kind of adaptation; none for most."""
    if adaptation.kind == "adalora":
        return _adalora(model)
    if adaptation.kind == "lisa":
        return _lisa(model, seed, **adaptation.options)
    if "intervention" in adaptation.options:
        from inflection_fast.study.arms_interventions import intervention_hooks

        return intervention_hooks(adaptation, model, steps)
    return {}


def _adalora(model: nn.Module) -> TrainingHooks:
    """AdaLoRA prunes by the gradients of every step. peft adds the penalty for its factors to the loss by itself."""
    tuner: Any = model.base_model  # peft's AdaLoraModel
    return {"after_step": tuner.update_and_allocate}


def _lisa(model: nn.Module, seed: int, blocks: int, every: int) -> TrainingHooks:
    """LISA (arXiv 2403.17919): the embeddings, the head and a few blocks drawn anew every so many steps are trained."""
    found = find_blocks(model)
    rng = np.random.default_rng([seed, 3])

    def draw(step: int) -> None:
        if step % every:
            return
        chosen = set(rng.choice(len(found), blocks, replace=False).tolist())
        for block in found:
            block.module.requires_grad_(block.index in chosen)

    return {"before_step": draw}
