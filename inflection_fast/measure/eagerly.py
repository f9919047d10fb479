"""Running a model for the sake of measuring: compiled code as it is written, and no trace left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .placements import reshard

__all__ = ["eagerly", "trainable_as_before", "undisturbed"]

_lock = threading.RLock()  # the garbage collector may end a forgotten monitor in a thread that is in here
_holders = 0
_stance = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code holds the hooks that there were when it was compiled. Code that runs as it is written has all.

    `torch.compiler.set_stance` restores what it found, which is wrong where two monitors end in another order than the
    reverse of their beginning: the first to come sets the stance, and the last to go restores it.
    """
    global _holders, _stance
    with _lock:
        if _holders == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _stance.__exit__(None, None, None)


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
