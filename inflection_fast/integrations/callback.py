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
from inflection_fast.integrations.losses import listen_to_losses
from inflection_fast.integrations.trainer_log import TrainerLog
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.micro_batch import loss_of
from inflection_fast.measure.probe import REFERENCE_NAME
from inflection_fast.measure.zero import reachable
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

    It attaches when training begins and detaches when it ends. The Trainer tells no callback when training raises, so
    the `with` block (or `close()` in a `finally`) is what leaves the model as it was in that case; where training ends
    well it adds nothing. A training resumed from a checkpoint continues the timeline in `out` at the checkpoint's step,
    and delta-CKA goes on being against the weights before training, whose features lie beside the timeline. Used for
    another training, also by `model_init`, the callback starts again: `monitor` and `timeline` are then those of the
    newest training. What an attempt measured that the Trainer repeats (`auto_find_batch_size`) is forgotten.

    The loss of a step is what was differentiated: the sum of what went through `Accelerator.backward`, as the Trainer
    logs it, whoever computed it (label smoothing, `compute_loss_func`, the trainers of TRL). A training step that
    differentiates in another way gives NaN and one warning.

    Norms are those of the gradient of the loss as the mean over the whole batch of a step, whatever the number of
    micro-batches and processes. The Trainer tells a model the number of items in that batch, leaves dividing by it to
    the model, and multiplies the losses of several processes by their number. A model that does not divide (sequence
    classification, mostly) is so trained with a multiple of that gradient; whether it does is seen on the way, and
    the multiple is taken out of norms and loss. A loss that the model did not compute is taken as it is.

    What goes wrong in the training is logged as warnings, and handed to `on_alert`::

        InflectionCallback(config, "runs/a", alerts=AlertConfig(max_logit=500.0), on_alert=send_to_whoever_is_on_duty)

    Every measured step is logged as a row of its own, under the `global_step` that it led to: about a dozen scalars
    ("inflection/entropy/min", ...; `inflection_fast.integrations.scalars`) in `trainer.state.log_history` and in
    whatever `report_to` names, and at the end one heat map per signal where TensorBoard, W&B, trackio or MLflow take
    images. A reporter that raises is told in one warning. With `TrainingArguments(report_to="inflection")`, which
    importing `inflection_fast.integrations` makes possible, the Trainer makes this callback by itself, with the
    timeline in `output_dir`/inflection.

    In distributed training every process needs the callback. Steps that are not measured find no hooks of it.

    Args:
        config: what and when.
        out: folder of the timeline; None: kept in memory only.
        probe: as for `Monitor`.
        alerts: what counts as going wrong; None: nothing.
        on_alert: called with the alerts of a measured step, where there are any, from a thread of the monitor's own.
        if_exists: what becomes of a timeline that is in `out` when a training begins at step 0: "error" refuses to
            begin, "overwrite" deletes it, "new" measures into `out`-2, `out`-3, ... (`folder` tells which).
        keys: patterns of scalars that are logged beside the dozen ("entropy/layer_07", "max_logit/*"); None: none are
            logged, and no heat map.
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
        self.config = config
        self.alerts = alerts
        self.on_alert = on_alert
        self.out = out
        self.probe = probe
        self.if_exists = if_exists
        self.keys = keys
        self._log = None if keys is None else TrainerLog(self, keys)
        self.folder: Path | None = None  # of the newest timeline
        self.monitor: Monitor | None = None
        self._model: nn.Module | None = None
        self._hooks = ExitStack()
        self._start_step = 0
        self._state = "new"  # then "attached", "training", "ended"
        self._optimizer: Any = None  # of the training under way, which tells its losses from those of others
        self._deepspeed = False  # its engine is wrapped around the model
        self._was_measured = False  # the step that was ended last
        self._own_losses = 0  # forward passes in which the model computed a loss
        self._losses: list[torch.Tensor] = []  # that were differentiated
        self._told = False
        self._items: torch.Tensor | int | None = None  # in the whole batch, if the model is told
        self._sums_ranks = False  # losses of ranks add up, too

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before training has begun."""
        if self.monitor is None:
            raise RuntimeError(
                "InflectionCallback.timeline before training began: nothing was measured. Steps of trainer.train() are,"
                " evaluate() and predict() are not: call train() first"
            )
        return self.monitor.timeline

    def attach(self, model: nn.Module, start_step: int = 0) -> None:
        """Attaches to the model now instead of when training begins, for errors before anything else happens.

        `start_step` is the number of updates that the training has behind it. ValueError as `Monitor` raises it.
        """
        if self._state in ("attached", "training"):
            raise ValueError("the callback is attached to a model already: close it first, or use another one")
        self._attach(model, start_step)
        self._state = "attached"

    def _attach(self, model: nn.Module, start_step: int, *, repeated: bool = False) -> None:
        self.close()
        self._told = False
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
        self._arm()

    def _reachable(self, model: nn.Module) -> MonitorConfig:
        """The settings without what DeepSpeed hides, also where its engine is wrapped around the model."""
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
        # Rank 0 keeps the timeline. What it refuses, all ranks refuse together, when their monitors agree.
        if start_step == 0 and (rank is None or (rank == 0 and how != "error")):
            out = folder_for(out, how, also=(REFERENCE_NAME,))
        self.folder = Path(out)

    def close(self) -> None:
        """Detaches; safe to call twice."""
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
        """Itself: a copy of the model (an average of its weights) carries the hook along, which then does nothing."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Nothing once it is attached: so the model can be saved as a whole, with its hooks."""
        return super().__reduce_ex__(protocol) if self.monitor is None else (_Nothing, ())

    def __enter__(self) -> InflectionCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, ValueError) and "did not return a loss" in str(error):
            logger.error(
                "nothing was measured, because the model returned no loss: give the data a column `labels`, or name it"
                " in TrainingArguments(label_names=...), or compute the loss with Trainer(compute_loss_func=...)"
            )

    def _arm(self) -> None:
        """Hooks on the model for the length of a step that is measured."""
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
            self._items = items.as_subclass(_Watched) if isinstance(items, torch.Tensor) else items
        return args, kwargs | {"num_items_in_batch": self._items}

    def _count_loss(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._trains(model) and loss_of(output) is not None:
            self._own_losses += 1

    def _keep_loss(self, accelerator: Any, loss: torch.Tensor) -> None:
        known = accelerator._optimizers
        if self._optimizer is None or not known or any(one is self._optimizer for one in known):
            self._losses.append(loss)

    def _loss_and_scale(self) -> tuple[torch.Tensor | float, float]:
        """What was differentiated in this step on this rank, as a mean over its batch, and the multiple of that."""
        if not self._losses:
            if not self._told:
                self._told = True
                logger.warning(
                    "the loss of measured steps is NaN: nothing went through Accelerator.backward, so what was"
                    " differentiated is not known"
                )
            return float("nan"), 1.0
        total = torch.stack([loss.float().mean() for loss in self._losses]).sum()
        divides = self._items is None or getattr(self._items, "used", True)
        if divides or self._own_losses != len(self._losses):
            return total, 1.0  # shares of one mean; the monitor takes the mean over ranks
        ranks = self.monitor.data_ranks if self.monitor is not None and self._sums_ranks else 1
        scale = len(self._losses) * ranks
        return total / scale, float(scale)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attaches, unless `attach` did."""
        if args.n_gpu > 1:
            self.close()
            raise ValueError(
                "the Trainer would copy the model to several GPUs, where it cannot be measured:"
                " show it one GPU with CUDA_VISIBLE_DEVICES, or start one process per GPU with torchrun"
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
            # A training that begins again without having ended is repeated by the Trainer, with smaller batches.
            repeated = self._state == "training" and args.auto_find_batch_size
            self._attach(model, state.global_step, repeated=repeated)
        self._state, self._optimizer = "training", kwargs.get("optimizer")
        if self._log is not None:
            self._log.listen()

    def _refuse_a_second(self, model: nn.Module, optimizer: Any) -> None:
        """ValueError where another callback measures this training; one that an earlier training has left ends."""
        known = _measured_by.get(model)
        other = None if known is None else known()
        if other is None or other is self:
            return
        if optimizer is not None and other._optimizer is optimizer:
            self.close()
            raise ValueError(
                "this model is measured by another InflectionCallback already: give the Trainer one of them only"
                " (report_to='inflection' adds one, too)"
            )
        other.close()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Ends a step where a plain loop would: after the backward passes, before the weights change."""
        self._was_measured = self.monitor.measuring
        if self._was_measured:
            loss, scale = self._loss_and_scale()
            self.monitor.step(loss, loss_scale=scale, scaler=getattr(optimizer, "scaler", None))
        else:
            self.monitor.step()
        self._arm()

    def on_step_end(self, args, state, control, **kwargs):
        """Logs what was finished since; before a checkpoint, whose log_history is that of its steps, all of it."""
        if self._log is None or self._state != "training":
            return
        if self._was_measured:
            self._log.measured(state.global_step - 1, state.epoch)
        if control.should_save:
            self.monitor.flush()
        self._log.write(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logs the rest with the row that the Trainer ends with, while the reporters are still open."""
        if self._log is not None and self._state == "training" and "train_runtime" in (logs or ()):
            self._hooks.close()
            self.monitor.close()
            self._log.write(args, state, control)
            if state.is_world_process_zero:
                self._log.draw(self.monitor.timeline)

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches."""
        self.close()


class ReportedTo(InflectionCallback):
    """What `report_to="inflection"` makes: the callback with its defaults, its timeline beside the checkpoints."""

    def __init__(self) -> None:
        super().__init__(if_exists="overwrite")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """As of InflectionCallback, into `output_dir`/inflection."""
        if self.out is None:
            self.out = Path(args.output_dir) / "inflection"
        super().on_train_begin(args, state, control, model=model, **kwargs)


class _Nothing:
    """What a callback is to a model that was read from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _watch_items = _count_loss = _do_nothing


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
