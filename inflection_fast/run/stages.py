"""The stages of a run. Each writes a folder, and its stage.json last: a stage with this file is finished."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inflection_fast.decide import Plan, select
from inflection_fast.records import STAGE, Metrics, OverheadRecord, StageRecord
from inflection_fast.run import processes
from inflection_fast.run.batches import Batches
from inflection_fast.run.chats import template_of
from inflection_fast.run.config import DataConfig, RunConfig, TrainConfig
from inflection_fast.run.data import TextData, read, without
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.evaluation import described
from inflection_fast.run.folder import RunFolder
from inflection_fast.run.models import check_model, load_model, load_tokenizer, parameter_counts, unfreeze
from inflection_fast.run.plans import compared_plan
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from inflection_fast.run.training import Job, Trained

__all__ = ["Stages"]

PROBE_BATCH = 16


@dataclass
class Stages:
    """One run: its settings, its folder, and what its stages share.

    Args:
        config: the settings
        say: prints one line about the progress
        quiet: no progress bars
    """

    config: RunConfig
    say: Callable[[str], None]
    quiet: bool

    def __post_init__(self) -> None:
        if not processes.first():
            self.say, self.quiet = lambda line: None, True
        self.config = config = processes.join(self.config)
        self.sharded = config.parallel == "fsdp"  # the models that are trained and evaluated
        blocks = processes.in_turn(lambda: check_model(config.model, config.task, config.measure.monitor.blocks))
        top = config.tune.top if config.tune.when_empty == "top" else None
        counts = {"measure.unfreeze": config.measure.unfreeze, "tune.top": top, "select.k": config.select.k}
        for name, count in counts.items():
            if count is not None and count > blocks:
                raise UserError(f"{name} is {count}, and {config.model.path} has {blocks} blocks")
        self.folder = RunFolder(config)

    @cached_property
    def batches(self) -> Batches:
        """Makes the batches of all stages."""
        tokenizer = processes.in_turn(lambda: load_tokenizer(self.config.model))
        return Batches(tokenizer, self.config.task, self.config.model.max_length)

    @cached_property
    def target(self) -> TextData:
        """The data set to adapt to."""
        return self._announced("target", self._read(self.config.target))

    @cached_property
    def source_data(self) -> TextData:
        """The source data set, without the texts of the target."""
        if self.config.source is None:
            raise UserError("the settings name no source")
        data = self._read(self.config.source.data)
        if self.config.source.data.deduplicate:
            data = without(data, self.target, "also in the target")
        return self._announced("source", data)

    def _read(self, config: DataConfig) -> TextData:
        render = template_of(self.batches.tokenizer, self.config.model.path) if config.messages is not None else None
        return processes.in_turn(lambda: read(config, self.config.task, render))

    def _announced(self, name: str, data: TextData) -> TextData:
        dropped = ", ".join(f"{count} {why}" for why, count in data.dropped.items())
        self.say(
            f"{name} data: {len(data.train)} texts to train on, {len(data.test)} to test on, {len(data.probe)} to probe"
            + (f"; dropped {dropped}" if dropped else "")
        )
        return data

    def source(self) -> None:
        """Full fine-tuning on the source data set, if there is one."""
        if self.config.source is None or self._done("source"):
            return
        from inflection_fast.run.training import Job

        data, train = self.source_data, self.config.source.train
        folder = self.folder.stage("source")
        job = Job(
            build=lambda: self.load(None, data.labels),
            save=self._save,
            result=folder / "model",
            restore=lambda path: self.load(path, data.labels),
        )
        trained = self._train(folder, train, data, job)
        record = self._record("source", "source, full fine-tuning", data, trained, train)
        if len(data.labels) == len(self.target.labels):
            # The accuracy without training on the target, which any training on it has to exceed.
            on_target, _ = self._evaluate(trained.model, train, self.target, folder)
            record = dataclasses.replace(record, on_target=on_target)
        self._finish(record)

    def measure(self) -> None:
        """The measured training: top blocks and head on the target."""
        if self._done("measure"):
            return
        from inflection_fast.run.training import Job

        settings, data, folder = self.config.measure, self.target, self.folder.stage("measure")

        def callbacks(model: Any, step: int) -> list[Any]:
            from inflection_fast.integrations import InflectionCallback

            probe = self.batches.probe(data.probe, PROBE_BATCH) if len(data.probe) else None
            if step == 0 and processes.first():  # no checkpoint: measure all steps again
                (folder / "timeline.arrows").unlink(missing_ok=True)
            callback = closing.enter_context(InflectionCallback(settings.monitor, folder, probe=probe))
            if not self.sharded:  # a model is sharded when its training begins; the callback attaches later
                with user_errors(about="measure.monitor"):
                    callback.attach(model, step)
            attached.append(callback)
            return [callback]

        def save(model: Any, path: Path, weights: dict[str, Any] | None) -> None:
            # If the disk is full the monitor continues in memory. A plan must not depend on an incomplete timeline.
            if len(Timeline.load(folder).steps) < len(attached[-1].timeline.steps):
                raise UserError(
                    f"{folder} does not hold all that was measured, because the disk was full: free some space and give"
                    " the same command again; it continues from the last checkpoint"
                )
            self._save(model, path, weights)

        attached: list[Any] = []
        job = Job(
            build=lambda: self.shallow(self.start()),
            save=save,
            result=folder / "model",
            restore=lambda path: self.load(path, data.labels),
            callbacks=callbacks,
        )
        with ExitStack() as closing:  # detaches also if training raises
            trained = self._train(folder, settings.train, data, job)
        top = settings.unfreeze
        label = "full fine-tuning, measured" if top is None else f"shallow unfreezing (top {top} blocks and head)"
        record = self._record("measure", label, data, trained, settings.train)
        self._finish(dataclasses.replace(record, overhead=self._overhead()))

    def plan(self) -> Plan:
        """Choose layers from the timeline, or use plan.json if it exists."""
        return processes.alone(self._plan)

    def _plan(self) -> Plan:
        path = self.folder.path / "plan.json"
        if path.is_file():
            with user_errors(about=str(path)):
                plan = Plan.load(path)
            if not self.folder.finished("plan"):
                self.say("plan: using the existing plan.json")
                self.folder.finish("plan")
            return plan
        with user_errors(ValueError, FileNotFoundError, about="plan"):
            plan = select(Timeline.load(self.folder.stage("measure")), self.config.select)
        plan.save(path)
        self.folder.finish("plan")
        self.say(f"plan: layers {', '.join(map(str, plan.layers)) or 'none'}. {plan.summary}")
        return plan

    def tune(self) -> None:
        """LoRA on the planned layers."""
        if self._done("tune"):
            return
        from inflection_fast.run.training import Trained

        plan, settings = self.plan(), self.config.tune
        label = "LoRA on the planned layers"
        if not plan.layers and settings.when_empty == "top":
            plan = self._top_plan()
            label = f"LoRA on the {len(plan.layers)} layers with the top scores (the plan was empty)"
            self.say(f"tune: the plan is empty; taking the top scores instead: layers {list(plan.layers)}")
        if plan.layers:
            self._adapt("tune", label, plan)
            return
        self.say("tune: the plan is empty, so nothing is injected and the starting model is evaluated")
        # Without a source the head of a classifier is random, and its accuracy means nothing.
        model = self.start() if self.config.source is not None or self.config.task == "causal-lm" else None
        total = None if model is None else parameter_counts(model)[1]
        untrained = Trained(model=model, steps=0, seconds=0.0, trainable=0, total=total)
        label = "nothing injected: the plan is empty"
        record = self._record("tune", label, self.target, untrained, settings.train)
        self._finish(dataclasses.replace(record, layers=()))

    def baseline(self, name: str) -> None:
        """LoRA on other layers than the plan's, trained in the same way."""
        stage = f"baseline-{name}"
        if self._done(stage):
            return
        chosen = self.folder.record("tune").layers or ()
        if not chosen and name != "all":
            self.say(f"{stage}: left out, because no layer was injected to compare it with")
            return
        plan, draws, label = compared_plan(self.plan(), chosen, name, self.config.baselines, self.config.seed)
        if plan.layers == chosen:
            self.say(f"{stage}: left out, because its layers {list(chosen)} are the injected ones")
            return
        self._adapt(stage, label, plan, draws=draws if name == "random" else None)

    def report(self) -> Path:
        """The report of the run, also in the card of the adapter; returns the path of the page."""
        from inflection_fast import report

        processes.alone(self._write_card)
        path = processes.alone(lambda: report.write(self.folder.path))
        self.folder.finish("report")
        return path

    def _write_card(self) -> None:
        from inflection_fast.act.card import write_section
        from inflection_fast.report import folder, verdict

        run, adapter = folder.read(self.folder.path, timeline=False), self.folder.stage("tune") / "adapter"
        if run.tune is not None and (adapter / Plan.FILE).is_file():
            unit = "nats" if run.tune.accuracy is None else "points of accuracy, one standard error"
            compared = [verdict.compare(run.tune, baseline) for baseline in run.baselines]
            lines = [f"{each.stage.label}: {each.words} ({unit})" for each in compared]
            write_section(adapter, Plan.from_pretrained(adapter), lines)

    def done(self, stage: str) -> bool:
        """Whether a stage is finished and its results exist."""
        return processes.alone(lambda: self.folder.finished(stage) and (self.folder.stage(stage) / STAGE).is_file())

    def _done(self, stage: str) -> bool:
        done = self.done(stage)
        self.say(f"{stage}: {'finished already' if done else 'begins'}")
        return done

    def load(self, folder: Path | None, labels: tuple[str, ...]) -> Any:
        """The model for the task, from the folder of an earlier stage or as it was pretrained."""
        from transformers import set_seed

        def load() -> Any:
            set_seed(self.config.seed)  # a new head is the same in every stage
            return load_model(self.config.model, self.config.task, self.batches.tokenizer, labels=labels, folder=folder)

        return processes.in_turn(load)

    def start(self) -> Any:
        """The model before training on the target: that of the source stage, or the pretrained one."""
        if self.config.source is None:
            return self.load(None, self.target.labels)
        if not self.folder.finished("source"):
            raise UserError("the source stage is not finished: run `inflection-fast measure` with these settings first")
        data = self.folder.record("source").data
        known = data.labels if data is not None else ()
        if len(known) != len(self.target.labels):
            counts = f"the source has {len(known)} labels and the target {len(self.target.labels)}"
            self.say(f"{counts}: the model gets a new head")
        return self.load(self.folder.stage("source") / "model", self.target.labels)

    def shallow(self, model: Any) -> Any:
        """The model with its top blocks and head trainable, for the measured training."""
        from inflection_fast.blocks import find_blocks

        settings = self.config.measure
        with user_errors(about=f"model {self.config.model.path}"):
            blocks = find_blocks(model, settings.monitor.blocks)
        unfreeze(model, blocks, settings.unfreeze, settings.head)
        return model

    def injected(self, model: Any, plan: Plan) -> Any:
        """The model with LoRA on the layers of a plan."""
        from transformers import set_seed

        from inflection_fast.act import inject

        lora = self.config.tune.lora
        set_seed(self.config.seed)
        return inject(
            model,
            plan,
            lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules and list(lora.target_modules),
            modules_to_save=lora.modules_to_save and list(lora.modules_to_save),
            task_type="CAUSAL_LM" if self.config.task == "causal-lm" else "SEQ_CLS",
        )

    def _train(self, folder: Path, config: TrainConfig, data: TextData, job: Job) -> Trained:
        from inflection_fast.run.training import train

        items = self.batches.items(data.train)
        return train(
            folder, config, self.batches, items, job, seed=self.config.seed, quiet=self.quiet, sharded=self.sharded
        )

    def _save(self, model: Any, path: Path, weights: dict[str, Any] | None) -> None:
        model.save_pretrained(path, state_dict=weights)
        self.batches.tokenizer.save_pretrained(path)

    def _evaluate(self, model: Any, config: TrainConfig, data: TextData, folder: Path) -> tuple[Metrics, float]:
        from inflection_fast.run.training import evaluate

        items = self.batches.items(data.test, by_length=True)
        return evaluate(model, config, self.batches, items, folder, quiet=self.quiet, sharded=self.sharded)

    def _adapt(self, stage: str, label: str, plan: Plan, *, draws: int | None = None) -> None:
        """Inject, train and evaluate."""
        from inflection_fast.act import restore_adapter
        from inflection_fast.run.training import Job

        def build() -> Any:
            model = self.start()
            with user_errors(about="the plan does not fit the model"):
                return self.injected(model, plan)

        folder, train = self.folder.stage(stage), self.config.tune.train
        job = Job(
            build=build,
            save=lambda model, path, weights: model.save_pretrained(path, state_dict=weights),
            result=folder / "adapter",
            restore=lambda path: restore_adapter(self.start(), path),
        )
        trained = self._train(folder, train, self.target, job)
        record = self._record(stage, label, self.target, trained, train)
        self._finish(dataclasses.replace(record, layers=plan.layers, draws=draws))

    def _top_plan(self) -> Plan:
        timeline = Timeline.load(self.folder.stage("measure"))
        with user_errors(about="tune.top"):
            # Without the test of significance, which can leave a plan empty.
            settings = dataclasses.replace(self.config.select, method="top", k=self.config.tune.top, significance=None)
            return select(timeline, settings)

    def _overhead(self) -> OverheadRecord | None:
        pairs = self.config.measure.overhead_pairs
        if not pairs or self.sharded:
            return None
        import torch

        from inflection_fast.measure import measure_overhead

        self.say(f"measure: timing {pairs} steps with and without measuring")
        settings = self.config.measure
        model = self.shallow(self.load(self.folder.stage("measure") / "model", self.target.labels))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = {key: value.to(device) for key, value in self.few(settings.train.batch_size).items()}
        found = measure_overhead(model.to(device), batch, settings.monitor, pairs=pairs)
        return OverheadRecord(float(found.off_ms), float(found.on_ms), float(found.noise), float(found.ratio))

    def few(self, count: int) -> dict[str, Any]:
        """A batch of the first `count` training texts of the target."""
        rows = self.target.train.select(range(min(count, len(self.target.train))))
        return self.batches.collate(self.batches.items(rows)[:count])

    def _record(self, stage: str, label: str, data: TextData, trained: Trained, config: TrainConfig) -> StageRecord:
        metrics = seconds = None
        if trained.model is not None:
            metrics, seconds = self._evaluate(trained.model, config, data, self.folder.stage(stage))
        return StageRecord(
            stage=stage,
            label=label,
            task=self.config.task,
            data=data.record(),
            majority=data.majority,
            metrics=metrics,
            trainable_parameters=trained.trainable,
            total_parameters=trained.total,
            layers=None,
            steps=trained.steps,
            train_seconds=trained.seconds,
            evaluate_seconds=seconds,
        )

    def _finish(self, record: StageRecord) -> None:
        def keep() -> None:
            folder = self.folder.stage(record.stage)
            record.save(folder / STAGE)
            self.folder.finish(record.stage)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

        processes.alone(keep)
        self.say(f"{record.stage}: {described(record.metrics)}")
