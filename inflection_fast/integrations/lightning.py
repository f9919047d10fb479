"""The monitor as a callback of Lightning's Trainer, under both names of the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

from inflection_fast.alerts import Alert, AlertConfig
from inflection_fast.blocks import find_blocks
from inflection_fast.integrations.loops import holds
from inflection_fast.integrations.losses import sum_of_means
from inflection_fast.integrations.scalars import Scalars
from inflection_fast.integrations.trackers import FailSafe
from inflection_fast.measure import Monitor, MonitorConfig, Row
from inflection_fast.timeline import Timeline

# `__getattr__` makes LightningCallback.
__all__ = ["VARIABLE", "LightningCallback", "LightningMonitoring", "callback_class", "from_environment"]  # noqa: F822

VARIABLE = "INFLECTION_FAST"  # folder for the timelines of trainings without the callback in their code
_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


class LightningMonitoring:
    """Measures the transformer inside a LightningModule while `fit` trains it.

    ```python
    Trainer(callbacks=[LightningCallback(MonitorConfig(every=10), out="runs/a")]).fit(module, data)
    ```

    The model is the child of the LightningModule that holds all the blocks, or the LightningModule itself if its
    `training_step` calls `self(...)`. A step ends before clipping and before the step of the first optimizer that holds
    parameters of the model; gradients are those before clipping and without loss scale. The loss is the one that
    Lightning differentiates. Scalars go to every logger of the Trainer, with the optimizer step.

    Args:
        config: what is measured, and when.
        out: folder of the timeline; None: in memory only.
        module: name of the model within the LightningModule ("net.encoder"); None: found as described above.
        probe, alerts, on_alert: as for `Monitor`.
        if_exists: for a timeline that exists in `out`: "error", "overwrite" or "new".
        keys: patterns of further scalars; see `inflection_fast.integrations.scalars`. None: no scalars are logged.
    """

    def __init__(
        self,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  frozen
        out: str | os.PathLike | None = None,
        *,
        module: str | None = None,
        probe: list[dict[str, torch.Tensor]] | None = None,
        alerts: AlertConfig | None = AlertConfig(),  # noqa: B008  frozen
        on_alert: Callable[[list[Alert]], None] | None = None,
        if_exists: str = "error",
        keys: Iterable[str] | None = (),
    ):
        self.config, self.out, self.module = config, out, module
        self.probe, self.alerts, self.on_alert, self.if_exists = probe, alerts, on_alert, if_exists
        self._scalars = None if keys is None else Scalars(keys)
        self.monitor: Monitor | None = None
        self._model: nn.Module | None = None
        self._optimizer: Any = None  # whose step ends a step
        self._losses: list[torch.Tensor] = []
        self._loggers: list[Any] = []
        self._safely = FailSafe()

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before training has begun."""
        if self.monitor is None:
            raise RuntimeError(
                "LightningCallback.timeline: nothing was measured yet; trainer.fit() is measured, validate() and test()"
                " are not"
            )
        return self.monitor.timeline

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach. ValueError if no blocks are found, or the strategy is DeepSpeed."""
        self.close()
        strategy = type(trainer.strategy).__name__
        if "DeepSpeed" in strategy:
            raise ValueError(
                f"the strategy {strategy} stores gradients where hooks cannot read them: use DDP or FSDP to measure"
            )
        self._model = self._model_in(pl_module)
        self._loggers = list(trainer.loggers) if trainer.is_global_zero else []
        self.monitor = Monitor(
            self._model,
            self.config,
            self.out,
            probe=self.probe,
            start_step=trainer.global_step,
            alerts=self.alerts,
            on_alert=self.on_alert,
            on_row=None if self._scalars is None else self._log,
            if_exists=self.if_exists,
        )
        self.monitor.__enter__()
        self._optimizer, self._losses = None, []

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: torch.Tensor) -> None:
        """Keep the loss of a measured step."""
        if self.monitor is not None and self.monitor.measuring:
            self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """End a step."""
        if self.monitor is None or self._model is None:
            return
        if self._optimizer is None and holds(optimizer, self._model):
            self._optimizer = optimizer
        if optimizer is not self._optimizer:
            return
        self.monitor.step(sum_of_means(self._losses), scaler=getattr(trainer.precision_plugin, "scaler", None))
        self._losses = []

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Detach."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Detach."""
        self.close()

    def close(self) -> None:
        """Detach. Safe to call twice."""
        if self.monitor is not None:
            self.monitor.close()
        self._model, self._optimizer, self._losses = None, None, []

    def _model_in(self, pl_module: nn.Module) -> nn.Module:
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        blocks = {id(block.module) for block in find_blocks(pl_module, self.config.blocks)}
        for child in pl_module.children():
            inside = {id(module) for module in child.modules()}
            if blocks <= inside and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                return child
        return pl_module

    def _log(self, row: Row) -> None:
        if self._scalars is not None:
            scalars = self._scalars.of(row)
            for logger in self._loggers:
                self._safely(type(logger).__name__, logger.log_metrics, scalars, step=row.step)


def callback_class(namespace: str | None = None) -> type[LightningMonitoring]:
    """`LightningMonitoring` as a Callback of "lightning.pytorch" or "pytorch_lightning"; None: the installed one.

    `ModuleNotFoundError` if it is not installed.
    """
    if namespace is None:
        loaded = [name for name in _NAMESPACES if name in sys.modules]
        namespace = loaded[0] if loaded else None
    for name in [namespace] if namespace else _NAMESPACES:
        with suppress(ModuleNotFoundError):
            base = import_module(name).Callback
            return type("LightningCallback", (LightningMonitoring, base), {"__doc__": LightningMonitoring.__doc__})
    raise ModuleNotFoundError("Lightning is not installed: pip install lightning", name="lightning")


def from_environment() -> list[Any]:
    """For Lightning's entry points: the callback with its timeline in $INFLECTION_FAST, if that is set."""
    folder = os.environ.get(VARIABLE)
    return [callback_class()(out=folder, if_exists="new")] if folder else []


def __getattr__(name: str) -> Any:
    if name == "LightningCallback":  # made on first use, for the Lightning package that is imported then
        globals()[name] = callback_class()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
