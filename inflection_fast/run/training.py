"""One training by transformers.Trainer, which continues after it was killed at any moment."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from inflection_fast.atomic import write_json
from inflection_fast.records import Metrics
from inflection_fast.run import processes
from inflection_fast.run.batches import Batches
from inflection_fast.run.config import TrainConfig
from inflection_fast.run.evaluation import class_logits, classification_metrics, language_metrics, token_losses
from inflection_fast.run.models import parameter_counts
from inflection_fast.run.sharding import ShardedTrainer, accelerate_shards, shard, sharding_arguments, whole_weights

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["Job", "Trained", "check_arguments", "evaluate", "last_checkpoint", "train"]

CHECKPOINTS = "checkpoints"
CLOCK = "clock.json"
TRAINING = "training.json"
# Transformers renamed the argument during version 5.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
ACTIVATION_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


@dataclass(frozen=True)
class Trained:
    """The result of a finished training."""

    model: Any
    steps: int
    seconds: float
    trainable: int
    total: int | None


@dataclass(frozen=True)
class Job:
    """The model of one training: where it comes from and where it goes.

    Args:
        build: returns the model before training
        save: writes the trained model to a folder; takes its whole weights if it is sharded, else None
        result: final path of that folder
        restore: reads the model from `result`, if training had finished
        callbacks: returns callbacks for the model and the step at which training begins, 0 or that of a checkpoint
    """

    build: Callable[[], Any]
    save: Callable[[Any, Path, dict[str, torch.Tensor] | None], None]
    result: Path
    restore: Callable[[Path], Any]
    callbacks: Callable[[Any, int], Sequence[TrainerCallback]] = lambda model, step: ()


class _OneDevice(TrainingArguments):
    """Arguments that use one GPU if there are several: the replicas of DataParallel cannot be measured."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


@dataclass
class _Clock(TrainerCallback):
    """Counts the seconds of a training without its interruptions, in a file in each checkpoint."""

    before: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            # The model is saved right after this, and a Trainer that resumes at its last step takes one more step.
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        processes.wait()  # each process writes a file of its own into the checkpoint
        if processes.first():
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / CLOCK, {"seconds": self.seconds})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. The clock is written last, so a checkpoint without it is incomplete."""
    found = {int(path.parent.name.rsplit("-", 1)[1]): path.parent for path in folder.glob(f"checkpoint-*/{CLOCK}")}
    return found[max(found)] if found else None


def train(
    folder: Path,
    config: TrainConfig,
    batches: Batches,
    items: Sequence[Any],
    job: Job,
    *,
    seed: int,
    quiet: bool,
    sharded: bool = False,
) -> Trained:
    """Train a model in `folder`, or continue a call that was stopped; `sharded`: with FSDP2."""
    record = folder / TRAINING
    result = job.result
    checkpoints = folder / CHECKPOINTS

    def found() -> tuple[dict[str, Any] | None, Path | None]:
        """The facts of an earlier call that has finished, or else its last checkpoint."""
        if result.is_dir() and record.is_file():
            return json.loads(record.read_text(encoding="utf-8")), None
        return None, last_checkpoint(checkpoints)

    facts, checkpoint = processes.alone(found)
    if facts is not None:
        return Trained(model=job.restore(result), **facts)
    model = job.build()
    trainable, total = parameter_counts(model)
    clock = _Clock()
    if checkpoint is not None:
        clock.before = json.loads((checkpoint / CLOCK).read_text(encoding="utf-8"))["seconds"]
    with accelerate_shards(sharded):
        trainer = _trainer(model, config, batches, checkpoints, seed=seed, quiet=quiet, items=items, sharded=sharded)
    step = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    for callback in [*job.callbacks(model, step), clock]:
        trainer.add_callback(callback)
    with accelerate_shards(sharded):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = whole_weights(model) if sharded else None
    facts = {"steps": trainer.state.global_step, "seconds": round(clock.seconds, 3)}
    facts |= {"trainable": trainable, "total": total}

    def keep() -> None:
        write_json(folder / "log.json", trainer.state.log_history)
        partial = result.with_name(f"{result.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        job.save(model, partial, weights)
        write_json(record, facts)
        shutil.rmtree(result, ignore_errors=True)
        partial.rename(result)
        shutil.rmtree(checkpoints, ignore_errors=True)

    processes.alone(keep)
    return Trained(model=model, **facts)


def evaluate(
    model: Any,
    config: TrainConfig,
    batches: Batches,
    items: Sequence[Any],
    folder: Path,
    *,
    quiet: bool,
    sharded: bool = False,
) -> tuple[Metrics, float]:
    """Metrics on the test items, and the duration in seconds."""
    if sharded:
        shard(model)
    with accelerate_shards(False):  # Accelerate shards a model only together with its optimizer
        trainer = _trainer(model, config, batches, folder / CHECKPOINTS, seed=0, quiet=quiet)
        begin = time.perf_counter()
        output = trainer.predict(cast("Dataset[Any]", items))
    metrics = language_metrics if batches.task == "causal-lm" else classification_metrics
    found = metrics(np.asarray(output.predictions), np.asarray(output.label_ids))
    return found, round(time.perf_counter() - begin, 3)


def check_arguments(config: TrainConfig) -> None:
    """ValueError if this machine cannot train with these settings, as in a precision that it lacks."""
    _arguments(config, Path("unused"), seed=0, quiet=True)


def _arguments(config: TrainConfig, checkpoints: Path, *, seed: int, quiet: bool, **more: Any) -> TrainingArguments:
    if config.activation_checkpointing:
        more[ACTIVATION_CHECKPOINTING] = True
    return _OneDevice(
        output_dir=str(checkpoints),
        max_steps=config.steps if config.steps is not None else -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // processes.count(),
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_share,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,  # the older one is complete while the newest is being written
        logging_strategy="steps",
        logging_steps=config.log_every,
        use_cpu=processes.count() > 1 and not torch.accelerator.is_available(),  # Accelerate does not detect this
        report_to="none",
        disable_tqdm=quiet,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # batches are made from text, which is not an argument of the model
        label_names=["labels"],
        **more,
    )


def _trainer(
    model: Any,
    config: TrainConfig,
    batches: Batches,
    checkpoints: Path,
    *,
    seed: int,
    quiet: bool,
    items: Sequence[Any] | None = None,
    sharded: bool = False,
) -> Trainer:
    sharding = sharding_arguments(model) if sharded else {}
    trainer = (ShardedTrainer if sharded else Trainer)(
        model=model,
        args=_arguments(config, checkpoints, seed=seed, quiet=quiet, **sharding),
        data_collator=batches.collate,
        train_dataset=items,
        preprocess_logits_for_metrics=token_losses if batches.task == "causal-lm" else class_logits,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
