"""Rankings of modules that peft computes: KappaTune from weights, EVA from activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
from peft.helpers import KappaTuneSelector
from peft.tuners.lora import EvaConfig, get_eva_state_dict
from torch import Tensor, nn

__all__ = ["eva_ranks", "kappa_order"]


def kappa_order(model: nn.Module) -> list[str]:
    """Full names of all linear modules, the best conditioned first (KappaTune)."""
    return KappaTuneSelector(model, show_progress=False).get_best_targets()


def eva_ranks(model: nn.Module, modules: Sequence[str], rank: int, batches: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Ranks of `modules` by EVA, with a mean of `rank`: full name -> rank, possibly 0.

    EVA (arXiv 2410.07170) distributes the sum of the ranks by the explained variance of the modules' inputs, without
    padding. A module gets at most twice `rank`, the default of peft.
    """
    config = peft.LoraConfig(r=rank, target_modules=list(modules), init_lora_weights="eva", eva_config=EvaConfig())

    def rows(inputs: Any, batch: dict[str, Tensor], name: str) -> Tensor:
        hidden = inputs[0] if isinstance(inputs, tuple) else inputs
        return hidden[batch["attention_mask"].bool()]

    found = get_eva_state_dict(
        model,
        batches,
        config,
        prepare_model_inputs_fn=lambda batch, config: batch,
        prepare_layer_inputs_fn=rows,
        show_progress_bar=False,
    )
    return {name: int(components.shape[0]) for name, components in found.items()}
