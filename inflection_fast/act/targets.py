"""The modules of the planned blocks that get adapters.

In each block, the first of these rules that matches:

1. "peft": the modules that peft chooses for the architecture, which is that of the innermost model around the block
   with a type known to peft (in a multimodal model, the language model);
2. "attention": all linear layers of the block's attention;
3. "linear": all linear layers of the block, as in QLoRA;
4. "experts": the linear layers inside experts, if a block has no others.

These modules are left out: other layers than linear ones (embeddings, norms); output layers and layers that share their
weight with an embedding; routers (a layer beside experts with one output per expert, or one output; a subclass of
`nn.Linear` that returns something else); indexers of sparse attention; layers whose weight is read without calling
them, so that an adapter there would not run; layers that blocks outside the plan use, too; and names that peft rewrites
into the fused experts of every block.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..blocks import Block, is_named_attention
from .code import read_directly
from .planned import model_type_of

__all__ = ["Targets", "is_conv1d", "is_linear", "modules_of", "targets_of"]

logger = logging.getLogger(__name__)

_SHOWN = 12  # names in a message
# Modules that peft refuses in these models for these methods. Mamba reads their weights without calling them.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_LEAVES = ("out_proj", "conv1d", "dt_proj")
_MAMBA_METHODS = ("LORA", "ADALORA", "XLORA", "RANDLORA")
_EXPERT = re.compile(r"expert", re.IGNORECASE)
_INDEXER = re.compile(r"indexer", re.IGNORECASE)
_ROUTER = re.compile(r"router", re.IGNORECASE)


@dataclass(frozen=True)
class Targets:
    """The full names of what is adapted, and the rules that chose it."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]  # three-dimensional parameters of experts
    rules: dict[str, str]  # block -> "peft" | "attention" | "linear" | "experts" | "given"
    words: str
    feedforward: tuple[str, ...] = ()  # those of `modules` outside attention


def targets_of(
    model: nn.Module,
    blocks: Sequence[Block],
    every: Sequence[Block],
    *,
    wanted: str | Sequence[str] | None = None,
    parameters: str | Sequence[str] | None = None,
    method: str = "LORA",
) -> Targets:
    """The targets in `blocks`, the planned ones of `every`, for the peft method `method`.

    `wanted` is as `target_modules` of peft (ends of names, one regular expression over full names, "all-linear"); None:
    by the rules of this file. `parameters`: "experts", or ends of names of parameters. `ValueError` if a block has no
    match.
    """
    if method == "LN_TUNING" and wanted is None:
        return _norms(blocks)
    search = _Search(model, blocks, every, method)
    experts = _parameters(blocks, parameters)
    if wanted is not None:
        modules = search.given(wanted)
        rules = {block.name: "given" for block in blocks if any(_inside(block, name) for name in modules)}
        words = f"{len(modules)} modules as named"
    else:
        chosen = {block: search.default(block) for block in blocks}
        empty = [block for block, (names, _) in chosen.items() if not names]
        if empty and not (experts and all(any(_inside(b, name) for name in experts) for b in empty)):
            raise ValueError(search.nothing_in(empty[0]))
        modules = list(dict.fromkeys(name for names, _ in chosen.values() for name in names))
        rules = {block.name: rule for block, (names, rule) in chosen.items() if names}
        counts = Counter(rules.values())
        words = f"{len(modules)} modules of {len(blocks)} blocks by the rule " + ", ".join(
            f"{rule!r} ({count} blocks)" if len(counts) > 1 else f"{rule!r}" for rule, count in counts.items()
        )
        if search.left_out:
            words += "; left out: " + "; ".join(f"{_shown(names)} ({why})" for why, names in search.left_out.items())
    if experts:
        words += f", and {len(experts)} parameters of experts"
    outside = [name for block in every for name in modules if _inside(block, name) and not search.attends(block, name)]
    return Targets(tuple(modules), tuple(experts), rules, words, tuple(dict.fromkeys(outside)))


