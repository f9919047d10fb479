"""Which modules of a model are its transformer blocks, found by structure."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["Block", "find_blocks", "is_named_attention"]

_ATTENTION_NAME = re.compile(r"attention|attn", re.IGNORECASE)
_ATTENTION_CALLS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_ALWAYS_WRAPPED_AS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_NAMES_SHOWN = 5  # in error messages


@dataclass(frozen=True)
class Block:
    """One transformer block of a model."""

    index: int  # 0-based, in forward order
    name: str  # qualified name without the prefixes of wrappers (DDP, torch.compile, peft)
    path: str  # qualified name as model.get_submodule() takes it
    module: nn.Module | None  # None: of a monitor that was closed


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[Block]:
    """The transformer blocks of `model`, in forward order; of an encoder-decoder the encoder's first.

    A stack of blocks is a container (`ModuleList`, `ModuleDict`, `Sequential`) whose children hold attention and share
    a class, or that has one such child only; of nested stacks the innermost counts. Attention is recognised by the
    name of a class or an attribute, or by a `forward` that calls `scaled_dot_product_attention`.

    Args:
        model: any module, also inside DDP, `torch.compile` or peft.
        names: the blocks by module name instead, in forward order, with or without the prefixes of wrappers.

    Raises:
        TypeError: `model` is no module, or `names` is one string.
        ValueError: there are no blocks with attention, or a name does not exist or stands twice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    paths = _stacked(model) if names is None else _named(model, names)
    if not paths:
        raise ValueError(
            f"model: {type(model).__name__} has no stack of blocks with attention; "
            "give the module names of its blocks (names=..., or MonitorConfig(blocks=...))"
        )
    return [Block(i, _unwrapped_name(model, path), path, model.get_submodule(path)) for i, path in enumerate(paths)]


# ---- by structure ----------------------------------------------------------------------------------------------------


def _stacked(model: nn.Module) -> list[str]:
    holders = _attention_holders(model)
    stacks = list(_stacks(model, "", holders))
    if any(_has_part(paths[0], "encoder") for paths in stacks):
        # Some models register their decoder first; Python's sort keeps every other order as registered.
        stacks.sort(key=lambda paths: _has_part(paths[0], "decoder"))
    return [path for paths in stacks for path in paths]


def _stacks(module: nn.Module, path: str, holders: set[nn.Module]) -> Iterator[list[str]]:
    inner = [stack for name, child in module.named_children() for stack in _stacks(child, _join(path, name), holders)]
    if inner:
        yield from inner
    elif isinstance(module, _CONTAINERS):
        blocks = [(_join(path, name), child) for name, child in module.named_children() if child in holders]
        classes = Counter(type(child) for _, child in blocks)
        # A block may keep its parts in a list of its own (T5: attention, cross-attention, feed-forward): those differ
        # in class, the blocks of a stack do not. A stack may be one block deep.
        repeated = [cls for cls, count in classes.items() if count > 1 or len(module) == 1]
        if repeated:
            yield [name for name, child in blocks if type(child) in repeated]


def _attention_holders(model: nn.Module) -> set[nn.Module]:
    """Modules with attention strictly inside them, or that call it in their own forward next to other modules."""
    holders = set()

    def visit(module: nn.Module, attribute: str) -> bool:
        inside = [visit(child, name) for name, child in module.named_children()]
        calls = _calls_attention(module)
        if any(inside) or (calls and len(inside) > 1 and not is_named_attention(module, attribute)):
            holders.add(module)
        return any(inside) or calls or is_named_attention(module, attribute)

    visit(model, "")
    return holders


def is_named_attention(module: nn.Module, attribute: str) -> bool:
    """Whether a module is an attention going by the name of its class, or of the attribute that holds it."""
    if _ATTENTION_NAME.search(type(module).__name__) and not isinstance(module, _CONTAINERS):
        return True
    # A bare leaf of that name is a normalisation or a projection beside the attention (`attention_norm`).
    return bool(_ATTENTION_NAME.search(attribute)) and next(module.children(), None) is not None


def _calls_attention(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and not _ATTENTION_CALLS.isdisjoint(code.co_names)


# ---- by name ---------------------------------------------------------------------------------------------------------


def _named(model: nn.Module, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"names: expected a sequence of module names, got the single string {names!r}")
    paths = {path: path for path, _ in model.named_modules() if path}
    known = {_unwrapped_name(model, path): path for path in paths} | paths
    found = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=_NAMES_SHOWN, cutoff=0.5) or list(known)[:_NAMES_SHOWN]
            raise ValueError(f"names: {type(model).__name__} has no module {name!r}; near matches are {near}")
        if known[name] in found:
            raise ValueError(f"names: {name!r} stands twice")
        found.append(known[name])
    return found


# ---- names -----------------------------------------------------------------------------------------------------------


def _unwrapped_name(model: nn.Module, path: str) -> str:
    kept, parent = [], model
    for part in path.split("."):
        if not _is_wrapper_part(parent, part):
            kept.append(part)
        parent = getattr(parent, part)
    return ".".join(kept)


def _is_wrapper_part(parent: nn.Module, part: str) -> bool:
    # By the class that holds the part, not by its spelling: a model may well have a submodule called "model".
    owner = type(parent).__module__
    return (
        part in _ALWAYS_WRAPPED_AS
        or (part == "module" and owner.startswith("torch.nn.parallel."))
        or (part in ("base_model", "model") and owner.startswith("peft."))
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_part(path: str, part: str) -> bool:
    return part in path.split(".")
