"""Interventions that change queries before the attention functions of Transformers' models.

Models get their attention function from an `AttentionInterface` by `get_interface`. In measured steps a monitor
replaces that method on the object. Here a property of the class takes precedence, so interventions act first and the
monitor sees their queries, in whatever order both are attached and removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..measure.attention_observer import InterfaceCall

__all__ = ["InterfaceCall", "change_queries"]


def change_queries(
    interface: Any, inside: set[int], change: Callable[[InterfaceCall], Tensor], *, last: bool = False
) -> Callable[[], None]:
    """Let `change` return the queries of the modules `inside` (by id), before the attention runs.

    `last`: after all changes without `last`, also later ones. Returns a function that removes the change.
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


_CHANGES = "_inflection_changes"  # attribute of the class that an interface gets


def _changing_class(cls: type) -> type:
    changes: list[tuple[set[int], Callable[[InterfaceCall], Tensor], bool]] = []
    running = False

    def get(self):
        inner = vars(self).get("get_interface")
        inner = cls.get_interface.__get__(self) if inner is None else inner

        def get_interface(name, default):
            nonlocal running
            if running:  # the replacement on the object calls this function again: change the queries only once
                return inner(name, default)
            running = True
            try:
                attend = inner(name, default)
            finally:
                running = False

            original = cls.get_interface(self, name, default)

            def changed(module, query, key, value, attention_mask, *args, **kwargs):
                for inside, change, _ in changes:
                    if id(module) in inside:
                        query = change(InterfaceCall(name, original, module, query, key, attention_mask, args, kwargs))
                return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return changed

        return get_interface

    def set(self, value):
        vars(self)["get_interface"] = value

    def delete(self):
        del vars(self)["get_interface"]

    return type(cls.__name__, (cls,), {"get_interface": property(get, set, delete), _CHANGES: changes})