def is_linear(module: nn.Module) -> bool:
    """Whether a module, or the module in an adapter, is a linear layer: `nn.Linear`, `Conv1D`, or a quantised one.

    Classes of quantisation libraries that are no subclasses of `nn.Linear` are recognised by their two sizes.
    """
    module = _base(module)
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    sizes = sizes if None not in sizes else [getattr(module, name, None) for name in ("infeatures", "outfeatures")]
    return all(isinstance(size, int) for size in sizes) and not any(
        isinstance(child, nn.Linear) for child in module.children()
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module, or the module in an adapter, is Transformers' `Conv1D`, whose weight is [in, out]."""
    return isinstance(_base(module), Conv1D)


def modules_of(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """(full name, module) of all modules in a block, without those inside adapters."""

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            here = f"{path}.{name}"
            yield here, child
            if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                yield from walk(here, child)

    return walk(block.path, block.module)


class _Search:
    def __init__(self, model: nn.Module, blocks: Sequence[Block], every: Sequence[Block], method: str):
        self._model, self._method = model, method
        self._named = dict(model.named_modules(remove_duplicate=False))
        self._first = {id(module): name for name, module in model.named_modules()}  # the name that peft uses
        planned = {block.module for block in blocks}
        self._foreign = {id(m) for b in every if b.module not in planned for _, m in modules_of(b)}
        self._tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", None)
        try:
            self._output = output() if callable(output) else None
        except (AttributeError, NotImplementedError):  # a backbone without output embeddings
            self._output = None
        self._rewritten: dict[str, bool] = {}
        self.left_out: dict[str, list[str]] = {}
        self._blocks = blocks

    # ---- by rule -----------------------------------------------------------------------------------------------------

    def default(self, block: Block) -> tuple[list[str], str]:
        """The targets in a block by the default rules, and the rule that matched."""
        kept, left = self._adaptable(block)
        usual = self._usual(block)
        rules = {
            "peft": [name for name in kept if usual is not None and _matches(usual, name)],
            "attention": [name for name in kept if self.attends(block, name)],
            "linear": [name for name in kept if not _in_experts(block, name)],
            "experts": list(kept),
        }
        rule = next((rule for rule, names in rules.items() if names), "linear")
        for name, why in left.items():
            wanted = {"peft": usual is not None and _matches(usual, name), "attention": self.attends(block, name)}
            if wanted.get(rule, True):
                self.left_out.setdefault(why, []).append(name)
        return [self._first[id(self._named[name])] for name in rules[rule]], rule

    def nothing_in(self, block: Block) -> str:
        """The message for a block without targets."""
        left = self._adaptable(block)[1]
        if left:
            listed = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:_SHOWN])
            return (
                f"plan: {block.name} has no linear layer that can be adapted ({listed}); name target_modules yourself"
            )
        return f"plan: {block.name} has no linear layer, so there is nothing to adapt in it"

    def attends(self, block: Block, name: str) -> bool:
        """Whether a module of a block is attention, or inside it."""
        path = block.path
        for part in name[len(block.path) + 1 :].split("."):
            path = f"{path}.{part}"
            module = _base(self._named[path])
            if isinstance(module, nn.MultiheadAttention) or is_named_attention(module, part):
                return True
            if isinstance(self._named[path], BaseTunerLayer):
                return False
        return False

    def _usual(self, block: Block) -> str | Sequence[str] | None:
        parts = block.path.split(".")
        for length in range(len(parts) - 1, -1, -1):
            kind = model_type_of(self._named[".".join(parts[:length])])
            if kind in USUAL_TARGETS:
                return USUAL_TARGETS[kind]
        return None

    def _adaptable(self, block: Block) -> tuple[list[str], dict[str, str]]:
        kept, left, whole = [], {}, None
        for name, module in modules_of(block):
            if whole is not None and name.startswith(whole):
                continue
            if isinstance(_base(module), nn.MultiheadAttention) and self._method == "LORA":
                whole = f"{name}."  # peft adapts it as a whole, because its projections are not called
            elif not is_linear(module):
                continue
            why = self._why_not(block, name, module)
            if why is None:
                kept.append(name)
            else:
                left[name] = why
        return kept, left

    def _why_not(self, block: Block, name: str, module: nn.Module) -> str | None:
        base, (parent, _, leaf) = _base(module), name.rpartition(".")
        holder = self._named[parent]
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.MultiheadAttention):
            return None if base._qkv_same_embed_dim else "it has keys or values of another width, which peft refuses"
        if base is self._output or id(weight) in self._tied:
            return "an output layer, or tied to an embedding"
        if _is_router(holder, leaf, base) or _ROUTER.search(name[len(block.path) :]):
            return "a router"
        if _is_foreign_linear(base, block):
            return f"{type(base).__name__} does not use its weight as a linear layer"
        if _INDEXER.search(name[len(block.path) :]):
            return "an indexer, which chooses keys and gets no gradient"
        if leaf in _MAMBA_LEAVES and model_type_of(self._model) in _MAMBA_TYPES and self._method in _MAMBA_METHODS:
            return "peft refuses it in Mamba, whose kernels read its weight"
        if leaf in read_directly(type(holder)):
            return f"{type(holder).__name__} reads its weight without calling it"
        if id(module) in self._foreign:
            return "shared with a block outside the plan"
        if self._method == "LORA" and self._is_rewritten(leaf):
            return "peft would put it on the fused experts of every block"
        return None

    def _is_rewritten(self, leaf: str) -> bool:
        if leaf not in self._rewritten:
            probe = peft.LoraConfig(target_modules=[f"x.{leaf}"])
            try:
                convert_peft_config_for_transformers(probe, self._model, None)
                self._rewritten[leaf] = not probe.target_modules
            except ValueError:  # peft needs the other half of a fused pair
                self._rewritten[leaf] = True
        return self._rewritten[leaf]

    # ---- as given --------------------------------------------------------------------------------------------------

    def given(self, wanted: str | Sequence[str]) -> list[str]:
        """The modules that `wanted` matches. `ValueError` if a block has none, or a pattern matches nothing."""
        found = []
        for block in self._blocks:
            inside = modules_of(block)
            names = [n for n, m in inside if (is_linear(m) if wanted == "all-linear" else _matches(wanted, n))]
            if not names:
                raise ValueError(
                    f"target_modules: {wanted} matches nothing in {block.name}, which has {_linears(block)}"
                    + ("; name its experts by target_parameters='experts'" if _fused_experts(block) else "")
                )
            found += names
        if not isinstance(wanted, str):
            unused = [pattern for pattern in wanted if not any(_matches([pattern], name) for name in found)]
            if unused:
                have = f"which have {_linears(self._blocks[0])}"
                raise ValueError(f"target_modules: {unused} match nothing in the planned blocks, {have}")
        found = list(dict.fromkeys(self._first[id(self._named[name])] for name in found))
        shared = [name for name in found if id(self._named[name]) in self._foreign]
        if shared:
            raise ValueError(
                f"target_modules: {_shown(shared)} belong to blocks outside the plan, too; add those blocks to the "
                "plan, or name other modules"
            )
        rewritten = [name for name in found if self._method == "LORA" and self._is_rewritten(name.rpartition(".")[2])]
        if rewritten:
            raise ValueError(
                f"target_modules: peft replaces {_shown(rewritten)} of a model of type {model_type_of(self._model)} "
                "by the fused experts of every block; omit them, and name experts by target_parameters='experts'"
            )
        return found


