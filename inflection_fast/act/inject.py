"""LoRA on exactly the blocks of a plan, by the full names of their modules.

peft can restrict adapters to layers by index (`layers_to_transform`), but it reads the index out of the module name:
one list hits the encoder and the decoder alike, a bare backbone does not match at all, and "dense" in BERT means the
attention output and the feed-forward both. Full names have none of that, and the set they match can be checked
beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.pytorch_utils import Conv1D

from ..blocks import Block, find_blocks
from ..decide import Plan

__all__ = ["inject"]

_TASKS = {
    "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
_NEW_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # heads that start untrained


def inject(
    model: nn.Module,
    plan: Plan,
    r: int = 4,
    *,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    adapter_name: str = "default",
) -> peft.PeftModel:
    """Put LoRA of rank `r` on the planned blocks of `model`, freeze the rest, and return the model wrapped by peft.

    Args:
        model: any model peft can wrap, without adapters and not wrapped itself (DDP, `torch.compile`).
        plan: made for this model: of the same `model_type`, with as many blocks, named alike. A head may have been
            added or taken away in between: `encoder.layer.3` is `bert.encoder.layer.3`.
        r: rank, at least 1.
        lora_alpha: scale of the update; None: `2 * r`.
        lora_dropout: in [0, 1).
        target_modules: names of modules within the blocks, as peft takes them: ends of names, one regular expression
            over full names, or "all-linear". None: those that peft chooses for the architecture.
        modules_to_save: modules that are trained and saved whole. The head of a model for classification, question
            answering or multiple choice is always among them.
        task_type: peft's; None: that of the model's class.
        adapter_name: peft's.

    Raises:
        TypeError: `plan` is no plan.
        ValueError: the plan is empty or made for another model; the targets are unknown, missing from a planned block,
            or match outside of the planned blocks; a number or a name is out of range. The model is then as it was.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    _check_options(r, lora_alpha, lora_dropout, target_modules, adapter_name)
    if not plan.layers:
        raise ValueError(f"plan: it is empty, there is nothing to inject. {plan.summary}")
    if isinstance(model, peft.PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model: it carries adapters already; merge or unload them first")
    blocks = _planned(model, plan)
    targets = _targets(model, blocks, target_modules)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        modules_to_save=_saved(model, modules_to_save) or None,
        task_type=task_type or _task(model),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    _refuse_mismatch(
        targets, [name for name, _ in model.named_modules() if check_target_module_exists(config, name) is True]
    )
    with _restored_on_error(model):
        adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
        _refuse_mismatch(targets, adapted.base_model.targeted_module_names)
    return adapted


# ---- the blocks of the plan in this model ----------------------------------------------------------------------------


def _planned(model: nn.Module, plan: Plan) -> list[Block]:
    made_for, given = plan.model.get("model_type"), _model_type(model)
    if made_for is not None and made_for != given:
        raise ValueError(f"plan: it was made for a model of type {made_for}, this one is {given}")
    names = plan.model["layers"]
    blocks = find_blocks(model, names if plan.model.get("named") else None)
    if len(blocks) != len(names):
        raise ValueError(f"plan: it was made for a model of {len(names)} blocks, this one has {len(blocks)}")
    for block, name in zip(blocks, names, strict=True):
        if not (f".{block.name}".endswith(f".{name}") or f".{name}".endswith(f".{block.name}")):
            raise ValueError(
                f"plan: it was made for a model whose block {block.index} is {name}, here it is {block.name}"
            )
        if block.path != block.name:
            raise ValueError(f"model: it is wrapped ({block.path}); inject before wrapping it")
    return [blocks[layer] for layer in plan.layers]


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


# ---- their modules ---------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, blocks: list[Block], wanted: str | Sequence[str] | None) -> list[str]:
    usual = USUAL_TARGETS.get(_model_type(model))
    if wanted is None and usual is None:
        raise ValueError(
            f"target_modules: peft has no default for models of type {_model_type(model)}; name modules of a block, "
            f"which has {_linears(blocks[0])}"
        )
    patterns = usual if wanted is None else wanted
    found = []
    for block in blocks:
        here = [name for name in _names(block) if _matches(model, patterns, name)]
        if not here:
            raise ValueError(f"target_modules: {patterns} matches nothing in {block.name}, which has {_linears(block)}")
        found += here
    if wanted is not None and not isinstance(wanted, str):
        idle = [pattern for pattern in wanted if not any(_matches(model, [pattern], name) for name in found)]
        if idle:
            raise ValueError(
                f"target_modules: {idle} match nothing in the planned blocks, which have {_linears(blocks[0])}"
            )
    return found


def _matches(model: nn.Module, patterns: str | Sequence[str], name: str) -> bool:
    if patterns == "all-linear":
        return isinstance(model.get_submodule(name), (nn.Linear, Conv1D))
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)


def _names(block: Block) -> list[str]:
    return [f"{block.path}.{name}" for name, _ in block.module.named_modules() if name]


def _linears(block: Block) -> list[str]:
    return [name for name, module in block.module.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _refuse_mismatch(planned: list[str], matched: list[str]) -> None:
    if set(planned) != set(matched):
        beyond, missed = sorted(set(matched) - set(planned)), sorted(set(planned) - set(matched))
        raise ValueError(
            f"target_modules: peft would not match the planned modules: beyond them {beyond}, missed {missed}"
        )


# ---- what else is trained --------------------------------------------------------------------------------------------


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    for task, classes in _TASKS.items():
        if any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in classes.values()):
            return task
    return None


def _saved(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    if isinstance(wanted, str):
        raise ValueError(f"modules_to_save: expected a sequence of module names, got the single string {wanted!r}")
    head = []
    if _NEW_HEAD.search(type(model).__name__):
        backbone = getattr(model, "base_model_prefix", "")
        children = [(name, child) for name, child in model.named_children() if name != backbone]
        head = [name for name, child in children if next(child.parameters(), None) is not None]
    names = [name for name, _ in model.named_modules()]
    absent = [want for want in wanted or () if not any(f".{name}".endswith(f".{want}") for name in names)]
    if absent:
        raise ValueError(f"modules_to_save: {type(model).__name__} has no modules {absent}")
    return [*head, *(want for want in wanted or () if want not in head)]


# ---- refusing --------------------------------------------------------------------------------------------------------


def _check_options(
    r: int, lora_alpha: float | None, lora_dropout: float, targets: str | Sequence[str] | None, adapter_name: str
) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r: expected an integer >= 1, got {r!r}")
    if lora_alpha is not None and not (isinstance(lora_alpha, (int, float)) and lora_alpha > 0):
        raise ValueError(f"lora_alpha: expected a number > 0, got {lora_alpha!r}")
    if not (isinstance(lora_dropout, (int, float)) and 0 <= lora_dropout < 1):
        raise ValueError(f"lora_dropout: expected a number in [0, 1), got {lora_dropout!r}")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules: {targets!r} is no regular expression: {error}") from error
    elif targets is not None and not isinstance(targets, Sequence):
        raise ValueError(f"target_modules: expected a string or a sequence of names, got {targets!r}")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name: expected a name without dots, got {adapter_name!r}")


@contextmanager
def _restored_on_error(model: nn.Module):
    """Put every module and `requires_grad` back if peft stops half-way (a module type it cannot adapt)."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    try:
        yield
    except BaseException:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, before in trainable:
            parameter.requires_grad_(before)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        raise
