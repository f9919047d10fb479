"""Being attached to a model without harm: hooks that cost a step its values and not the training, and that go again.

And running a model for the sake of measuring: compiled code as it is written, and no trace left.
"""

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
    "Nothing",
    "WarnOnce",
    "eagerly",
    "forgiving",
    "hooks_guarded",
    "removed",
    "replaced",
    "trainable_as_before",
    "undisturbed",
]

_lock = threading.RLock()  # the garbage collector may end a forgotten monitor in a thread that is in here


def forgiving(hook):
    """A hook that fails costs the step its values. Before a first step was measured, it is an error of the set-up."""

    @wraps(hook)
    def guarded(self, *args):
        if self.failure is not None:
            return None
        started = perf_counter()
        try:
            return hook(self, *args)
        except Exception as error:
            if not self.forgives:
                raise
            self.failure = error
            return None
        finally:
            self.seconds += perf_counter() - started

    return guarded


class Nothing:
    """What taps are to a model that was read from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _forward_begins = _forward_ends = _run_begins = _run_ends = _block_begins = _block_ends = _do_nothing
    _block_follows = _submodule_ends = _parameter_gradient = _do_nothing


@contextmanager
def removed(handle) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """`make(original)` in place of the function `name` of an object; such replacements may end in any order."""
    stand_in = _StandIn(owner, name, make)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        stand_in.end()


class _StandIn:
    """One that ends below others stays in place, and does nothing of its own, until they have ended."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable], Callable]):
        self._owner, self._name, self._ended = owner, name, False
        self._original = getattr(owner, name)  # bound, or what somebody else has put there
        self._below = vars(owner).get(name)
        self._instead = make(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._original if self._ended else self._instead)(*args, **kwargs)

    def end(self) -> None:
        self._ended = True
        while isinstance(top := vars(self._owner).get(self._name), _StandIn) and top._ended:
            if top._below is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, top._below)


class WarnOnce:
    """Warnings of a run, each kind once: what fails in one step fails in thousands."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._given: set[str] = set()

    def __call__(self, kind: str, message: str) -> None:
        """Log `message` unless one of its kind was logged before."""
        if kind not in self._given:
            self._given.add(kind)
            self._logger.warning("%s", message)


class _Shared:
    """A setting of the process that holds while anybody wants it.

    What sets it restores what it found, which is wrong where two monitors end in another order than the reverse of
    their beginning: the first to come sets it, and the last to go restores it.
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


# Compiled code holds the hooks that there were when it was compiled. Code that runs as it is written has all.
eagerly = _Shared(lambda: torch.compiler.set_stance("force_eager"))

# Models of one class share compiled code where its guards allow it, and these do not look at hooks: one without hooks
# would lend its code to one with taps, or the other way round.
hooks_guarded = _Shared(lambda: torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, autograd: bool) -> Iterator[None]:
    """Run a model in evaluation mode and leave no trace: training flags and random generators as they were."""
    training = [(module, module.training) for module in model.modules()]
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), torch.set_grad_enabled(autograd), eagerly():
        try:
            for module, _ in training:
                module.training = False  # not model.eval(), which some models turn into more than a flag
            yield
        finally:
            for module, flag in training:
                module.training = flag
            reshard(model)


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """Leave `requires_grad` of all parameters as it was."""
    # peft marks every active adapter trainable when it switches them on again, frozen ones too.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
