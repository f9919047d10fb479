"""What interventions put before the attention functions of Transformers' models, whatever else is put there meanwhile.

Models fetch their attention function from an `AttentionInterface` by `get_interface`. A monitor that measures shadows
that method on the object, step by step. A property of the class stands before it, so that interventions act first and
the monitor sees what they made, in whatever order the two come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["InterfaceCall", "change_queries"]


@dataclass(frozen=True, eq=False)
class InterfaceCall:
    """One call of an attention function by a module."""

    name: str  # of the implementation: "sdpa", "eager", ...
    attend: Callable[..., Any]  # the implementation itself
    module: nn.Module
    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    mask: Tensor | None
    args: tuple  # what follows after the mask
    kwargs: dict[str, Any]


def change_queries(
    interface: Any, inside: set[int], change: Callable[[InterfaceCall], Tensor], *, last: bool = False
) -> Callable[[], None]:
    """Let `change` make the queries of the modules `inside` (by id), before the attention runs. Returns how to undo it.

    `last`: after those that are not, which may be put there later.
    """
    if not hasattr(type(interface), _CHANGES):
        interface.__class__ = _changing_class(type(interface))
    changing = type(interface)
    changes = getattr(changing, _CHANGES)
    entry = (inside, change, last)
    changes.append(entry)
    changes.sort(key=lambda one: one[2])

    def undo() -> None:
        changes[:] = [other for other in changes if other is not entry]
        if not changes and type(interface) is changing:
            interface.__class__ = changing.__mro__[1]

    return undo


_CHANGES = "_inflection_changes"  # on the class that an interface has meanwhile


def _changing_class(cls: type) -> type:
    changes: list[tuple[set[int], Callable[[InterfaceCall], Tensor], bool]] = []
    looking = [False]

    def shadowing(self):
        inner = vars(self).get("get_interface")
        inner = cls.get_interface.__get__(self) if inner is None else inner

        def get_interface(name, default):
            if looking[0]:  # what stands on the object has kept this very function, and asks it in turn: act once
                return inner(name, default)
            looking[0] = True
            try:
                attend = inner(name, default)
            finally:
                looking[0] = False

            own = cls.get_interface(self, name, default)

            def changed(module, query, key, value, attention_mask, *args, **kwargs):
                for inside, change, _ in changes:
                    if id(module) in inside:
                        query = change(InterfaceCall(name, own, module, query, key, attention_mask, args, kwargs))
                return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return changed

        return get_interface

    def put(self, value):
        vars(self)["get_interface"] = value

    def take(self):
        del vars(self)["get_interface"]

    return type(cls.__name__, (cls,), {"get_interface": property(shadowing, put, take), _CHANGES: changes})
