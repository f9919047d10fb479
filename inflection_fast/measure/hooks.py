"""Hooks that cannot harm a training (an error costs the values of a step), and running a model without side effects."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .placements import reshard

__all__ = [
    "HookOwner", "NoHooks", "WarnOnce", "catch_hook_errors", "force_eager", "gradients_set_aside",
    "guard_module_hooks", "isolated_evaluation", "patched", "preserve_requires_grad",
]  # fmt: skip

_lock = threading.RLock()  # reentrant: the garbage collector may close a monitor in a thread that holds the lock


def catch_hook_errors(hook):
    """Keep what a hook raises as `failure` of the step. Until a step was measured it is raised: the set-up is wrong."""

    @wraps(hook)
    def guarded(self, *args):
        if self.failure is not None:
            return None
        started = perf_counter()
        try:
            return hook(self, *args)
        except Exception as error:
            if not self.tolerates_errors:
                raise
            self.failure = error
            return None
        finally:
            self.seconds += perf_counter() - started

    return guarded


class NoHooks:
    """Replaces taps in a model that was unpickled: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _forward_begins = _forward_ends = _run_begins = _run_ends = _block_begins = _block_ends = _do_nothing
    _block_follows = _submodule_ends = _parameter_gradient = _do_nothing


class HookOwner:
    """The owner of hooks on a model, which do nothing in a copy of the model."""

    def __deepcopy__(self, memo: dict) -> HookOwner:
        """Itself, of a model that is copied to average its weights."""
        return self

    def __reduce__(self) -> tuple:
        """Hooks that do nothing, so that a measured model can be pickled."""
        return NoHooks, ()


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace the function `name` of an object by `make(original)`; patches may end in any order."""
    patch = _Patch(owner, name, make)
    setattr(owner, name, patch)
    try:
        yield
    finally:
        patch.end()


class _Patch:
    """One patch of several on a function. If it ends first, it stays in place as a plain call until the others end."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable], Callable]):
        self._owner, self._name, self._ended = owner, name, False
        self._original = getattr(owner, name)  # bound, or another replacement
        self._below = vars(owner).get(name)
        self._instead = make(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._original if self._ended else self._instead)(*args, **kwargs)

    def end(self) -> None:
        self._ended = True
        while isinstance(top := vars(self._owner).get(self._name), _Patch) and top._ended:
            if top._below is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, top._below)


class WarnOnce:
    """Logs each kind of warning once: what fails in one step usually fails in all."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._given: set[str] = set()

    def __call__(self, kind: str, message: str) -> None:
        """Log `message`, the first of its kind."""
        if kind not in self._given:
            self._given.add(kind)
            self._logger.warning("%s", message)


class _SharedSetting:
    """A setting of the process with a reference count: the first context sets it, the last one restores it.

    Contexts of several monitors may end in any order.
    """

    def __init__(self, make: Callable[[], AbstractContextManager]):
        self._make, self._holders, self._set = make, 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _lock:
            if self._holders == 0:
                self._set.enter_context(self._make())
            self._holders += 1
        try:
            yield
        finally:
            with _lock:
                self._holders -= 1
                if self._holders == 0:
                    self._set.close()


# Compiled code has the hooks of the time of its compilation; eager code has the present ones.
force_eager = _SharedSetting(lambda: torch.compiler.set_stance("force_eager"))

# Models of one class share compiled code, and by default its guards do not check hooks: a model with taps would get the
# code of one without.
guard_module_hooks = _SharedSetting(lambda: torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))


@contextmanager
def isolated_evaluation(model: nn.Module, device: torch.device, autograd: bool) -> Iterator[None]:
    """Evaluation mode; training flags and random generators are restored on exit."""
    training = [(module, module.training) for module in model.modules()]
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), torch.set_grad_enabled(autograd), force_eager():
        try:
            for module, _ in training:
                module.training = False  # not model.eval(), which some models override
            yield
        finally:
            for module, flag in training:
                module.training = flag
            reshard(model)


@contextmanager
def preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of all parameters on exit."""
    # peft makes every active adapter trainable when it enables adapters again.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """Remove the gradients of a model; restore them and every `requires_grad` at the end."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with preserve_requires_grad(model):
            for parameter, _ in before:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
