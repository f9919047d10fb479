"""Finding the transformer blocks of a model by structure."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from .order import CONTAINERS, calls_forward_of_elements, in_order, in_turns

__all__ = ["Block", "find_blocks", "is_linear_attention", "is_named_attention"]

# MLA: multi-head latent attention (LongCat).
_ATTENTION_NAME = re.compile(r"(?<!post_)(attention|attn)|(?-i:MLA)$", re.IGNORECASE)
# Mixes residual streams around an attention, by its own softmax (GLM 5, DeepSeek V4: `attn_hc`).
_MIXING_NAME = re.compile(r"hyper_?connection|(^|_)hc$", re.IGNORECASE)
# Attention without a softmax over keys, so without a distribution: Qwen3-Next, Kimi-Linear, MiniMax.
_LINEAR_NAME = re.compile(r"linear_?att|lightning_?att|delta_?(net|att)", re.IGNORECASE)
_ATTENTION_CALLS = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
_ALWAYS_WRAPPED_AS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_NAMES_SHOWN = 5  # in error messages


@dataclass(frozen=True)
class Block:
    """One transformer block of a model."""

    index: int  # 0-based, in forward order
    # Qualified name without the prefixes of wrappers (DDP, torch.compile, peft). A module that runs several times in a
    # forward is several blocks, named "layer@0", "layer@1", ... after its runs.
    name: str
    path: str  # qualified name as model.get_submodule() takes it
    module: nn.Module  # an empty one after the monitor was closed
    stack: str = ""  # name of its stack: "encoder", "decoder", "vision_tower", ...


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[Block]:
    """The blocks of `model`, stack by stack, in the order in which their code runs.

    A stack of blocks is a container (`ModuleList`, `ModuleDict`, `Sequential`) whose children contain attention; of
    nested containers the innermost counts. Children without attention (Mamba, convolutions) are blocks too. Attention
    is recognised by the name of a class or an attribute, or by a `forward` that calls `scaled_dot_product_attention`.
    The attention modules themselves are the blocks where the children are lists that are never called, where attention
    and feed-forward modules are in separate lists (XLM), or where a model calls the `forward` of its blocks instead of
    the blocks (SqueezeBERT). In a model without any attention the stacks are the containers of repeated children with
    linear layers.

    Blocks that run several times are recognised if they are in their list several times, or by the configuration
    (ALBERT, HRM): every run is a block. Otherwise name each run: `names=["layer@0", "layer@1"]`.

    Which stack runs first is read from the code of the `forward` that uses them: the one that it names first. Stacks
    that alternate are in the order of their runs where the configuration gives it (Idefics, HRM), otherwise one after
    the other.

    Args:
        model: any module, also inside DDP, `torch.compile` or peft.
        names: the blocks by module name instead, in forward order, with or without the prefixes of wrappers.

    Raises:
        TypeError: `model` is no module, or `names` is one string.
        ValueError: there are no blocks, or a name does not exist or is given twice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    stacks = _stack_names(_stacked(model))
    paths = in_turns(model, stacks) if names is None else _named(model, names)
    if not paths:
        raise ValueError(
            f"model: {type(model).__name__} has no stack of blocks with attention or linear layers in them; "
            "give the module names of its blocks (names=..., or MonitorConfig(blocks=...))"
        )
    stack_of = {path: stack for stack, blocks in stacks.items() for path in blocks}
    blocks = []
    for i, path in enumerate(paths):
        path, at, run = path.partition("@")
        name = _unwrapped_name(model, path) + at + run
        blocks.append(
            Block(i, name, path, model.get_submodule(path), stack_of.get(path, stack_of.get(path + "@0", "")))
        )
    return blocks


# ---- by structure ----------------------------------------------------------------------------------------------------


# Parts of a container's name without indices -> paths of its blocks, with "@0", "@1", ... where they run several times.
Stacks = dict[tuple[str, ...], list[str]]
Container = tuple[str, list[str]]  # the path of a list of modules, and those of the blocks in it
Modules = set[nn.Module]


def _stacked(model: nn.Module) -> Stacks:
    holders, attentions = _attention_holders(model)
    for find in (_containers_with, _lists_of_attention, _repeated_linear):
        stacks: Stacks = {}
        for container, blocks in find(model, holders, attentions):
            parts = _unwrapped_name(model, container).split(".")
            if calls_forward_of_elements(type(model.get_submodule(container.rpartition(".")[0]))):
                inner = [one for b in blocks for one in _callable_in(model.get_submodule(b), b, attentions)]
                blocks = inner or blocks
            blocks = _run_by_run(model, container, blocks)
            stacks.setdefault(tuple(part for part in parts if not part.isdigit()), []).extend(blocks)
        if stacks:
            break
    return stacks


