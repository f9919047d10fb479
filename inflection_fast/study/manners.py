"""What some kinds of adaptation do between the steps of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.study.adaptation import Adaptation

__all__ = ["manners"]


def manners(adaptation: Adaptation, model: nn.Module, steps: int, seed: int) -> dict[str, Callable[..., Any]]:
    """Arguments of `train` for a kind of adaptation; none for most."""
    if adaptation.kind == "adalora":
        return _adalora(model)
    if adaptation.kind == "lisa":
        return _lisa(model, seed, **adaptation.options)
    return {}


def _adalora(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """AdaLoRA prunes its ranks by the gradients of every step, and adds a penalty that keeps its factors orthogonal."""
    tuner = model.base_model

    def penalty() -> Any:
        weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
        terms = [
            ((p @ p.T if "lora_A" in name else p.T @ p) - _eye(p, "lora_A" in name)).norm()
            for name, p in model.named_parameters()
            if ("lora_A" in name or "lora_B" in name) and p.requires_grad
        ]
        return weight * sum(terms) / len(terms)

    # peft reads the gradients of this step before the optimizer moves the weights; it must not see the step again.
    return {"after_backward": lambda step: tuner.update_and_allocate(step), "penalty": penalty}


def _eye(parameter: Any, rows: bool) -> Any:
    import torch

    return torch.eye(parameter.shape[0 if rows else 1], device=parameter.device)


def _lisa(model: nn.Module, seed: int, blocks: int, every: int) -> dict[str, Callable[..., Any]]:
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
