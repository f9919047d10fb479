"""A plan becomes a peft configuration: modules by full name, and settings that follow from the model."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import cast

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.models.auto import modeling_auto as auto

from ..blocks import Block
from ..decide import Plan
from .handle import check_integer
from .planned import every_block, planned_blocks, unwrapped
from .targets import Targets, is_conv1d, targets_of

__all__ = ["DEFAULT_RANK", "complete", "lora_config", "peft_config", "refuse_mismatch", "target_modules"]

DEFAULT_RANK = 4
_NOT_OF_LAYERS = (
    "{method} does not adapt modules of chosen layers ({why}), so no plan applies to it; use LoRA or another method "
    "with target_modules"
)
_WHY_NOT = {
    "ADAPTION_PROMPT": "it counts layers from the top",
    "TRAINABLE_TOKENS": "it trains rows of the embedding",
    "XLORA": "it mixes adapters that exist",
}
_TASKS = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
_NEW_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # heads that start untrained


def target_modules(model: nn.Module, plan: Plan, wanted: str | Sequence[str] | None = None) -> list[str]:
    """Full names of the modules of the planned blocks that LoRA adapts: see `Plan.target_modules`."""
    return list(_targets(unwrapped(model), plan, wanted, None, "LORA").modules)


def lora_config(model: nn.Module, plan: Plan, r: int | None = None, **options) -> peft.LoraConfig:
    """See `Plan.lora_config`."""
    r = DEFAULT_RANK if r is None else r
    check_integer("r", r)
    options = {"lora_alpha": 2 * r} | {name: value for name, value in options.items() if value is not None}
    return cast(peft.LoraConfig, complete(model, plan, peft.LoraConfig(r=r, **options))[0])


def method_of(config: peft.PeftConfig) -> str:
    """The name of a configuration's method in peft, such as "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def peft_config(model: nn.Module, plan: Plan, config: peft.PeftConfig | str, **options) -> peft.PeftConfig:
    """See `Plan.peft_config`."""
    if isinstance(config, str):
        name = config.upper().replace("-", "_")
        known = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if name == "DORA":
            return complete(model, plan, peft.LoraConfig(use_dora=True, **options))[0]
        if name not in known:
            raise ValueError(f"config: expected a PeftConfig or one of {sorted([*known, 'DORA'])}, got {config!r}")
        _refuse_foreign(known[name])
        config, options = known[name](**options), {}
    if options:
        raise ValueError(f"{next(iter(options))}: set it in the configuration that was passed")
    return complete(model, plan, config)[0]


def complete(
    model: nn.Module,
    plan: Plan,
    config: peft.PeftConfig,
    *,
    parameters: str | Sequence[str] | None = None,
    ranks: Mapping[int, int] | None = None,
) -> tuple[peft.PeftConfig, Targets]:
    """A copy of `config` with the planned modules, ranks, head and task where it does not set them, and the targets.

    `ValueError` for a method that does not adapt modules of layers, for settings that choose layers themselves, and if
    peft would match other modules than the planned ones.
    """
    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"config: expected a PeftConfig or the name of a method, got {type(config).__name__}")
    _refuse_foreign(type(config))
    base = unwrapped(model)
    config = copy.deepcopy(config)
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name, None):
            raise ValueError(f"{name}: the plan chooses the layers; leave it out of the configuration")
    method = method_of(config)
    wanted = getattr(config, "target_modules", None)
    wanted = sorted(wanted) if isinstance(wanted, set) else wanted
    if parameters is not None and not hasattr(config, "target_parameters"):
        raise ValueError(f"target_parameters: {method} has none; use LoRA")
    if parameters is None and getattr(config, "target_parameters", None):
        parameters = sorted(getattr(config, "target_parameters", ()))
    targets = _targets(base, plan, wanted, parameters, method)
    _set(config, "target_modules", set(targets.modules))
    if targets.parameters:
        _set(config, "target_parameters", list(targets.parameters))
    if hasattr(config, "feedforward_modules"):  # IA3 scales the inputs of these and the outputs of the others
        config.feedforward_modules = set(targets.feedforward)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(is_conv1d(base.get_submodule(name)) for name in targets.modules)
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = _saved(base, every_block(base, plan), config.modules_to_save) or None
    config.task_type = config.task_type or _task(base)
    _fill_ranks(base, plan, config, targets, plan.ranks if ranks is None else ranks)
    _make_exact(base, config, targets)
    return config, targets


def refuse_mismatch(planned: Sequence[str], matched: Sequence[str]) -> None:
    """`ValueError` unless peft matched exactly the planned modules."""
    missed, beyond = sorted(set(planned) - set(matched)), sorted(set(matched) - set(planned))
    if missed or beyond:
        raise ValueError(
            f"target_modules: peft would match other modules than the planned ones: without {missed[:5]}, and also"
            f" {beyond[:5]}"
        )


