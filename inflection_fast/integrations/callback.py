"""The monitor as a callback of transformers.Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
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

    `alerts` and `on_alert` are those of `Monitor`. In distributed training every process needs the callback.

    Only the steps that are measured wait for the device; until then losses are kept as tensors.
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
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._start_step = 0
        self._losses: list[torch.Tensor] = []
        self._summed = False
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
        self._hook = model.register_forward_hook(self._keep_loss, with_kwargs=True)

    def close(self) -> None:
        """Detaches; safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.monitor is not None:
            self.monitor.close()
        self._losses.clear()

    def __deepcopy__(self, memo: dict) -> InflectionCallback:
        """Itself: a copy of the model (an average of its weights) carries the hook along, which then does nothing."""
        return self

    def __enter__(self) -> InflectionCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _keep_loss(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not (self.monitor.measuring and model.training and torch.is_grad_enabled()) or model is not self._model:
            return
        loss = loss_of(output)
        if loss is not None:
            self._losses.append(loss.detach())
            # A model that is told the number of items in the whole batch divides by it, so that its losses add up.
            self._summed = kwargs.get("num_items_in_batch") is not None

    def _step_loss(self) -> torch.Tensor | None:
        losses, self._losses = self._losses, []
        if not losses:
            return None
        total = torch.stack([loss.float().mean() for loss in losses]).sum()
        if not self._summed:
            return total / len(losses)
        # The monitor takes the mean over ranks. The Trainer multiplies the same way, for gradients that are averaged.
        return total * self.monitor.data_ranks if self._sums_ranks else total

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Attaches, unless `attach` did."""
        if args.n_gpu > 1:
            self.close()
            raise ValueError(
                "the Trainer would copy the model to several GPUs, where it cannot be measured:"
                " show it one GPU with CUDA_VISIBLE_DEVICES, or start one process per GPU with torchrun"
            )
        self._sums_ranks = args.average_tokens_across_devices
        if self.monitor is None:
            self.attach(model, state.global_step)
        elif self._start_step != state.global_step:
            self.close()
            raise ValueError(
                f"the callback was attached at step {self._start_step}, and training begins at step {state.global_step}"
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Ends a step where a plain loop would: after the backward passes, before the weights change."""
        if not self.monitor.measuring:
            self.monitor.step()
            return
        self.monitor.step(self._step_loss(), scaler=getattr(optimizer, "scaler", None))

    def on_train_end(self, args, state, control, **kwargs):
        """Detaches."""
        self.close()