def _run_by_run(model: nn.Module, container: str, blocks: list[str]) -> list[str]:
    times = _times(model, container)
    if times > 1:
        return [f"{block}@{run}" for run in range(times) for block in blocks]
    held = model.get_submodule(container)
    children = [] if list(held.children()) == list(held._modules.values()) else list(held._modules.items())
    first = {child: _join(container, name) for name, child in reversed(children)}
    runs: Counter[str] = Counter()
    found = []
    for path in [first[child] for _, child in children if first[child] in blocks] or blocks:
        found.append(f"{path}@{runs[path]}" if children else path)
        runs[path] += 1
    return found


def _times(model: nn.Module, container: str) -> int:
    """How often a forward runs the blocks of a container, by the configuration of its model."""
    parts = container.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        groups = getattr(config, "num_hidden_groups", None)  # ALBERT: layers that follow each other share a group
        if config is not None and groups and len(parts) > 1 and parts[-2].isdigit():
            layers = config.num_hidden_layers
            return sum(int(layer / (layers / groups)) == int(parts[-2]) for layer in range(layers))
        high, low = getattr(config, "H_cycles", None), getattr(config, "L_cycles", None)  # HRM
        if isinstance(high, int) and isinstance(low, int):
            return high * (low if "L_module" in parts else 1)
    return 1


def _containers_with(module: nn.Module, holders: Modules, attentions: Modules) -> list[Container]:
    """Innermost containers with attention, and the blocks in them."""
    in_container = partial(_blocks_in, holders=holders, attentions=attentions)
    return _innermost(module, "", lambda name, child: child in holders, in_container)


def _innermost(module: nn.Module, path: str, enters: Callable[..., bool], blocks_in: Callable) -> list[Container]:
    """The innermost containers that have blocks, with these; only children that `enters` accepts are searched."""
    children = [(_join(path, name), child) for name, child in in_order(module) if enters(name, child)]
    inner = [one for name, child in children for one in _innermost(child, name, enters, blocks_in)]
    if inner or not isinstance(module, CONTAINERS):
        return inner
    blocks = blocks_in(module, path)
    return [(path, blocks)] if blocks else []


def _is_element(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _blocks_in(module: nn.Module, path: str, holders: Modules, attentions: Modules) -> list[str]:
    children = [(_join(path, name), child) for name, child in module.named_children()]
    held = [child for _, child in children if child in holders]
    classes = Counter(map(type, held))
    if isinstance(module, _NEVER_CALLED) and _is_element(path) and all(child in attentions for child in held):
        return []  # a nested list with attention and feed-forward of one block
    if not any(count > 1 for count in classes.values()) and len(children) > 1:
        # Parts of one block in a list of its own (T5: attention, cross-attention, feed-forward) differ in class, and
        # so does what a Sequential runs before and after its blocks.
        if isinstance(module, nn.Sequential) or _is_element(path.rpartition(".")[0]):
            return []
    found = []
    for name, child in children:
        if isinstance(child, _NEVER_CALLED):
            found += _callable_in(child, name, attentions)
        elif type(child) in classes or (not isinstance(module, nn.Sequential) and _has_children(child)):
            found.append(name)
    return found


def _callable_in(module: nn.Module, path: str, attentions: Modules) -> list[str]:
    """The outermost attention modules in a list that is not called."""
    found = []
    for name, child in module.named_children():
        if child in attentions:
            found.append(_join(path, name))
        else:
            found += _callable_in(child, _join(path, name), attentions)
    return found


def _lists_of_attention(module: nn.Module, holders: Modules, attentions: Modules, path: str = "") -> list[Container]:
    """Lists of attention modules (XLM, Flaubert), whose feed-forward modules are in other lists."""
    children = dict(module.named_children())
    if isinstance(module, nn.ModuleList) and children and all(child in attentions for child in children.values()):
        return [(path, [_join(path, name) for name in children])]
    inside = [_lists_of_attention(child, holders, attentions, _join(path, name)) for name, child in in_order(module)]
    return [one for found in inside for one in found]


def _repeated_linear(module: nn.Module, holders: Modules, attentions: Modules) -> list[Container]:
    """Innermost containers of several children of one class with linear layers in them, experts not counted."""

    def blocks_in(module: nn.Module, path: str) -> list[str]:
        children = [(_join(path, name), child) for name, child in module.named_children() if _has_linear(child)]
        return [name for name, _ in children] if len({type(child) for _, child in children}) == 1 else []

    return _innermost(module, "", lambda name, child: "expert" not in name.lower(), blocks_in)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules() if inner is not module)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _attention_holders(model: nn.Module) -> tuple[Modules, Modules]:
    """Modules that contain attention or call it in their forward; and the attention modules."""
    holders, attentions = set(), set()

    def visit(module: nn.Module, attribute: str) -> bool:
        inside = [visit(child, name) for name, child in module.named_children()]
        calls, named = _calls_attention(module), is_named_attention(module, attribute)
        if any(inside) or (calls and len(inside) > 1 and not named):
            holders.add(module)
        if named:
            attentions.add(module)
        return any(inside) or calls or named

    visit(model, "")
    return holders, attentions