def _set(config: peft.PeftConfig, field: str, value: object) -> None:
    """Set a field that `peft.PeftConfig` does not declare, but its subclasses for methods of layers do."""
    setattr(config, field, value)


def _refuse_foreign(cls: type) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    method = cls.__name__.removesuffix("Config")
    why = next(
        (_WHY_NOT.get(str(kind.value)) for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known is cls), None
    )
    if "target_modules" not in fields or why:
        why = why or "it puts learned vectors in front of the whole sequence"
        raise ValueError("config: " + _NOT_OF_LAYERS.format(method=method, why=why))


def _targets(
    base: nn.Module, plan: Plan, wanted: str | Sequence[str] | None, parameters: str | Sequence[str] | None, method: str
) -> Targets:
    check_wanted(wanted)
    blocks = planned_blocks(base, plan)
    return targets_of(base, blocks, every_block(base, plan), wanted=wanted, parameters=parameters, method=method)


def check_wanted(targets: str | Sequence[str] | None) -> None:
    """`ValueError` unless `targets` names modules as peft does."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules: {targets!r} is not a regular expression: {error}") from error
    elif targets is not None and not isinstance(targets, Sequence):
        raise ValueError(f"target_modules: expected a string or a sequence of names, got {targets!r}")


def _fill_ranks(
    base: nn.Module, plan: Plan, config: peft.PeftConfig, targets: Targets, ranks: Mapping[int, int] | None
) -> None:
    if not ranks:
        return
    if not hasattr(config, "rank_pattern"):
        raise ValueError(f"ranks: {method_of(config)} has no rank_pattern; use LoRA, LoHa, LoKr or AdaLoRA")
    if not set(ranks) <= set(plan.layers):
        raise ValueError(f"ranks: expected ranks of the planned layers {list(plan.layers)}, got {sorted(ranks)}")
    for layer, rank in ranks.items():
        check_integer(f"ranks[{layer}]", rank)
    scale = config.lora_alpha / getattr(config, "r", 1) if hasattr(config, "lora_alpha") else None
    every = every_block(base, plan)
    ranked, alphas = dict(config.rank_pattern or {}), dict(getattr(config, "alpha_pattern", None) or {})
    for layer, rank in ranks.items():
        pattern = re.escape(f"{every[layer].path}.") + ".*"
        ranked[pattern] = rank
        if scale is not None:  # keeps the scale of an update, alpha / r, of the configuration
            alphas[pattern] = scale * rank
    config.rank_pattern = ranked
    if scale is not None and hasattr(config, "alpha_pattern"):
        config.alpha_pattern = alphas


def _make_exact(base: nn.Module, config: peft.PeftConfig, targets: Targets) -> None:
    """Keep the list of names if peft matches only these; else one regular expression over full names."""
    names = [name for name, _ in base.named_modules()]
    matched = [name for name in names if check_target_module_exists(config, name)]
    inner = {name for name in matched if any(name.startswith(f"{target}.") for target in targets.modules)}
    beyond = set(matched) - set(targets.modules) - inner
    if beyond and not hasattr(config, "feedforward_modules"):
        _set(config, "target_modules", "|".join(map(re.escape, targets.modules)))
        matched = [name for name in names if check_target_module_exists(config, name)]
    refuse_mismatch(targets.modules, [name for name in matched if name not in inner])


# ---- settings that follow from the class of the model ----------------------------------------------------------------


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    for task, classes in _TASKS.items():
        if any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in classes.values()):
            return task
    return None


def _saved(model: nn.Module, blocks: Sequence[Block], wanted: Sequence[str] | None) -> list[str]:
    if isinstance(wanted, str):
        raise ValueError(f"modules_to_save: expected a sequence of module names, got the single string {wanted!r}")
    head = _head(model, blocks) if _NEW_HEAD.search(type(model).__name__) else []
    names = [name for name, _ in model.named_modules()]
    absent = [want for want in wanted or () if not any(f".{name}".endswith(f".{want}") for name in names)]
    if absent:
        raise ValueError(f"modules_to_save: {type(model).__name__} has no modules {absent}")
    return [*head, *(want for want in wanted or () if want not in head)]


def _head(model: nn.Module, blocks: Sequence[Block]) -> list[str]:
    """Children of the model with parameters, registered after the last one that holds blocks."""
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    trunks = {block.path.split(".")[0] for block in blocks}
    last = max((place for place, name in enumerate(children) if name in trunks), default=-1)
    return children[last + 1 :]
