"""The monitor as a callback of transformers.Trainer."""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import nn
from transformers import TrainerCallback

from inflection_fast.alerts import Alert, AlertConfig
from inflection_fast.integrations.losses import listen_to_losses, sum_of_means
from inflection_fast.integrations.trainer_log import TrainerLog
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.micro_batch import loss_of
from inflection_fast.measure.placements import reachable
from inflection_fast.measure.probe import REFERENCE_NAME
from inflection_fast.timeline import IF_EXISTS, Timeline, folder_for

__all__ = ["InflectionCallback", "ReportedTo"]

logger = logging.getLogger(__name__)

_measured_by: weakref.WeakKeyDictionary[nn.Module, weakref.ref[InflectionCallback]] = weakref.WeakKeyDictionary()


class InflectionCallback(TrainerCallback):
    """Measures a model while `transformers.Trainer` trains it.

    ```python
    with InflectionCallback(MonitorConfig(every=10), out="runs/a", probe=probe) as callback:
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    callback.timeline
    ```

    It attaches when training begins and detaches when it ends. The Trainer does not call callbacks when training
    raises; the `with` block (or `close()` in a `finally`) then detaches. A training resumed from a checkpoint continues
    the timeline in `out` at the step of the checkpoint. Delta-CKA still compares with the weights before training,
    whose features are saved beside the timeline. In another training, also by `model_init`, the callback starts again:
    `monitor` and `timeline` are those of the newest training. Measurements of an attempt that the Trainer repeats
    (`auto_find_batch_size`) are deleted.

    The loss of a step is the sum of the losses that went through `Accelerator.backward`, as the Trainer logs it, also
    with label smoothing, `compute_loss_func` and the trainers of TRL. A training step that differentiates in another
    way gives NaN and one warning.

    Norms are those of the gradient of the mean loss over the whole batch of a step, for any number of micro-batches
    and processes. The Trainer passes the number of items in that batch to the model, which has to divide by it, and
    multiplies the losses of several processes by their number. A model that does not divide (usually one for sequence
    classification) trains with a multiple of that gradient. The callback observes whether the model divides, and
    removes the multiple from norms and loss. A loss that the model did not compute is used as it is.

    Alerts of the training are logged as warnings, and passed to `on_alert`::

        InflectionCallback(config, "runs/a", alerts=AlertConfig(max_logit=500.0), on_alert=send_a_message)

    Every measured step is logged as a row of its own, with the `global_step` after it: about a dozen scalars
    ("inflection/entropy/min", ...; `inflection_fast.integrations.scalars`) in `trainer.state.log_history` and in the
    reporters of `report_to`, and at the end one heat map per signal in TensorBoard, W&B, trackio and MLflow. If a
    reporter raises, one warning is logged. After `import inflection_fast.integrations`,
    `TrainingArguments(report_to="inflection")` adds this callback, with the timeline in `output_dir`/inflection.

    In distributed training every process needs the callback. In steps that are not measured it has no hooks.

    Args:
        config: what is measured, and when.
        out: folder of the timeline; None: in memory only.
        probe: as for `Monitor`.
        alerts: limits of alerts; None: no alerts.
        on_alert: called with the alerts of a measured step, if any, in a thread of the monitor.
        if_exists: for a timeline that exists in `out` when a training begins at step 0: "error" raises, "overwrite"
            deletes it, "new" measures into `out`-2, `out`-3, ... (see `folder`).
        keys: patterns of further scalars ("entropy/layer_07", "max_logit/*"); None: no scalars and no heat maps.
    """

    def __init__(
        self,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  frozen, so that one default serves all
        out: str | os.PathLike | None = None,
        *,
        probe: list[dict[str, torch.Tensor]] | None = None,
        alerts: AlertConfig | None = AlertConfig(),  # noqa: B008  frozen
        on_alert: Callable[[list[Alert]], None] | None = None,
        if_exists: str = "error",
        keys: Iterable[str] | None = (),
    ):
        if if_exists not in IF_EXISTS:
            raise ValueError(f"if_exists: expected one of {', '.join(IF_EXISTS)}, got {if_exists!r}")
        self.config, self.out, self.probe = config, out, probe
        self.alerts, self.on_alert, self.if_exists, self.keys = alerts, on_alert, if_exists, keys
        self._log = None if keys is None else TrainerLog(self, keys)
        self.folder: Path | None = None  # of the newest timeline
        self.monitor: Monitor | None = None
        self._model: nn.Module | None = None
        self._hooks = ExitStack()
        self._start_step = 0
        self._state = "new"  # then "attached", "training", "ended"
        self._optimizer: Any = None  # of the current training, to recognise its losses
        self._deepspeed = False  # its engine wraps the model
        self._was_measured = False  # the last step that ended
        self._own_losses = 0  # forward passes in which the model computed a loss
        self._losses: list[torch.Tensor] = []  # that were differentiated
        self._warned = False
        self._items: torch.Tensor | int | None = None  # in the whole batch, if the model gets their number
        self._sums_ranks = False  # the losses of ranks are added, too

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before training has begun."""
        if self.monitor is None:
            raise RuntimeError(
                "InflectionCallback.timeline: nothing was measured yet. Call trainer.train(), which is measured;"
                " evaluate() and predict() are not"
            )
        return self.monitor.timeline

    def attach(self, model: nn.Module, start_step: int = 0) -> None:
        """Attach now instead of when training begins, so that errors come early.

        `start_step` is the number of optimizer steps before the training. ValueError as in `Monitor`.
        """
        if self._state in ("attached", "training"):
            raise ValueError("the callback is attached to a model already: close it first, or use another one")
        self._attach(model, start_step)
        self._state = "attached"

    def _attach(self, model: nn.Module, start_step: int, *, repeated: bool = False) -> None:
        self.close()
        self._warned = False
        if self.out is not None:
            self._choose_folder(self.out, start_step, repeated)
        if self.keys is not None:
            self._log = TrainerLog(self, self.keys)
        monitor = Monitor(
            model,
            self._reachable(model),
            self.folder,
            probe=self.probe,
            start_step=start_step,
            alerts=self.alerts,
            on_alert=self.on_alert,
            on_row=None if self._log is None else self._log.take,
        )
        self.monitor = monitor.__enter__()
        self._model = model
        _measured_by[model] = weakref.ref(self)
        self._start_step = start_step
        self._add_hooks()

    def _reachable(self, model: nn.Module) -> MonitorConfig:
        """The settings without the quantities that cannot be measured under DeepSpeed."""
        if not self._deepspeed:
            return self.config
        left = reachable(self.config.instances(), model, deepspeed=True)
        names = {one.name for one in left}
        every = self.config.every
        if isinstance(every, Mapping):
            every = {name: number for name, number in every.items() if name in names}
        return dataclasses.replace(self.config, quantities=tuple(left), every=every)

    def _choose_folder(self, out: str | os.PathLike, start_step: int, repeated: bool) -> None:
        out = self.folder if self.folder is not None and (repeated or start_step) else out
        how = "overwrite" if repeated else self.if_exists
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
        # Rank 0 keeps the timeline. Its errors are raised on all ranks when their monitors synchronise.
        if start_step == 0 and (rank is None or (rank == 0 and how != "error")):
            out = folder_for(out, how, also=(REFERENCE_NAME,))
        self.folder = Path(out)

    def close(self) -> None:
        """Detach. Safe to call twice."""
        self._hooks.close()
        if self.monitor is not None:
            self.monitor.close()
        if self._log is not None:
            self._log.close()
        if self._model is not None:
            _measured_by.pop(self._model, None)
        self._losses, self._model, self._optimizer = [], None, None
        if self._state != "new":
            self._state = "ended"

    def __deepcopy__(self, memo: dict) -> InflectionCallback:
        """Returns itself: the hooks of a copied model (an average of weights) refer to it, and do nothing there."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickled as an empty object while it is attached, so that the model can be saved with its hooks."""
        return super().__reduce_ex__(protocol) if self.monitor is None else (_NoCallback, ())

    def __enter__(self) -> InflectionCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, ValueError) and "did not return a loss" in str(error):
            logger.error(
                "nothing was measured, because the model returned no loss: give the data a column `labels`, or name it"
                " in TrainingArguments(label_names=...), or compute the loss with Trainer(compute_loss_func=...)"
            )

    def _add_hooks(self) -> None:
        """Add hooks to the model if the step that begins is measured."""
        self._hooks.close()
        self._losses, self._own_losses, self._items = [], 0, None
        if self.monitor is not None and self._model is not None and self.monitor.measuring:
            for handle in (
                self._model.register_forward_pre_hook(self._watch_items, with_kwargs=True),
                self._model.register_forward_hook(self._count_loss),
            ):
                self._hooks.callback(handle.remove)
            self._hooks.callback(listen_to_losses(self._keep_loss))

    def _trains(self, model: nn.Module) -> bool:
        return model is self._model and model.training and torch.is_grad_enabled()

    def _watch_items(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        items = kwargs.get("num_items_in_batch")
        if items is None or not self._trains(model):
            return None
        if self._items is None:
            self._items = items.as_subclass(_ObservedNumber) if isinstance(items, torch.Tensor) else items
        return args, kwargs | {"num_items_in_batch": self._items}

    def _count_loss(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._trains(model) and loss_of(output) is not None:
            self._own_losses += 1

    def _keep_loss(self, accelerator: Any, loss: torch.Tensor) -> None:
        known = accelerator._optimizers
        if self._optimizer is None or not known or any(one is self._optimizer for one in known):
            self._losses.append(loss)

    def _loss_and_scale(self) -> tuple[torch.Tensor | float, float]:
        """The mean loss over the batch of this step on this rank, and the multiple of it that was differentiated."""
        total = sum_of_means(self._losses)
        if total is None:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the loss of measured steps is NaN: no loss went through Accelerator.backward, so it is unknown"
                )
            return float("nan"), 1.0
        divides = self._items is None or getattr(self._items, "used", True)
        if divides or self._own_losses != len(self._losses):
            return total, 1.0  # parts of one mean; the monitor takes the mean over ranks
        ranks = self.monitor.data_ranks if self.monitor is not None and self._sums_ranks else 1
        scale = len(self._losses) * ranks
        return total / scale, float(scale)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attach, unless `attach` was called."""
        if args.n_gpu > 1:
            self.close()
            raise ValueError(
                "the Trainer would copy the model to several GPUs, where it cannot be measured: select one GPU with"
                " CUDA_VISIBLE_DEVICES, or start one process per GPU with torchrun"
            )
        self._sums_ranks = args.average_tokens_across_devices
        self._deepspeed = (
            bool(getattr(args, "deepspeed", None)) or "DeepSpeed" in type(kwargs.get("optimizer")).__name__
        )
        self._refuse_a_second(model, kwargs.get("optimizer"))
        if self._state == "attached":
            if self._start_step != state.global_step:
                self.close()
                raise ValueError(
                    f"the callback was attached at step {self._start_step}, and training begins at step"
                    f" {state.global_step}"
                )
        else:
            # A training that begins again without an end is repeated by the Trainer, with smaller batches.
            repeated = self._state == "training" and args.auto_find_batch_size
            self._attach(model, state.global_step, repeated=repeated)
        self._state, self._optimizer = "training", kwargs.get("optimizer")
        if self._log is not None:
            self._log.listen()

    def _refuse_a_second(self, model: nn.Module, optimizer: Any) -> None:
        """ValueError if another callback measures this training. One of an earlier training is closed."""
        known = _measured_by.get(model)
        other = None if known is None else known()
        if other is None or other is self:
            return
        if optimizer is not None and other._optimizer is optimizer:
            self.close()
            raise ValueError(
                "this model is measured by another InflectionCallback already: give the Trainer only one of them"
                " (report_to='inflection' adds one, too)"
            )
        other.close()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """End a step: after the backward passes, before the weights change."""
        self._was_measured = self.monitor.measuring
        if self._was_measured:
            loss, scale = self._loss_and_scale()
            self.monitor.step(loss, loss_scale=scale, scaler=getattr(optimizer, "scaler", None))
        else:
            self.monitor.step()
        self._add_hooks()

    def on_step_end(self, args, state, control, **kwargs):
        """Log the finished rows; all rows before a checkpoint, whose log_history is to be complete."""
        if self._log is None or self._state != "training":
            return
        if self._was_measured:
            self._log.measured(state.global_step - 1, state.epoch)
        if control.should_save:
            self.monitor.flush()
        self._log.write(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Log the remaining rows with the last row of the Trainer, while the reporters are still open."""
        if self._log is not None and self._state == "training" and "train_runtime" in (logs or ()):
            self._hooks.close()
            self.monitor.close()
            self._log.write(args, state, control)
            if state.is_world_process_zero:
                self._log.draw(self.monitor.timeline)

    def on_train_end(self, args, state, control, **kwargs):
        """Detach."""
        self.close()


class ReportedTo(InflectionCallback):
    """The callback of `report_to="inflection"`: with defaults, and its timeline beside the checkpoints."""

    def __init__(self) -> None:
        super().__init__(if_exists="overwrite")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attach, with the timeline in `output_dir`/inflection."""
        if self.out is None:
            self.out = Path(args.output_dir) / "inflection"
        super().on_train_begin(args, state, control, model=model, **kwargs)


class _NoCallback:
    """Stands for the callback in a model that was loaded from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _watch_items = _count_loss = _do_nothing


class _ObservedNumber(torch.Tensor):
    """A number that notes whether it was used in a computation."""

    used = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ != "__get__":  # reading its shape is no computation
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, cls):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
