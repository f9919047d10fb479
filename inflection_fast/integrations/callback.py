"""The monitor as a callback of transformers.Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from inflection_fast.alerts import Alert, AlertConfig
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.arguments import loss_of
from inflection_fast.timeline import Timeline

__all__ = ["InflectionCallback"]


class InflectionCallback(TrainerCallback):
    """Measures a model while `transformers.Trainer` trains it.

    ```python
    with InflectionCallback(MonitorConfig(every=10), out="runs/a", probe=probe) as callback:
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    callback.timeline
    ```

    It attaches when training begins and detaches when it ends. The Trainer tells no callback when training raises, so
    the `with` block (or `close()` in a `finally`) is what leaves the model as it was in that case; where training ends
    well it adds nothing. A training resumed from a checkpoint continues the timeline in `out` at the checkpoint's step,
    and delta-CKA goes on being against the weights before training, whose features lie beside the timeline.

    Norms are those of the gradient of the loss as the mean over the whole batch of a step, whatever the number of
    micro-batches and processes. The Trainer tells a model the number of items in that batch, leaves dividing by it to
    the model, and multiplies the losses of several processes by their number. A model that does not divide (sequence
    classification, mostly) is so trained with a multiple of that gradient; whether it does is seen on the way, and
    the multiple is taken out of norms and loss. With a loss of its own (`compute_loss_func`, label smoothing) the
    Trainer is taken to divide. The loss in the timeline is the one that the Trainer takes, whoever computes it.

    What goes wrong in the training is logged as warnings, and handed to `on_alert`::

        InflectionCallback(config, "runs/a", alerts=AlertConfig(max_logit=500.0), on_alert=send_to_whoever_is_on_duty)

    In distributed training every process needs the callback. Steps that are not measured find no hooks of it.

    Args:
        config: what and when.
        out: folder of the timeline; None: kept in memory only.
        probe: as for `Monitor`.
        alerts: what counts as going wrong; None: nothing.
        on_alert: called with the alerts of a measured step, where there are any, from a thread of the monitor's own.
    """

    def __init__(
        self,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  frozen, so that one default serves all
        out: str | os.PathLike | None = None,
        *,
        probe: list[dict[str, torch.Tensor]] | None = None,
        alerts: AlertConfig | None = AlertConfig(),  # noqa: B008  frozen
        on_alert: Callable[[list[Alert]], None] | None = None,
    ):
        self.config = config
        self.alerts = alerts
        self.on_alert = on_alert
        self.out = out
        self.probe = probe
        self.monitor: Monitor | None = None
        self._model: nn.Module | None = None
        self._hooks = ExitStack()
        self._watching = ExitStack()  # of the Trainer, for the length of the training
        self._start_step = 0
        self._losses: list[torch.Tensor] = []
        self._taken: list[torch.Tensor] = []  # as the Trainer takes them, divided as it divides
        self._items: torch.Tensor | int | None = None  # in the whole batch, if the model is told
        self._sums_ranks = False  # losses of ranks add up, too

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before training has begun."""
        if self.monitor is None:
            raise RuntimeError("InflectionCallback.timeline before training began: nothing was measured")
        return self.monitor.timeline

    def attach(self, model: nn.Module, start_step: int = 0) -> None:
        """Attaches to the model now instead of when training begins, for errors before anything else happens.

        `start_step` is the number of updates that the training has behind it. ValueError as `Monitor` raises it.
        """
        if self.monitor is not None:
            raise ValueError("the callback has been attached to a model already: use one callback per training")
        monitor = Monitor(
            model,
            self.config,
            self.out,
            probe=self.probe,
            start_step=start_step,
            alerts=self.alerts,
            on_alert=self.on_alert,
        )
        self.monitor = monitor.__enter__()
        self._model = model
        self._start_step = start_step
        self._arm()

    def close(self) -> None:
        """Detaches; safe to call twice."""
        self._hooks.close()
        self._watching.close()
        if self.monitor is not None:
            self.monitor.close()
        self._losses, self._taken, self._model = [], [], None

    def __deepcopy__(self, memo: dict) -> InflectionCallback:
        """Itself: a copy of the model (an average of its weights) carries the hook along, which then does nothing."""
        return self

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Nothing once it is attached: so the model can be saved as a whole, with its hooks."""
        return super().__reduce_ex__(protocol) if self.monitor is None else (_Nothing, ())

    def __enter__(self) -> InflectionCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _arm(self) -> None:
        """Hooks on the model for the length of a step that is measured."""
        self._hooks.close()
        self._losses, self._taken, self._items = [], [], None
        if self.monitor.measuring:
            for handle in (
                self._model.register_forward_pre_hook(self._watch_items, with_kwargs=True),
                self._model.register_forward_hook(self._keep_loss),
            ):
                self._hooks.callback(handle.remove)

    def _trains(self, model: nn.Module) -> bool:
        return model is self._model and model.training and torch.is_grad_enabled()

    def _watch_items(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        items = kwargs.get("num_items_in_batch")
        if items is None or not self._trains(model):
            return None
        if self._items is None:
            self._items = items.as_subclass(_Watched) if isinstance(items, torch.Tensor) else items
        return args, kwargs | {"num_items_in_batch": self._items}

    def _keep_loss(self, model: nn.Module, args: tuple, output: Any) -> None:
        loss = loss_of(output) if self._trains(model) else None
        if loss is not None:
            self._losses.append(loss.detach())

    def _watch(self, trainer: Any) -> None:
        """Note the losses that a Trainer takes, which need not be those that the model returns, if it returns any.

        It tells callbacks everything but itself and the loss, so its `training_step` is shadowed while it trains.
        """
        training_step = trainer.training_step

        def noting(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            if self.monitor is not None and self.monitor.measuring and isinstance(loss, torch.Tensor):
                self._taken.append(loss.detach())
            return loss

        shadowed = vars(trainer).get("training_step")
        trainer.training_step = noting
        restore = partial(setattr, trainer, "training_step", shadowed)
        self._watching.callback(restore if shadowed is not None else partial(delattr, trainer, "training_step"))

    def _loss_and_scale(self) -> tuple[torch.Tensor | None, float]:
        """The mean loss over this rank's share of the batch, and what the Trainer has multiplied it by."""
        loss, scale = self._loss_of_model()
        if self._taken:
            loss = torch.stack([one.float().mean() for one in self._taken]).sum() / scale
        return loss, scale

    def _loss_of_model(self) -> tuple[torch.Tensor | None, float]:
        if not self._losses:
            return None, 1.0
        total = torch.stack([loss.float().mean() for loss in self._losses]).sum()
        mean = total / len(self._losses)
        if self._items is None:  # the Trainer divides by the number of micro-batches
            return mean, 1.0
        ranks = self.monitor.data_ranks if self._sums_ranks else 1
        if getattr(self._items, "used", True):
            return total * ranks, 1.0  # shares of one mean; the monitor takes the mean over ranks
        return mean, float(len(self._losses) * ranks)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attaches, unless `attach` did."""
        if args.n_gpu > 1:
            self.close()
            raise ValueError(
                "the Trainer would copy the model to several GPUs, where it cannot be measured:"
                " show it one GPU with CUDA_VISIBLE_DEVICES, or start one process per GPU with torchrun"
            )
        self._sums_ranks = args.average_tokens_across_devices
        trainer = _calling_trainer()
        if trainer is not None:
            self._watch(trainer)
        if self.monitor is None:
            self.attach(model, state.global_step)
        elif self._start_step != state.global_step:
            self.close()
            raise ValueError(
                f"the callback was attached at step {self._start_step}, and training begins at step {state.global_step}"
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Ends a step where a plain loop would: after the backward passes, before the weights change."""
        if self.monitor.measuring:
            loss, scale = self._loss_and_scale()
            self.monitor.step(loss, loss_scale=scale, scaler=getattr(optimizer, "scaler", None))
        else:
            self.monitor.step()
        self._arm()

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches."""
        self.close()


def _calling_trainer() -> Any:
    """The Trainer that is calling its callbacks; None if somebody else does."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(caller, "training_step") and hasattr(caller, "callback_handler"):
            return caller
        frame = frame.f_back
    return None


class _Nothing:
    """What a callback is to a model that was read from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _watch_items = _keep_loss = _do_nothing


class _Watched(torch.Tensor):
    """A number that notes whether anybody has computed with it."""

    used = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ != "__get__":  # to ask for its shape is not to compute
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, cls):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
