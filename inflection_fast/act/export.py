"""A plan as settings for the tools that people train with: axolotl, LLaMA-Factory, ms-swift, TRL.

The names of their settings are those of axolotl's `LoraConfig` schema, LLaMA-Factory's `LoraArguments`, ms-swift 4's
`TunerArguments` and TRL's `ModelConfig`. All four hand the list of modules to peft as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from torch import nn

from ..decide import Plan
from .configs import DEFAULT_RANK, check_rank, lora_config

__all__ = ["TOOLS", "to_yaml"]


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
    check_rank("r", r)
    if model is None:
        names: str | list[str] = _recorded(plan)
        saved = list(modules_to_save or ())
        if target_modules is not None:
            raise ValueError("target_modules: needs the model, to find the modules in")
    else:
        config = lora_config(model, plan, r, target_modules=target_modules, modules_to_save=modules_to_save)
        chosen = config.target_modules or []
        names = chosen if isinstance(chosen, str) else sorted(chosen)
        saved = list(config.modules_to_save or ())
    if plan.ranks:
        raise ValueError(f"ranks: {tool} has one rank for all layers; clear the plan's ranks, or use inject")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    settings = TOOLS[tool](names, saved, r, alpha, lora_dropout)
    layers = ", ".join(map(str, plan.layers))
    return f"# LoRA on blocks {layers} of {len(plan.scores)}\n" + yaml.safe_dump(settings, sort_keys=False, width=10**6)


def _recorded(plan: Plan) -> list[str]:
    for action in reversed(plan.actions):
        if action.get("intervention") == "adapter" and action.get("modules"):
            return sorted(action["modules"])
    raise ValueError(
        "model: expected the model, because this plan names layers and no adapter was injected by it, which would have "
        "recorded the names of modules"
    )


def _axolotl(names, saved, r, alpha, dropout) -> dict:
    settings = {
        "adapter": "lora",
        "lora_r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "lora_target_modules": names,
    }
    return settings | ({"lora_modules_to_save": saved} if saved else {})


def _llama_factory(names, saved, r, alpha, dropout) -> dict:
    if isinstance(names, str):
        raise ValueError(
            "model: other modules end like the planned ones, so that one expression over full names is needed, and "
            "LLaMA-Factory takes lists of names only; use inject"
        )
    settings = {"finetuning_type": "lora", "lora_rank": r, "lora_alpha": alpha, "lora_dropout": dropout}
    settings["lora_target"] = ",".join(names)
    return settings | ({"additional_target": ",".join(saved)} if saved else {})


def _ms_swift(names, saved, r, alpha, dropout) -> dict:
    settings = {"tuner_type": "lora", "lora_rank": r, "lora_alpha": alpha, "lora_dropout": dropout}
    settings["target_regex" if isinstance(names, str) else "target_modules"] = names
    return settings | ({"modules_to_save": saved} if saved else {})


def _trl(names, saved, r, alpha, dropout) -> dict:
    settings = {
        "use_peft": True,
        "lora_r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "lora_target_modules": names,
    }
    if isinstance(names, str):
        settings["lora_target_modules"] = [names]  # ModelConfig takes a single one out of its list
    return settings | ({"lora_modules_to_save": saved} if saved else {})


TOOLS = {"axolotl": _axolotl, "llama-factory": _llama_factory, "ms-swift": _ms_swift, "trl": _trl}
