"""A monitor for an unchanged training loop: it finds the model and the ends of the steps by itself."""

from __future__ import annotations

import gc
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from inflection_fast.blocks import find_blocks
from inflection_fast.integrations.after_import import when_imported
from inflection_fast.integrations.losses import listen_to_losses, sum_of_means
from inflection_fast.measure import Monitor, MonitorConfig, Row

__all__ = ["LoopMonitor", "holds"]

logger = logging.getLogger(__name__)


class LoopMonitor:
    """Measures the first model with transformer blocks that a training loop trains.

    From `start` on it watches new optimizers and calls of modules. The model is the first module that is called in
    training mode under autograd, has transformer blocks, and has parameters in an optimizer of torch. A monitor
    attaches before that call runs, and other modules are not watched any more. A step ends when the first optimizer
    with parameters of the model steps (also through Accelerate, which steps it when gradients are complete), or when a
    gradient scaler steps it; the scale is then removed from the gradients. The loss is what went through
    `Accelerator.backward`, or else the loss that the model returned.

    An exception here ends the measurement, not the training; `report` is called with its message.

    Args:
        config: what is measured, and when.
        out: folder of the timeline; if it holds one, a new folder beside it is used.
        on_row: as for `Monitor`.
        report: called with the reason why nothing is measured, or no longer.
    """

    def __init__(
        self,
        config: MonitorConfig,
        out: str | os.PathLike | None = None,
        *,
        on_row: Callable[[Row], None] | None = None,
        report: Callable[[str], None] = logger.warning,
    ):
        self._config, self._out, self._on_row, self._report = config, out, on_row, report
        self.monitor: Monitor | None = None
        self.accelerator: Any = None  # the Accelerator of the loop, if any
        self._model: nn.Module | None = None
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepping: weakref.ref[Optimizer] | None = None  # its step ends a step
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that are not the model
        self._patches = ExitStack()
        self._calls = ExitStack()
        self._listening = ExitStack()
        self._losses: list[torch.Tensor] = []
        self._suspended = 0
        self._closed = False

    def start(self) -> None:
        """Begin to watch, also the optimizers that exist already."""
        self._optimizers.update(one for one in gc.get_objects() if issubclass(type(one), Optimizer))
        self._patches.enter_context(_replaced(Optimizer, "__init__", self._note_optimizer))
        self._patches.enter_context(_replaced(torch.amp.GradScaler, "step", self._step_by_scaler))
        for register, hook in (
            (register_optimizer_step_pre_hook, self._before_step),
            (register_optimizer_step_post_hook, self._after_step),
        ):
            self._patches.callback(register(hook).remove)
        self._calls.enter_context(_replaced(nn.Module, "__call__", self._look_at_call))
        # `accelerator.backward(loss_of(model(x)))` reads `backward` before the first call of the model attaches.
        when_imported("accelerate.accelerator", self._listen_early)

    def close(self) -> None:
        """Detach, and remove all patches. Safe to call twice."""
        self._closed = True
        self._calls.close()
        self._listening.close()
        self._patches.close()
        if self.monitor is not None:
            self.monitor.close()
        self._model = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Pause, because another callback measures the model."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    # ---- finding the model -------------------------------------------------------------------------------------------

    def _note_optimizer(self, original: Callable[..., None], optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        self._optimizers.add(optimizer)

    def _look_at_call(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            module.training
            and torch.is_grad_enabled()
            and not self._suspended
            and self._optimizers
            and module not in self._seen
            and not torch.compiler.is_compiling()
            and self._is_trained(module)
        ):
            self._attach(module)
        return original(module, *args, **kwargs)

    def _is_trained(self, module: nn.Module) -> bool:
        if not any(holds(optimizer, module) for optimizer in self._optimizers):
            return False  # an optimizer may be made later
        try:
            find_blocks(module, self._config.blocks)
        except ValueError:
            self._seen.add(module)
            return False
        return True

    def _attach(self, model: nn.Module) -> None:
        self._calls.close()
        try:
            monitor = Monitor(model, self._config, self._out, on_row=self._on_row, if_exists="new")
            self.monitor = monitor.__enter__()
        except Exception as error:
            self._fail(error)
            return
        self._model = model
        self._listen()

    # ---- the ends of the steps ---------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if not _closure(args, kwargs):
            self._end_step(optimizer)

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if _closure(args, kwargs):  # the closure has just run the forward and backward passes
            self._end_step(optimizer)

    def _step_by_scaler(
        self, original: Callable[..., Any], scaler: torch.amp.GradScaler, optimizer: Optimizer, *args: Any, **kw: Any
    ) -> Any:
        self._end_step(getattr(optimizer, "optimizer", optimizer), scaler)  # inside the wrapper of Accelerate
        with self.suspended():
            return original(scaler, optimizer, *args, **kw)

    def _end_step(self, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        if self.monitor is None or self._model is None or self._suspended:
            return
        stepping = None if self._stepping is None else self._stepping()
        if stepping is None and holds(optimizer, self._model):
            self._stepping, stepping = weakref.ref(optimizer), optimizer
        if stepping is not optimizer:
            return
        loss = sum_of_means(self._losses)
        self._listening.close()
        try:
            self.monitor.step(loss, scaler=scaler)
        except Exception as error:
            self._fail(error)
            return
        self._listen()

    def _listen_early(self, accelerate: ModuleType) -> None:
        if self.monitor is None and not self._closed:
            self._listening.callback(listen_to_losses(self._keep_loss))

    def _listen(self) -> None:
        self._listening.close()
        self._losses = []
        if self.monitor is not None and self.monitor.measuring and "accelerate" in sys.modules:
            self._listening.callback(listen_to_losses(self._keep_loss))

    def _keep_loss(self, accelerator: Any, loss: torch.Tensor) -> None:
        if self.monitor is not None:
            self.accelerator = accelerator
            self._losses.append(loss)

    def _fail(self, error: Exception) -> None:
        if self.monitor is not None:
            self.monitor.close()
        self._model = None
        self._report(f"measuring failed: {error}")


def holds(optimizer: Optimizer, module: nn.Module) -> bool:
    """Whether an optimizer has parameters of a module."""
    held = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    return any(id(parameter) in held for parameter in module.parameters())


def _closure(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether `step` was called with a closure. The first of `args` is the optimizer."""
    return any(callable(one) for one in args[1:]) or callable(kwargs.get("closure"))


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Replace a method by one that calls `by(original, ...)`."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return by(original, *args, **kwargs)

    replacement.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if getattr(owner, name) is replacement:  # else a later replacement calls ours
            setattr(owner, name, original)
