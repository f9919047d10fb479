"""Diagnose, then inject, in one training: measure a shallow unfreezing, plan, inject adapters, train these."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from inflection_fast.act import inject
from inflection_fast.act.unfreeze import unfreeze_top
from inflection_fast.blocks import find_blocks
from inflection_fast.decide import Plan, SelectConfig, select
from inflection_fast.integrations.callback import InflectionCallback
from inflection_fast.measure import MonitorConfig

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainOutput

__all__ = ["DiagnoseThenInject"]

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"


class DiagnoseThenInject:
    """Two phases of one training by `transformers.Trainer`, or one of TRL's that is built on it.

    ```python
    trainer = Trainer(model, args, train_dataset=data)
    run = DiagnoseThenInject(trainer, steps=100, r=8, out="runs/a")
    run.train()
    trainer.save_model("adapter")
    ```

    In the first phase, `steps` optimizer steps train the last `top` blocks and the head, and are measured. Then layers
    are chosen, the weights are restored, so that the adapter fits the published model, and adapters are injected into
    the planned blocks. In the second phase the remaining steps train the adapters, on the following data. Each phase
    has its own optimizer, and its own learning rate schedule with warm-up. `global_step`, `epoch` and `log_history`
    continue.

    `train(resume_from_checkpoint=...)` resumes in either phase, with a new Trainer of the same model: a checkpoint of
    the second phase holds the adapter and its plan. Between the phases a checkpoint is written; it is deleted at the
    end if the Trainer saves none.

    Args:
        trainer: not trained yet, with a model that is not wrapped by peft.
        steps: optimizer steps of the first phase.
        top: number of last blocks that are trained in the first phase.
        head: names of modules trained with them; None: what the model registers after its last block.
        config: what is measured, and when.
        select: how layers are chosen.
        out: folder of the timeline and of plan.json; None: in memory only. Then a first phase that is resumed does not
            have the earlier measurements.
        probe: as for `Monitor`.
        r: rank of the adapters; None: 4.
        options: other keyword arguments of `inject`, such as `{"config": peft.LoraConfig(use_dora=True)}`.

    Raises:
        ValueError: an optimizer was given to the Trainer, it shards its model, or the model carries adapters already.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        steps: int,
        top: int = 2,
        head: Sequence[str] | None = None,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  frozen
        select: SelectConfig = SelectConfig(),  # noqa: B008  frozen
        out: str | os.PathLike | None = None,
        probe: list[dict[str, torch.Tensor]] | None = None,
        r: int | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected the number of measured steps, at least 1, got {steps!r}")
        if getattr(trainer, "optimizer", None) is not None:
            raise ValueError(
                "trainer: it has an optimizer, with the parameters of one phase only; give it optimizer_cls_and_kwargs"
                " instead"
            )
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "trainer: its model is sharded (FSDP, DeepSpeed), and adapters are injected before sharding; measure in"
                " one training, and inject in a second one"
            )
        if hasattr(trainer.model, "peft_config"):
            raise ValueError("trainer: its model carries adapters already; give it the model without them")
        self.trainer: Any = trainer  # parts of it are replaced
        self.steps, self.top, self.head = steps, top, head
        self.config, self.select = config, select
        self.out = None if out is None else Path(out)
        self.probe = probe
        self.options = {"r": r, **(options or {})}
        self.plan: Plan | None = None
        self.callback: InflectionCallback | None = None  # of the first phase, if this process has run it

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run both phases, or what remains of them. ValueError if no layer was chosen; the model is then unchanged."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None and (checkpoint / Plan.FILE).is_file():
            self.plan = Plan.from_pretrained(checkpoint)
            self._adapt(self.plan)
        else:
            self.plan = self._diagnose(checkpoint)
            self._adapt(self.plan)
            checkpoint = self._hand_over()
        with self._schedule_of(lambda steps: steps - self.steps):
            result = self.trainer.train(resume_from_checkpoint=str(checkpoint))
        if self.trainer.args.save_strategy == "no" and self.trainer.args.should_save:
            shutil.rmtree(checkpoint)
        return result

    def _checkpoint(self, asked: str | bool | None) -> Path | None:
        if asked is None or asked is False:
            return None
        found = get_last_checkpoint(self.trainer.args.output_dir) if asked is True else asked
        if found is None:
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint in {self.trainer.args.output_dir}")
        return Path(found)

    def _diagnose(self, checkpoint: Path | None) -> Plan:
        trainer, model = self.trainer, self.trainer.model
        trained_before = {name: bool(parameter.requires_grad) for name, parameter in model.named_parameters()}
        names = unfreeze_top(model, find_blocks(model, self.config.blocks), self.top, self.head)
        parameters = dict(model.named_parameters())
        weights = {name: parameters[name].detach().to("cpu", copy=True) for name in names}
        callback = self.callback = InflectionCallback(self.config, self.out, probe=self.probe)
        stop = _StopAt(self.steps)
        trainer.add_callback(callback)
        trainer.add_callback(stop)
        try:
            with callback, self._schedule_of(lambda steps: self.steps):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            plan = self._shared(lambda: select(callback.timeline, self.select))
            if not plan.layers:
                raise ValueError(
                    f"no layer was chosen after {self.steps} steps. {plan.summary} Measure more steps, or take the"
                    " highest scores with select=SelectConfig(method='top', k=4, significance=None)"
                )
        finally:
            trainer.remove_callback(callback)
            trainer.remove_callback(stop)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(trained_before[name])
                    parameter.grad = None
                    if name in weights:
                        parameter.copy_(weights[name])
        if callback.folder is not None and trainer.args.should_save:
            plan.save(callback.folder / "plan.json")
        logger.info("%s", plan.summary)
        return plan

    @staticmethod
    def _shared(make: Callable[[], Plan]) -> Plan:
        """The plan of rank 0, which keeps the timeline, on all ranks."""
        if not dist.is_initialized():
            return make()
        result: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                result = [make()]
            except ValueError as error:
                result = [error]
        dist.broadcast_object_list(result)
        if isinstance(result[0], ValueError):
            raise result[0]
        return result[0]

    def _adapt(self, plan: Plan) -> None:
        """Inject the adapters, and drop the optimizer of the first phase."""
        trainer = self.trainer
        adapted: nn.Module = inject(trainer.model, plan, **self.options)
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = adapted
        trainer.optimizer = trainer.lr_scheduler = None

    def _hand_over(self) -> Path:
        """Write the checkpoint from which the second phase begins."""
        trainer = self.trainer
        state, folder = trainer.state, Path(trainer.args.output_dir) / f"checkpoint-{self.steps}"
        # The best model of the first phase cannot be loaded into the second.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if trainer.args.should_save and folder.exists():  # of the first phase, at the same step
            shutil.rmtree(folder)
        if dist.is_initialized():
            dist.barrier()
        trainer.save_model(str(folder), _internal_call=True)
        trainer._save_rng_state(str(folder))
        if trainer.args.should_save:
            state.save_to_json(str(folder / STATE))
        if dist.is_initialized():
            dist.barrier()
        return folder

    @contextmanager
    def _schedule_of(self, steps_of: Callable[[int], int]) -> Iterator[None]:
        """Let the Trainer's schedule cover `steps_of(steps of the whole training)` steps."""
        trainer = self.trainer
        original = trainer.create_scheduler

        def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
            return original(num_training_steps=max(1, steps_of(num_training_steps)), optimizer=optimizer)

        trainer.create_scheduler = create_scheduler
        try:
            yield
        finally:
            del trainer.create_scheduler  # the attribute of the instance


class _StopAt(TrainerCallback):
    """Stops a training after a number of steps."""

    def __init__(self, step: int):
        self._step = step

    def on_train_begin(self, args, state, control, **kwargs):
        """ValueError if no steps would remain for the second phase."""
        if state.max_steps <= self._step:
            raise ValueError(
                f"steps: expected fewer than the {state.max_steps} steps of the training, so that some remain for the"
                f" adapters, got {self._step}"
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Stop after the last step, without an evaluation or a checkpoint."""
        if state.global_step >= self._step:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False
        return control
