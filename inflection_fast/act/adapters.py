"""Adapters of every kind on named modules, rankings of modules, and parts of a model that train without adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import torch
from peft.helpers import KappaTuneSelector
from peft.tuners.lora import EvaConfig, get_eva_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import Block, find_blocks
from .configs import _saved, _task, refuse_mismatch
from .inject import _restored_on_error
from .targets import targets_of

__all__ = [
    "KINDS", "adapt", "adapter_parameters", "bottleneck", "default_modules", "eva_ranks", "head_parameters",
    "kappa_order", "train_only",
]  # fmt: skip

KINDS = ("lora", "dora", "adalora", "ia3", "vera", "prefix")


def default_modules(model: nn.Module, layers: Sequence[int] | None = None) -> dict[int, list[str]]:
    """The full names of the modules that LoRA adapts by default, for each of `layers` (None: all blocks).

    ValueError if a block has no module that can be adapted by default.
    """
    blocks = find_blocks(model)
    wanted = range(len(blocks)) if layers is None else layers
    return {layer: list(targets_of(model, [blocks[layer]], blocks).modules) for layer in wanted}


def adapt(
    model: nn.Module, kind: str, ranks: Mapping[str, int], *, scale: float = 2.0, steps: int | None = None
) -> nn.Module:
    """`model` with adapters of `kind` on the modules named in `ranks`; all else is frozen except the head.

    Args:
        model: without adapters.
        kind: one of `KINDS`.
        ranks: full module name -> rank, at least 1. IA3 uses only the names; VeRA uses the largest rank for all
            modules; prefix tuning uses the largest rank as its number of virtual tokens.
        scale: of the update of LoRA and its variants: `lora_alpha / r`, the same for every rank.
        steps: of the training, for the rank schedule of AdaLoRA.

    Raises:
        ValueError: an unknown kind, no modules, a rank below 1, or peft cannot adapt a module. The model is then
            unchanged.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {list(KINDS)}, got {kind!r}")
    if not ranks:
        raise ValueError("ranks: expected at least one module, got none")
    too_small = {name: rank for name, rank in ranks.items() if rank < 1}
    if too_small:
        raise ValueError(f"ranks: expected at least 1, got {too_small}")
    modules = dict(model.named_modules())
    missing = sorted(set(ranks) - set(modules))
    if missing and kind != "prefix":
        raise ValueError(f"ranks: {type(model).__name__} has no modules {missing}")
    names, first = list(ranks), max(ranks.values())
    common: dict[str, Any] = {
        "task_type": _task(model),
        "modules_to_save": _saved(model, find_blocks(model), None) or None,
        "target_modules": names,
        "fan_in_fan_out": any(isinstance(modules.get(name), Conv1D) for name in names),
    }
    patterns: dict[str, Any] = {
        "r": first,
        "lora_alpha": scale * first,
        "rank_pattern": {f"^{re.escape(name)}$": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(name)}$": scale * rank for name, rank in ranks.items()},
    }
    config: peft.PeftConfig
    if kind in ("lora", "dora"):
        config = peft.LoraConfig(**common, **patterns, use_dora=kind == "dora")
    elif kind == "adalora":
        config = _adalora(ranks, scale, steps, common)
    elif kind == "ia3":
        config = peft.IA3Config(**common, feedforward_modules=[])
    elif kind == "vera":
        config = peft.VeraConfig(**common, r=first)
    else:
        config = peft.PrefixTuningConfig(task_type=common["task_type"], num_virtual_tokens=first)
    with _restored_on_error(model, "default"):
        adapted = peft.get_peft_model(model, config)
        if kind != "prefix" and isinstance(adapted.base_model, BaseTuner):
            refuse_mismatch(names, adapted.base_model.targeted_module_names)
    return adapted


def _adalora(ranks: Mapping[str, int], scale: float, steps: int | None, common: dict[str, Any]) -> peft.AdaLoraConfig:
    """AdaLoRA begins with 1.5 times its final ranks, and has pruned to these at three quarters of the steps."""
    if steps is None or steps < 4:
        raise ValueError(f"steps: AdaLoRA needs a training of at least 4 steps, got {steps}")
    target = max(1, round(sum(ranks.values()) / len(ranks)))
    first = max(target + 1, math.ceil(1.5 * target))
    return peft.AdaLoraConfig(
        **common | {"lora_alpha": scale * first},
        init_r=first,
        target_r=target,
        tinit=max(1, steps // 10),
        tfinal=max(1, steps // 4),
        deltaT=1,
        total_step=steps,
    )


def adapter_parameters(model: nn.Module) -> int:
    """The number of trainable parameters outside the head, of a model adapted by peft."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name)


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters outside the backbone; none if the model does not name its backbone."""
    backbone = getattr(model, "base_model_prefix", "")
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{backbone}.")] if backbone else []


def train_only(model: nn.Module, part: str, top: int = 0) -> None:
    """Make a part of a model trainable, and freeze the rest.

    Args:
        model: without adapters.
        part: "head": parameters outside the backbone; "top": these, the last `top` blocks and what the model registers
            after them; "bias": the head and every bias; "all": all parameters.
        top: number of blocks.
    """
    if part not in ("head", "top", "bias", "all"):
        raise ValueError(f"part: expected head, top, bias or all, got {part!r}")
    named = list(model.named_parameters())
    blocks: list[Block] = find_blocks(model)
    if top > len(blocks):
        raise ValueError(f"top: the model has {len(blocks)} blocks, got {top}")
    last = max(i for i, (name, _) in enumerate(named) if name.startswith(f"{blocks[-1].path}."))
    inside = tuple(f"{block.path}." for block in blocks[len(blocks) - top :])
    head = head_parameters(model)
    if part == "head" and not head:
        raise ValueError(f"part: {type(model).__name__} has no head outside its backbone")
    for i, (name, parameter) in enumerate(named):
        if part == "all":
            train = True
        elif part == "bias":
            train = name in head or name.endswith("bias")
        else:
            train = name in head or (part == "top" and (name.startswith(inside) or i > last))
        parameter.requires_grad_(train)


class _Bottleneck(nn.Module):
    """x + up(gelu(down(x))), initialised so that the model is unchanged."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


def bottleneck(model: nn.Module, layers: Sequence[int], width: int) -> nn.Module:
    """`model` with a bottleneck adapter of `width` after each of `layers`; all else is frozen except the head.

    peft has no such adapters. They are children of their blocks, so they are saved with the model. `ValueError` if a
    block does not exist, or its output is not a tensor of hidden states.
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    blocks = find_blocks(model)
    if not layers or not set(layers) <= set(range(len(blocks))):
        raise ValueError(f"layers: expected some of 0 to {len(blocks) - 1}, got {list(layers)}")
    hidden = getattr(model.config, "hidden_size", None)
    if hidden is None:
        raise ValueError("model: its configuration has no hidden_size")
    backbone = getattr(model, "base_model_prefix", "")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(f"{backbone}."))
    for layer in layers:
        blocks[layer].module.add_module("bottleneck", _Bottleneck(hidden, width))
        blocks[layer].module.register_forward_hook(_adapt_output)
    return model


def _adapt_output(block: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return block.bottleneck(output)
    if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
        return (block.bottleneck(output[0]), *output[1:])
    raise ValueError(f"model: the output of a block is {type(output).__name__}, not a tensor of hidden states")


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
