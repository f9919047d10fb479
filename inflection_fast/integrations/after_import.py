"""Do something with a module right after somebody imports it, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]

Action = Callable[[ModuleType], None]
_waiting: dict[str, list[Action]] = {}


def when_imported(name: str, action: Action) -> None:
    """Calls `action(module)` after the module `name` was executed; now, if that has happened already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
        return
    _waiting.setdefault(name, []).append(action)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds nothing itself: lets the others find a module that is waited for, and listens to its loader."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            _listen(spec.loader, name)
        return spec


def _listen(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def listened(module: ModuleType) -> None:
        del loader.exec_module  # the attribute of this instance; the method of its class is found again
        execute(module)
        for action in _waiting.pop(name, []):
            action(module)

    loader.exec_module = listened
