"""The order in which a model runs its blocks, from its code and its configuration."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType

from torch import nn

__all__ = ["CONTAINERS", "calls_forward_of_elements", "in_order", "in_turns"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def in_turns(model: nn.Module, stacks: dict[str, list[str]]) -> list[str]:
    """The blocks of all stacks; alternating stacks in the order of their configuration."""
    order = [path for blocks in stacks.values() for path in blocks]
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in order:
        parts, (_, _, run) = path.partition("@")[0].split("."), path.partition("@")
        module = next((part for part in ("L_module", "H_module") if part in parts), None)
        if module is not None:  # HRM: so many runs of the low module, then one of the high one, and again
            around = ".".join(parts[: parts.index(module)])
            low = getattr(getattr(model.get_submodule(around), "config", None), "L_cycles", None)
            if isinstance(low, int) and low:
                turn = divmod(int(run or 0), low) if module == "L_module" else (int(run or 0), low)
                groups.setdefault(around, {})[path] = (*turn, order.index(path))
        elif len(parts) > 1 and parts[-1].isdigit():
            around = ".".join(parts[:-2])
            interval = getattr(model.get_submodule(around), "cross_layer_interval", None)
            if isinstance(interval, int):  # Idefics: a gated block of cross attention before every so many blocks
                crosses = parts[-2].startswith("gated_cross")
                groups.setdefault(around, {})[path] = (int(parts[-1]) * (interval if crosses else 1), int(not crosses))
    for turns in groups.values():
        places = [place for place, path in enumerate(order) if path in turns]
        for place, path in zip(places, sorted(turns, key=turns.__getitem__), strict=True):
            order[place] = path
    return order


def calls_forward_of_elements(cls: type[nn.Module]) -> bool:
    """Whether a loop in `forward` calls `element.forward`, which runs no hooks."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or "forward" not in code.co_names:
        return False
    steps = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    elements = set()
    for one, following in pairwise(steps):
        if one.opname in ("FOR_ITER", "UNPACK_SEQUENCE") and following.opname.startswith("STORE_FAST"):
            elements.add(following.argval)
        elif one.opname.startswith("LOAD_FAST") and one.argval in elements:
            if following.opname in _LOADS and following.argval == "forward":
                return True
    return False


def in_order(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children in the order of their names in the code of `forward`.

    First those that it calls, passes on or loops over, then those of which it reads an attribute, then the others.
    """
    children = dict(module.named_children())
    if len(children) < 2 or isinstance(module, CONTAINERS):
        return list(children.items())
    uses = [(name, looked_into) for name, looked_into in _uses_in(type(module), "forward", set()) if name in children]
    order = dict.fromkeys(name for name, _ in sorted(uses, key=lambda use: use[1])) | dict.fromkeys(children)
    if "encoder" in order and "decoder" in order:  # the code may use embeddings of the decoder first
        order = {name: None for name in order if name != "decoder"} | {"decoder": None}
    return [(name, children[name]) for name in order]


def _uses_in(cls: type, method: str, visited: set[str]) -> Iterator[tuple[str, bool]]:
    """Attributes that a method and the methods it calls load, and whether only an attribute of them is read."""
    visited.add(method)
    function = getattr(cls, method, None)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    for name, looked_into in [] if code is None else _uses_of(code):
        yield name, looked_into
        if name not in visited and inspect.isfunction(getattr(cls, name, None)):
            yield from _uses_in(cls, name, visited)


def _uses_of(code: CodeType) -> Iterator[tuple[str, bool]]:
    instructions = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    for one, following in zip(instructions, [*instructions[1:], None], strict=True):
        if one.opname in _LOADS:
            yield one.argval, following is not None and following.opname in _LOADS
    for const in code.co_consts:
        if isinstance(const, CodeType):  # of comprehensions and inner functions
            yield from _uses_of(const)


_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