def is_named_attention(module: nn.Module, attribute: str) -> bool:
    """Whether a module is a softmax attention, by the name of its class or attribute."""
    return not is_linear_attention(module, attribute) and _is_called(_ATTENTION_NAME, module, attribute)


def is_linear_attention(module: nn.Module, attribute: str) -> bool:
    """Whether a module is an attention without a softmax over keys, by these names."""
    return _is_called(_LINEAR_NAME, module, attribute)


def _is_called(pattern: re.Pattern, module: nn.Module, attribute: str) -> bool:
    if isinstance(module, CONTAINERS) or any(map(_MIXING_NAME.search, (type(module).__name__, attribute))):
        return False
    # A leaf of that name is a normalisation or a projection (`attention_norm`).
    return bool(pattern.search(type(module).__name__) or (pattern.search(attribute) and _has_children(module)))


def _calls_attention(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not _ATTENTION_CALLS.isdisjoint(code.co_names)


# ---- by name ---------------------------------------------------------------------------------------------------------


def _named(model: nn.Module, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"names: expected a sequence of module names, got the single string {names!r}")
    paths = {path: path for path, _ in model.named_modules() if path}
    known = {_unwrapped_name(model, path): path for path in paths} | paths
    found = []
    for name in names:
        base, at, run = str(name).partition("@")
        if base not in known or (at and not run.isdigit()):
            near = difflib.get_close_matches(str(name), known, n=_NAMES_SHOWN, cutoff=0.5) or list(known)[:_NAMES_SHOWN]
            raise ValueError(f"names: {type(model).__name__} has no module {name!r}; near matches are {near}")
        path = known[base] + at + run
        if path in found:
            raise ValueError(f"names: {name!r} is given twice")
        found.append(path)
    return found


# ---- names -----------------------------------------------------------------------------------------------------------


def _stack_names(stacks: Stacks) -> dict[str, list[str]]:
    """The stacks by the shortest distinct names: the parts of their paths where these begin to differ.

    A single stack has the name of its encoder or decoder, or "blocks".
    """
    keys = list(stacks)
    if len(keys) == 1:
        names = [next((part for part in keys[0][:-1] if part in ("encoder", "decoder")), "blocks")]
    else:
        shared = 0
        while len({key[shared : shared + 1] for key in keys}) == 1:
            shared += 1
        names = [_shortest(key, [other for other in keys if other != key], shared + 1) for key in keys]
    return {name: stacks[key] for name, key in zip(names, keys, strict=True)}


def _shortest(key: tuple[str, ...], others: list[tuple[str, ...]], length: int) -> str:
    first = length - 1
    while length < len(key) and any(other[:length] == key[:length] for other in others):
        length += 1
    return ".".join(key[first:length] or key[-1:])


def _unwrapped_name(model: nn.Module, path: str) -> str:
    kept, parent = [], model
    for part in filter(None, path.split(".")):
        if not _is_wrapper_part(parent, part):
            kept.append(part)
        parent = getattr(parent, part)
    return ".".join(kept)


def _is_wrapper_part(parent: nn.Module, part: str) -> bool:
    # By the class of the parent, not by the name: a model may have a submodule called "model".
    owner = type(parent).__module__
    return (
        part in _ALWAYS_WRAPPED_AS
        or (part == "module" and owner.startswith("torch.nn.parallel."))
        or (part in ("base_model", "model") and owner.startswith("peft."))
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
