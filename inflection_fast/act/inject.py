"""Adapters of any peft method on exactly the blocks of a plan, by the full names of their modules.

peft can restrict adapters to layers by index (`layers_to_transform`), but it reads the index from the module name: one
list selects blocks of the encoder and of the decoder, a backbone without a head does not match, and "dense" in BERT is
both the attention output and the feed-forward layer. Full names avoid this, and what they match is checked before.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..decide import Plan
from .card import write_section
from .configs import DEFAULT_RANK, check_wanted, complete, method_of, refuse_mismatch
from .handle import check_integer, check_number
from .planned import planned_blocks, unwrapped
from .targets import Targets

__all__ = ["attach_plan", "dead_adapters", "inject", "restore_adapter"]

logger = logging.getLogger(__name__)

PLANS = "inflection_plans"  # attribute of the adapted model: {adapter name: Plan}


def inject(
    model: nn.Module,
    plan: Plan,
    r: int | None = None,
    *,
    config: peft.PeftConfig | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    target_parameters: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    adapter_name: str = "default",
    ranks: Mapping[int, int] | None = None,
) -> peft.PeftModel:
    """Put adapters on the planned blocks of `model`, freeze the rest, and return the model wrapped by peft.

    LoRA of rank `r`, or the method of `config`. `save_pretrained` of the returned model writes `inflection_plan.json`
    beside the adapter, with what was injected and by which rule (`Plan.from_pretrained` reads it), and a section about
    both into the adapter's card (README.md).

    Args:
        model: any model that peft can wrap, without other wrappers (DDP, `torch.compile`). A PeftModel gets another
            adapter with a new name, which becomes the active one; its other adapters stay.
        plan: made for this model: the same `model_type`, number of blocks and names of blocks. A head may have been
            added or removed since: `encoder.layer.3` is `bert.encoder.layer.3`.
        r: rank, at least 1; None: 4.
        config: any peft configuration with `target_modules` (DoRA, IA3, AdaLoRA, VeRA, LoHa, OFT, ...). Modules, head
            and task are added where it does not set them. `r`, `lora_alpha` and `lora_dropout` must then be None.
        lora_alpha: scale of the update; None: `2 * r`.
        lora_dropout: in [0, 1); None: 0.
        target_modules: names of modules within the blocks, as peft takes them: ends of names, one regular expression
            over full names, or "all-linear". None: by the first of these rules that matches in a block: the modules
            that peft chooses for the architecture, all linear layers of its attention, all its linear layers (never
            embeddings, norms, routers or output layers). The rule is logged and stored in the plan.
        target_parameters: "experts": also the three-dimensional parameters of experts, which are not modules; or ends
            of names of parameters. LoRA without dropout only.
        modules_to_save: modules that are trained and saved in full. The head of a model for classification, question
            answering or multiple choice is always added.
        task_type: of peft; None: that of the model's class.
        adapter_name: of peft.
        ranks: {layer: rank} for planned layers with another rank; None: those of the plan, if it has any.

    Raises:
        TypeError: `plan` is not a Plan, or `config` not a peft configuration.
        ValueError: the plan is empty or made for another model; the method does not adapt modules of layers; the
            targets are unknown, missing in a planned block, or shared with blocks outside the plan; a number or a name
            is not accepted. The model is then unchanged.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name: expected a name without dots, got {adapter_name!r}")
    settings = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
        "task_type": task_type,
    }
    config = _lora(**settings) if config is None else _filled(config, **settings)
    if isinstance(model, peft.PeftModel) and adapter_name in model.peft_config:
        raise ValueError(
            f"adapter_name: the model has an adapter {adapter_name!r} already; give the new one another name, or merge "
            "or unload the old one first"
        )
    config, targets = complete(model, plan, config, parameters=target_parameters, ranks=ranks)
    with _restored_on_error(model, adapter_name), _with_input_embeddings(unwrapped(model)):
        if isinstance(model, peft.PeftModel):
            adapted = model
            adapted.add_adapter(adapter_name, config)
            adapted.set_adapter(adapter_name)
        else:
            adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
        refuse_mismatch(targets.modules, _carrying(adapted, adapter_name, targets))
        attach_plan(adapted, _with_record(plan, config, targets, adapter_name), adapter_name)
    logger.info("inject: %s on %s", method_of(config), targets.words)
    return adapted


def dead_adapters(model: nn.Module) -> list[str]:
    """Names of adapted modules whose trainable parameters all have zero or no gradient after a backward pass.

    Such an adapter is not used in the forward pass: the model reads the weight of its module without calling it, or no
    token of the batch reaches it, as with experts. Reads every gradient: for checks, not for each step.
    """
    dead = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module, nn.Module):
            added = [p for n, p in module.named_parameters() if p.requires_grad and not n.startswith("base_layer.")]
            if added and not any(p.grad is not None and bool(p.grad.any()) for p in added):
                dead.append(name)
    return dead


# ---- the plan beside the adapter -------------------------------------------------------------------------------------


def attach_plan(adapted: peft.PeftModel, plan: Plan, adapter_name: str) -> None:
    """Attach a plan to an adapted model, so that `save_pretrained` writes it beside that adapter."""
    setattr(adapted, PLANS, {**getattr(adapted, PLANS, {}), adapter_name: plan})
    vars(adapted)["save_pretrained"] = functools.partial(_save_with_plans, adapted)
    for block in planned_blocks(unwrapped(adapted), plan):
        # Without a hook its fast path for evaluation uses the weights directly, without adapters.
        if isinstance(block.module, nn.TransformerEncoderLayer) and not block.module._forward_hooks:
            block.module.register_forward_hook(_disable_fast_path)


