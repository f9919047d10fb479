"""The stages of a run. Each writes its folder, and its stage.json last, so that what is there is finished."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inflection_fast.decide import Plan, select
from inflection_fast.run.batches import Batches
from inflection_fast.run.config import RunConfig, TrainConfig
from inflection_fast.run.data import TextData, read, without
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.evaluation import in_words
from inflection_fast.run.folder import RunFolder, write_json
from inflection_fast.run.models import check_model, load_model, load_tokenizer, unfreeze
from inflection_fast.run.plans import baseline_plan
from inflection_fast.timeline import Timeline

__all__ = ["Stages"]

PROBE_BATCH = 16


@dataclass
class Stages:
    """One run: its settings, its folder, and what its stages share.

    Args:
        config: the settings
        say: takes one line about what is happening
        quiet: no progress bars
    """

    config: RunConfig
    say: Callable[[str], None]
    quiet: bool

    def __post_init__(self) -> None:
        config = self.config
        blocks = check_model(config.model, config.task, config.measure.monitor.blocks)
        counts = {"measure.unfreeze": config.measure.unfreeze, "tune.top": config.tune.top, "select.k": config.select.k}
        for name, count in counts.items():
            if count is not None and count > blocks:
                raise UserError(f"{name} is {count}, and {config.model.path} has {blocks} blocks")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a run is one process: start it without torchrun")
        self.folder = RunFolder(config)

    @cached_property
    def batches(self) -> Batches:
        """The model's tokenizer, set to the task."""
        return Batches(load_tokenizer(self.config.model), self.config.task, self.config.model.max_length)

    @cached_property
    def target(self) -> TextData:
        """The data set to adapt to."""
        return self._told("target", read(self.config.target, self.config.task))

    @cached_property
    def source_data(self) -> TextData:
        """The source data set, without the texts of the target."""
        data = read(self.config.source.data, self.config.task)
        if self.config.source.data.deduplicate:
            data = without(data, self.target, "also in the target")
        return self._told("source", data)

    def _told(self, name: str, data: TextData) -> TextData:
        dropped = ", ".join(f"{count} {why}" for why, count in data.dropped.items())
        self.say(
            f"{name} data: {len(data.train)} texts to train on, {len(data.test)} to test on, {len(data.probe)} to probe"
            + (f"; dropped {dropped}" if dropped else "")
        )
        return data

    def source(self) -> None:
        """Full fine-tuning on the source data set, where there is one."""
        if self.config.source is None or self._done("source"):
            return
        data, train = self.source_data, self.config.source.train
        folder = self.folder.stage("source")
        trained = self._train(
            folder,
            train,
            data,
            build=lambda: self._load(None, data.labels),
            restore=lambda path: self._load(path, data.labels),
        )
        record = self._record("source", "source, full fine-tuning", data, trained, folder, train, layers=None)
        if len(data.labels) == len(self.target.labels):
            # How far the source alone carries: what any training on the target has to improve upon.
            record["on_target"], _ = self._evaluate(trained.model, train, self.target, folder)
        self._finish("source", record)

    def measure(self) -> None:
        """The measured training: top blocks and head on the target."""
        if self._done("measure"):
            return
        from inflection_fast.blocks import find_blocks

        settings, data, folder = self.config.measure, self.target, self.folder.stage("measure")

        def build() -> Any:
            model = self._start()
            with user_errors(about=f"model {self.config.model.path}"):
                blocks = find_blocks(model, settings.monitor.blocks)
            unfreeze(model, blocks, settings.unfreeze, settings.head)
            return model

        def callbacks(model: Any, step: int) -> list[Any]:
            from inflection_fast.integrations import InflectionCallback

            probe = self.batches.probe(data.probe, PROBE_BATCH) if len(data.probe) else None
            if step == 0:  # killed before the first checkpoint: what was measured then is measured again
                (folder / "timeline.arrows").unlink(missing_ok=True)
            callback = closing.enter_context(InflectionCallback(settings.monitor, folder, probe=probe))
            with user_errors(about="measure.monitor"):
                callback.attach(model, step)
            attached.append(callback)
            return [callback]

        def save(model: Any, path: Path) -> None:
            # The monitor goes on in memory when the disk refuses a row; a plan must not rest on what is left of it.
            if len(Timeline.load(folder).steps) < len(attached[-1].timeline.steps):
                raise UserError(
                    f"{folder} does not hold all that was measured, because the disk refused it: make room and give the"
                    " same command again; it goes on from the last checkpoint"
                )
            self._save(model, path)

        attached: list[Any] = []
        with ExitStack() as closing:  # training that raises detaches nothing, and nothing compiled runs until then
            trained = self._train(
                folder,
                settings.train,
                data,
                build=build,
                restore=lambda path: self._load(path, data.labels),
                callbacks=callbacks,
                save=save,
            )
        what = "whole model" if settings.unfreeze is None else f"top {settings.unfreeze} blocks and head"
        label = f"shallow unfreezing ({what})" if settings.unfreeze is not None else "full fine-tuning, measured"
        record = self._record("measure", label, data, trained, folder, settings.train, layers=None)
        record["overhead"] = self._overhead()
        self._finish("measure", record)

    def plan(self) -> Plan:
        """Chooses layers from the timeline, unless plan.json is there."""
        path = self.folder.path / "plan.json"
        if path.is_file():
            with user_errors(about=str(path)):
                plan = Plan.load(path)
            if not self.folder.finished("plan"):
                self.say("plan: using the plan.json that is there")
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
        plan, settings = self.plan(), self.config.tune
        label = "LoRA on the planned layers"
        if not plan.layers and settings.when_empty == "top":
            plan = self._top_plan()
            label = f"LoRA on the {len(plan.layers)} layers with the top scores (the plan was empty)"
            self.say(f"tune: the plan is empty; taking the top scores instead: layers {list(plan.layers)}")
        if plan.layers:
            self._adapt("tune", label, plan)
            return
        self.say("tune: the plan is empty, so nothing is injected and the starting model is evaluated as it is")
        data, train = self.target, settings.train
        folder = self.folder.stage("tune")
        metrics, seconds = {}, None
        total = None
        # Without a source the head of a classifier is random, and its accuracy would mean nothing.
        if self.config.source is not None or self.config.task == "causal-lm":
            model = self._start()
            total = sum(p.numel() for p in model.parameters())
            metrics, seconds = self._evaluate(model, train, data, folder)
        self._finish(
            "tune",
            {
                **self._facts("tune", "nothing injected: the plan is empty", data),
                "metrics": metrics,
                "trainable_parameters": 0,
                "total_parameters": total,
                "layers": [],
                "steps": 0,
                "train_seconds": 0.0,
                "evaluate_seconds": seconds,
                "overhead": None,
            },
        )

    def baseline(self, name: str) -> None:
        """LoRA on other layers than the planned ones, trained in the same way."""
        stage = f"baseline-{name}"
        if self._done(stage):
            return
        record = json.loads((self.folder.stage("tune") / "stage.json").read_text(encoding="utf-8"))
        chosen = tuple(record["layers"])
        if not chosen and name != "all":
            self.say(f"{stage}: left out, because no layer was injected that it could be compared with")
            return
        timeline = Timeline.load(self.folder.stage("measure"))
        plan = baseline_plan(timeline, self.config.select, name, chosen, self.config.seed)
        if plan.layers == chosen:
            self.say(f"{stage}: left out, because its layers {list(chosen)} are the injected ones")
            return
        count = len(plan.layers)
        which = {"all": "all", "random": f"{count} random"}.get(name, f"the {name} {count}")
        self._adapt(stage, f"LoRA on {which} layers", plan)

    def report(self) -> Path:
        """The Markdown page and its pictures."""
        from inflection_fast import report

        path = report.write(self.folder.path)
        self.folder.finish("report")
        return path

    def _done(self, stage: str) -> bool:
        if self.folder.finished(stage) and (self.folder.stage(stage) / "stage.json").is_file():
            self.say(f"{stage}: finished already")
            return True
        self.say(f"{stage}: begins")
        return False

    def _load(self, folder: Path | None, labels: tuple[str, ...]) -> Any:
        import transformers

        transformers.set_seed(self.config.seed)  # a new head is the same in every stage
        return load_model(self.config.model, self.config.task, self.batches.tokenizer, labels=labels, folder=folder)

    def _start(self) -> Any:
        """The model before it has seen the target: the source stage's, or the pretrained one."""
        if self.config.source is None:
            return self._load(None, self.target.labels)
        folder = self.folder.stage("source") / "model"
        if not self.folder.finished("source"):
            raise UserError("the source stage is not finished: run `inflection-fast measure` with these settings first")
        if len(self.source_labels) != len(self.target.labels):
            self.say(
                f"the source has {len(self.source_labels)} labels and the target {len(self.target.labels)}:"
                " the head of the model begins anew"
            )
        return self._load(folder, self.target.labels)

    @cached_property
    def source_labels(self) -> list[str]:
        """The label names of the finished source stage."""
        record = json.loads((self.folder.stage("source") / "stage.json").read_text(encoding="utf-8"))
        return record["data"]["labels"]

    def _train(self, folder: Path, config: TrainConfig, data: TextData, **how: Any) -> Any:
        from inflection_fast.run.training import train

        return train(
            folder,
            config,
            self.batches,
            self.batches.items(data.train),
            seed=self.config.seed,
            quiet=self.quiet,
            **{"save": self._save, "result": folder / "model", **how},
        )

    def _save(self, model: Any, path: Path) -> None:
        model.save_pretrained(path)
        self.batches.tokenizer.save_pretrained(path)

    def _evaluate(self, model: Any, config: TrainConfig, data: TextData, folder: Path) -> tuple[dict, float]:
        from inflection_fast.run.training import evaluate

        items = self.batches.items(data.test, by_length=True)
        return evaluate(model, config, self.batches, items, folder, quiet=self.quiet)

    def _adapt(self, stage: str, label: str, plan: Plan) -> None:
        """Injects, trains and evaluates."""
        from inflection_fast.act import inject, restore_adapter

        settings, folder = self.config.tune, self.folder.stage(stage)
        lora = settings.lora

        def build() -> Any:
            import transformers

            model = self._start()
            transformers.set_seed(self.config.seed)
            with user_errors(about="the plan does not fit the model"):
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

        def restore(path: Path) -> Any:
            return restore_adapter(self._start(), path)

        trained = self._train(
            folder,
            settings.train,
            self.target,
            build=build,
            restore=restore,
            save=lambda model, path: model.save_pretrained(path),
            result=folder / "adapter",
        )
        layers = list(plan.layers)
        self._finish(stage, self._record(stage, label, self.target, trained, folder, settings.train, layers=layers))

    def _top_plan(self) -> Plan:
        timeline = Timeline.load(self.folder.stage("measure"))
        with user_errors(about="tune.top"):
            # Without a test of significance: it is what left the plan empty.
            settings = dataclasses.replace(self.config.select, method="top", k=self.config.tune.top, significance=None)
            return select(timeline, settings)

    def _overhead(self) -> dict[str, float] | None:
        pairs = self.config.measure.overhead_pairs
        if not pairs:
            return None
        from inflection_fast.measure import measure_overhead

        self.say(f"measure: timing {pairs} steps with and without measuring")
        model = self._load(self.folder.stage("measure") / "model", self.target.labels)
        from inflection_fast.blocks import find_blocks

        settings = self.config.measure
        unfreeze(model, find_blocks(model, settings.monitor.blocks), settings.unfreeze, settings.head)
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = min(settings.train.batch_size, len(self.target.train))
        items = self.batches.items(self.target.train.select(range(size)))
        batch = {key: value.to(device) for key, value in self.batches.collate(items).items()}
        found = measure_overhead(model.to(device), batch, settings.monitor, pairs=pairs)
        return {name: float(getattr(found, name)) for name in ("off_ms", "on_ms", "noise", "ratio")}

    def _facts(self, stage: str, label: str, data: TextData) -> dict[str, Any]:
        return {
            "stage": stage,
            "label": label,
            "task": self.config.task,
            "majority": data.majority,
            "data": data.summary(),
        }

    def _record(
        self,
        stage: str,
        label: str,
        data: TextData,
        trained: Any,
        folder: Path,
        config: TrainConfig,
        *,
        layers: list[int] | None,
    ) -> dict[str, Any]:
        metrics, seconds = self._evaluate(trained.model, config, data, folder)
        return {
            **self._facts(stage, label, data),
            "metrics": metrics,
            "trainable_parameters": trained.trainable,
            "total_parameters": trained.total,
            "layers": layers,
            "steps": trained.steps,
            "train_seconds": trained.seconds,
            "evaluate_seconds": seconds,
            "overhead": None,
        }

    def _finish(self, stage: str, record: dict[str, Any]) -> None:
        folder = self.folder.stage(stage)
        write_json(folder / "stage.json", record)
        self.folder.finish(stage)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.say(f"{stage}: {in_words(record['metrics'])}")
