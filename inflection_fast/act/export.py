"""A plan as settings of training tools: axolotl, LLaMA-Factory, ms-swift, TRL.

The names of the settings are those of axolotl's `LoraConfig` schema, LLaMA-Factory's `LoraArguments`, ms-swift 4's
`TunerArguments` and TRL's `ModelConfig`. All four pass the list of modules to peft unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from torch import nn

from ..decide import Plan
from .configs import DEFAULT_RANK, lora_config
from .handle import check_integer

__all__ = ["TOOLS", "to_yaml"]

# Fixed settings, and the names of those for the rank, the target modules and the modules to save.
TOOLS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "axolotl": ({"adapter": "lora"}, "lora_r", "lora_target_modules", "lora_modules_to_save"),
    "llama-factory": ({"finetuning_type": "lora"}, "lora_rank", "lora_target", "additional_target"),
    "ms-swift": ({"tuner_type": "lora"}, "lora_rank", "target_modules", "modules_to_save"),
    "trl": ({"use_peft": True}, "lora_r", "lora_target_modules", "lora_modules_to_save"),
}


def to_yaml(
    plan: Plan,
    tool: str,
    model: nn.Module | None = None,
    *,
    r: int = DEFAULT_RANK,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> str:
    """See `Plan.to_yaml`."""
    if tool not in TOOLS:
        raise ValueError(f"tool: expected one of {sorted(TOOLS)}, got {tool!r}")
    check_integer("r", r)
    if model is None:
        names: str | list[str] = _recorded(plan)
        saved = list(modules_to_save or ())
        if target_modules is not None:
            raise ValueError("target_modules: give the model, too, to find the modules in it")
    else:
        config = lora_config(model, plan, r, target_modules=target_modules, modules_to_save=modules_to_save)
        chosen = config.target_modules or []
        names = chosen if isinstance(chosen, str) else sorted(chosen)
        saved = list(config.modules_to_save or ())
    if plan.ranks:
        raise ValueError(f"ranks: {tool} has one rank for all layers; remove the plan's ranks, or use inject")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    settings = _settings(tool, names, saved, r, alpha, lora_dropout)
    layers = ", ".join(map(str, plan.layers))
    return f"# LoRA on blocks {layers} of {len(plan.scores)}\n" + yaml.safe_dump(settings, sort_keys=False, width=10**6)


def _recorded(plan: Plan) -> list[str]:
    for action in reversed(plan.actions):
        if action.get("intervention") == "adapter" and action.get("modules"):
            return sorted(action["modules"])
    raise ValueError(
        "model: expected the model, because this plan has layers but no names of modules; injecting an adapter records "
        "these names"
    )


def _settings(
    tool: str, names: str | list[str], saved: list[str], r: int, alpha: float, dropout: float
) -> dict[str, object]:
    fixed, rank, target, to_save = TOOLS[tool]
    targets: object = names
    if tool == "llama-factory":
        if isinstance(names, str):
            raise ValueError(
                "model: other modules have the same name endings as the planned ones, so a regular expression is "
                "needed, and LLaMA-Factory takes only lists of names; use inject"
            )
        targets = ",".join(names)
    elif tool == "ms-swift" and isinstance(names, str):
        target = "target_regex"
    elif tool == "trl" and isinstance(names, str):
        targets = [names]  # ModelConfig unpacks a list of one
    settings = {**fixed, rank: r, "lora_alpha": alpha, "lora_dropout": dropout, target: targets}
    if saved:
        settings[to_save] = ",".join(saved) if tool == "llama-factory" else saved
    return settings