def _disable_fast_path(module: nn.Module, args: tuple, output: object) -> None:
    pass


def _save_with_plans(adapted: peft.PeftModel, save_directory: str | os.PathLike, *args, **kwargs):
    saved = type(adapted).save_pretrained(adapted, os.fspath(save_directory), *args, **kwargs)
    writes = kwargs.get("is_main_process", True)
    chosen = kwargs.get("selected_adapters") or list(adapted.peft_config)
    for name, plan in getattr(adapted, PLANS, {}).items():
        if writes and name in chosen and name in adapted.peft_config:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)  # as peft does
            plan.save(os.path.join(folder, Plan.FILE))
            write_section(folder, plan)
    return saved


def _with_record(plan: Plan, config: peft.PeftConfig, targets: Targets, adapter_name: str) -> Plan:
    method = method_of(config)
    record = {
        "intervention": "adapter",
        "method": method,
        "adapter_name": adapter_name,
        "words": f"{method} on {targets.words}.",
        "rules": targets.rules,
        "modules": list(targets.modules),
        "parameters": list(targets.parameters),
        **{name: getattr(config, name) for name in ("r", "lora_alpha") if hasattr(config, name)},
    }
    return dataclasses.replace(plan, actions=(*plan.actions, record))


# ---- settings --------------------------------------------------------------------------------------------------------


def _lora(r, lora_alpha, lora_dropout, target_modules, modules_to_save, task_type) -> peft.LoraConfig:
    r = DEFAULT_RANK if r is None else r
    check_integer("r", r)
    lora_alpha = 2 * r if lora_alpha is None else lora_alpha
    check_number("lora_alpha", lora_alpha, "> 0")
    lora_dropout = 0.0 if lora_dropout is None else lora_dropout
    check_number("lora_dropout", lora_dropout, "in [0, 1)")
    check_wanted(target_modules)
    if isinstance(modules_to_save, str):
        raise ValueError(f"modules_to_save: expected a sequence of module names, got the string {modules_to_save!r}")
    options: dict[str, Any] = {"lora_alpha": lora_alpha, "lora_dropout": lora_dropout}  # peft's types say int and float
    options |= {"target_modules": target_modules, "modules_to_save": modules_to_save, "task_type": task_type}
    return peft.LoraConfig(r=r, **options)


def _filled(config, *, r, lora_alpha, lora_dropout, **places) -> peft.PeftConfig:
    for name, value in {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}.items():
        if value is not None:
            raise ValueError(f"{name}: set it in config, which has the numbers of its method")
    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"config: expected a PeftConfig, got {type(config).__name__}")
    given = {name: value for name, value in places.items() if value is not None}
    for name in given:
        if getattr(config, name, None) is not None:
            raise ValueError(f"{name}: it is given twice, as an argument and in config")
    check_wanted(places["target_modules"])
    return dataclasses.replace(config, **given) if given else config


def _carrying(adapted: peft.PeftModel, adapter_name: str, targets: Targets) -> list[str]:
    """Names of the modules with the adapter, without those that hold adapted parameters."""
    holders = {name.rpartition(".")[0] for name in targets.parameters}
    found = []
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in _adapters_of(module):
            plain = name.replace(".base_layer", "")
            nested = any(plain.startswith(f"{target}.") for target in targets.modules)  # out_proj in an attention
            if plain not in holders and not nested:
                found.append(plain)
    return found


def _adapters_of(module: BaseTunerLayer) -> set[str]:
    names: set[str] = set()
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        held = getattr(module, attribute, None)
        names |= set(held.keys()) if held is not None and hasattr(held, "keys") else set()
    return names


@contextmanager
def _restored_on_error(model: nn.Module, adapter_name: str):
    """Restore every module and `requires_grad` if peft raises half-way, as for a module type that it cannot adapt."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    active = list(model.active_adapters) if isinstance(model, peft.PeftModel) else None
    try:
        yield
    except BaseException:
        if active is not None and isinstance(model, peft.PeftModel):
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            if isinstance(model.base_model, BaseTuner):
                model.base_model.set_adapter(active)
        for module, held in children:
            module._modules.clear()
            module._modules.update(held)
        for parameter, trains in trainable:
            parameter.requires_grad_(trains)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        raise


@contextmanager
def _with_input_embeddings(base: nn.Module):
    """Let models of Transformers without input embeddings return an empty module for them, where peft reads them."""
    get_embeddings = getattr(base, "get_input_embeddings", None)
    try:
        if callable(get_embeddings):
            get_embeddings()
    except NotImplementedError:
        vars(base)["get_input_embeddings"] = nn.Module
        try:
            yield
        finally:
            del vars(base)["get_input_embeddings"]
    else:
        yield


def restore_adapter(model: nn.Module, folder: str | os.PathLike) -> peft.PeftModel:
    """`model` with the frozen adapter that `PeftModel.save_pretrained` wrote to `folder`, for evaluation.

    A plan beside the adapter is attached to the model. `ValueError` if peft finds no adapter in `folder`.
    """
    adapted = peft.PeftModel.from_pretrained(model, os.fspath(folder))
    if (Path(folder) / Plan.FILE).is_file():
        attach_plan(adapted, Plan.from_pretrained(folder), "default")
    return adapted