# ---- parts of the rules ----------------------------------------------------------------------------------------------


def _parameters(blocks: Sequence[Block], wanted: str | Sequence[str] | None) -> list[str]:
    if wanted is None:
        return []
    if isinstance(wanted, str) and wanted != "experts":
        raise ValueError(f"target_parameters: expected 'experts' or a sequence of names, got {wanted!r}")
    found = []
    for block in blocks:
        if wanted == "experts":
            found += _fused_experts(block)
        else:
            names = [_full_name(block, name) for name, _ in block.module.named_parameters()]
            found += [name for name in names if any(f".{name}".endswith(f".{pattern}") for pattern in wanted)]
    if not found:
        threes = [name for name, p in blocks[0].module.named_parameters() if p.dim() == 3]
        has = (
            f"which have the three-dimensional parameters {threes[:_SHOWN]}"
            if threes
            else "which have none in one tensor"
        )
        raise ValueError(f"target_parameters: {wanted!r} matches nothing in the planned blocks, {has}")
    return list(dict.fromkeys(found))


def _fused_experts(block: Block) -> list[str]:
    """The three-dimensional parameters of a block that hold its experts."""
    return [
        _full_name(block, name)
        for name, parameter in block.module.named_parameters()
        if parameter.dim() == 3 and _EXPERT.search(name) and ".lora_" not in name
    ]


def _full_name(block: Block, parameter: str) -> str:
    return f"{block.path}.{parameter}".replace(".base_layer", "")


def _norms(blocks: Sequence[Block]) -> Targets:
    names = [n for b in blocks for n, m in modules_of(b) if "norm" in type(_base(m)).__name__.lower()]
    if not names:
        raise ValueError(f"plan: {blocks[0].name} has no normalisation, which LNTuning would train")
    return Targets(tuple(names), (), {b.name: "norms" for b in blocks}, f"{len(names)} normalisations")


def _is_router(holder: nn.Module, leaf: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer beside experts, with one output for each expert or one output."""
    counts = set()
    for name, child in holder.named_children():
        if name != leaf and _EXPERT.search(name):
            counts |= {len(child)} if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else set()
            counts |= {p.shape[0] for p in child.parameters(recurse=False) if p.dim() == 3} | {1}
    counts |= {
        p.shape[0] for name, p in holder.named_parameters(recurse=False) if _EXPERT.search(name) and p.dim() == 3
    }
    return getattr(module, "out_features", None) in counts and not _EXPERT.fullmatch(leaf)


def _is_foreign_linear(module: nn.Module, block: Block) -> bool:
    """Whether a module is a subclass of `nn.Linear` from the model's code with another output than a linear layer."""
    cls = type(module)
    if not isinstance(module, nn.Linear) or cls.forward is nn.Linear.forward:
        return False
    if cls.__module__.split(".")[:2] != type(block.module).__module__.split(".")[:2]:  # a quantised linear layer
        return False
    try:
        with torch.no_grad():
            output = module(torch.zeros(1, module.in_features).to(module.weight))
    except Exception:  # it needs other arguments than a linear layer
        return True
    return not isinstance(output, torch.Tensor) or output.shape != (1, module.out_features)


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(f".{name}".endswith(f".{pattern}") for pattern in patterns)


def _in_experts(block: Block, name: str) -> bool:
    return any(_EXPERT.search(part) and "shared" not in part for part in name[len(block.path) :].split("."))


def _inside(block: Block, name: str) -> bool:
    return name.startswith(f"{block.path}.")


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _linears(block: Block) -> list[str]:
    names = [name[len(block.path) + 1 :] for name, module in modules_of(block) if is_linear(module)]
    return names[:_SHOWN] + (["..."] if len(names) > _SHOWN else [])


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
