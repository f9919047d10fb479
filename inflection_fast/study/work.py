"""The trainings of a study: sources, searches for learning rates, measured runs and cells, each computed once."""

from __future__ import annotations

import shutil
import time
import traceback
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from torch import nn

from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.run.errors import UserError, takes_nothing
from inflection_fast.run.folder import write_json
from inflection_fast.study.adaptation import Adaptation, NoArm
from inflection_fast.study.arms import Seen, arm_of
from inflection_fast.study.arms_interventions import prepare
from inflection_fast.study.cells import SHALLOW, Cell, Job, rates_of
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.record import failed, record
from inflection_fast.study.store import Busy, Store
from inflection_fast.study.texts import TASK, Texts, Tokens, texts_of
from inflection_fast.study.training_hooks import training_hooks
from inflection_fast.study.training_loop import Clock, Trained, evaluate, logits_of, saturation_of, train
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Work"]

DEATHS = 3  # workers that a cell may kill before it is given up


class Work:
    """The computations of one worker. Every result is looked up in the folder before it is computed."""

    def __init__(self, config: StudyConfig, store: Store):
        self.config = config
        self.store = store
        self._failed: dict[str, str] = {}  # shared work that failed, and is not tried again by this process
        self._texts = lru_cache(maxsize=16)(lambda name: texts_of(config, name, store))
        if config.train.threads:
            torch.set_num_threads(config.train.threads)

    def do(self, job: Job) -> bool:
        """Compute a job. Returns whether anything was missing. Busy where another process holds it, or what it needs.

        An error in a cell is recorded in the cell. A full disk and other errors that no cell causes are raised.
        """
        if job.cell is not None:
            return self._cell(job.cell)
        try:
            if job.what == "source":
                return self._new(f"{self._source_name(job.transfer, job.regime)}.json", self.source, job)
            if job.what in ("gradients", "probes"):
                from inflection_fast.study.gradients import gradients, probes

                name = f"{job.what}/{'-'.join(part for part in (job.transfer, job.regime, job.arm) if part)}.json"
                if job.what == "probes":
                    return self._new(name, lambda transfer, regime: probes(self, transfer, regime, name), job)
                return self._new(name, lambda transfer, regime: gradients(self, transfer, regime, job.arm, name), job)
            return self._tune(job)
        except Busy:
            raise
        except Exception as error:
            if takes_nothing(error):
                raise
            return False  # the cells that need it raise the same error, and record it

    def _new(self, name: str, compute: Any, job: Job) -> bool:
        if self.store.find(name) is not None or name in self._failed:
            return False
        compute(job.transfer, job.regime)
        return True

    # ---- what cells share ----------------------------------------------------------------------------------------

    def texts(self, transfer: str) -> Texts:
        """The texts of a transfer."""
        return self._once(f"data/{transfer}", lambda: self._texts(transfer))

    def _once(self, name: str, compute: Any) -> Any:
        """Shared work. It is not tried again after a UserError."""
        if name in self._failed:
            raise UserError(self._failed[name])
        try:
            return compute()
        except UserError as error:
            self._failed[name] = str(error)
            raise

    def _source_name(self, transfer: str, regime: str) -> str:
        return f"sources/{transfer}-{regime}"

    def source(self, transfer: str, regime: str) -> dict[str, Any]:
        """The facts of the source training of a transfer and regime; the weights are saved beside them."""
        name = self._source_name(transfer, regime)
        return self._once(name, lambda: self.store.get(f"{name}.json", lambda: self._train_source(transfer, regime)))

    def _train_source(self, transfer: str, regime: str) -> dict[str, Any]:
        texts, settings = self.texts(transfer), self.config.source
        tokens, test = texts.source_parts
        length = self.config.regimes[regime]
        per_epoch = max(1, len(tokens) // self.config.train.batch_size)
        steps = length.steps_of(len(tokens), self.config.train.batch_size)
        model = self._load(settings.seed, tuple(texts.facts["source"]["labels"]), None)
        trained = train(
            model, tokens, self.config.train, learning_rate=settings.learning_rate, seed=settings.seed, steps=steps
        )
        some = tokens.take(np.arange(min(400, len(tokens))))
        facts = {
            "transfer": transfer,
            "regime": regime,
            "texts": len(tokens),
            "epochs": round(steps / per_epoch, 3),
            **trained.facts(settings.learning_rate),
            "test": _without_bits(evaluate(model, test, self.config.train)),
            "saturation": {
                "test": saturation_of(logits_of(model, test, self.config.train)),
                "train": saturation_of(logits_of(model, some, self.config.train)),
            },
        }
        folder = self._source_folder(transfer, regime)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return facts

    def _load(self, seed: int, labels: tuple[str, ...], folder: Path | None) -> PreTrainedModel:
        from inflection_fast.run.models import load_model, load_tokenizer

        torch.manual_seed(seed)  # a new head is the same in every arm
        tokenizer = load_tokenizer(self.config.model)
        return load_model(self.config.model, TASK, tokenizer, labels=labels, folder=folder)

    def start(self, transfer: str, regime: str, seed: int) -> PreTrainedModel:
        """The model of a cell before training on the target."""
        self.source(transfer, regime)
        facts = self.texts(transfer).facts
        folder = self._source_folder(transfer, regime)
        labels = tuple(facts["target"]["labels"])
        model = self._load(seed, labels, folder)
        if self.config.transfers[transfer].head == "new" and len(labels) == len(facts["source"]["labels"]):
            torch.manual_seed(seed)
            for name, module in model.named_modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None and not name.startswith(f"{model.base_model_prefix}."):
                    reset()
        return model

    def adapted(self, transfer: str, regime: str, seed: int, adaptation: Adaptation) -> nn.Module:
        """That model, prepared for the training of a cell."""
        model = self.start(transfer, regime, seed)
        prepare(adaptation, model, lambda: self.texts(transfer).source_parts[0], self.config.train, seed)
        torch.manual_seed(seed)
        return adaptation.apply(model, self.config.train.steps)

    def measured(self, transfer: str, regime: str, seed: int) -> tuple[Timeline, dict[str, Any]]:
        """The timeline of the measured training, which is that of the arm `shallow`, and its cost."""
        name = f"measured/{transfer}-{regime}-{seed}"
        facts = self.store.get(f"{name}.json", lambda: self._measure(transfer, regime, seed, name))
        return Timeline.load(self.store.path(name)), facts

    def _measure(self, transfer: str, regime: str, seed: int, name: str) -> dict[str, Any]:
        rate, settings = self.rate(SHALLOW, regime), self.config.measured
        folder = self.store.path(name)
        shutil.rmtree(folder, ignore_errors=True)
        signals = ("attention", "activation_grad", "parameter_grad")
        config = MonitorConfig(every=settings.every, rows=settings.rows, signals=signals)

        def watched(model: nn.Module, tokens: Tokens) -> Trained:
            with Monitor(model, config, folder, alerts=None) as monitor:
                return train(
                    model,
                    tokens,
                    self.config.train,
                    learning_rate=rate,
                    seed=seed,
                    after_backward=lambda step: monitor.step(),
                )

        adaptation = arm_of(SHALLOW).choose(self.seen(transfer, regime, SHALLOW, seed))
        # The measured training is that of the arm itself: it has the same key and trains the same parameters.
        clock = Clock()
        with clock.running():
            self.training(transfer, regime, seed, adaptation, rate, "test", watched)
            if not folder.is_dir():  # the arm was computed before, without the monitor
                model = self.adapted(transfer, regime, seed, adaptation)
                watched(model, self.texts(transfer).split(seed).train)
        return {**clock.facts(), "steps": self.config.train.steps}

    # ---- learning rates --------------------------------------------------------------------------------------------

    def _tune(self, job: Job) -> bool:
        if job.rate is None:
            raise ValueError(f"{job.name} names no learning rate")
        name = self._tuning_name(job.arm, job.transfer, job.regime, job.rate)
        if self.store.find(name) is not None or self.store.find(f"rates/{job.arm}-{job.regime}.json") is not None:
            return False
        self._tried(job.arm, job.transfer, job.regime, job.rate)
        return True

    def _tuning_name(self, arm: str, transfer: str, regime: str, rate: float) -> str:
        return f"tuning/{arm}/{transfer}-{regime}-{rate:g}.json"

    def _tried(self, arm: str, transfer: str, regime: str, rate: float) -> dict[str, Any]:
        """Accuracy on the validation texts after a training at one learning rate."""

        def compute() -> dict[str, Any]:
            seed = self.config.tuning.seed
            seen = self.seen(transfer, regime, arm, seed)
            seen.learning_rate = rate
            adaptation = self.chosen(arm, seen)
            result = self.training(transfer, regime, seed, adaptation, rate, "validation")
            facts = {"learning_rate": rate, "layers": list(adaptation.layers), "training": result["key"]}
            return {**facts, **{k: result["metrics"][k] for k in ("accuracy", "loss", "n")}}

        return self.store.get(self._tuning_name(arm, transfer, regime, rate), compute)

    def rate(self, arm: str, regime: str) -> float:
        """The learning rate of an arm in a regime: that of the lowest mean validation loss over the searched cells.

        The loss and not the accuracy, because that of a few hundred texts moves by more than rates differ. In each
        regime apart, because a source that was trained for long stands only smaller steps.
        """

        def compute() -> dict[str, Any]:
            cells = [cell.split("/") for cell in self.config.tuning.cells]
            transfers = [transfer for transfer, of in cells if of == regime]
            rows = []
            for rate in rates_of(self.config, arm):
                tried = [self._tried(arm, transfer, regime, rate) for transfer in transfers]
                accuracy, loss = (float(np.mean([one[key] for one in tried])) for key in ("accuracy", "loss"))
                rows.append({"learning_rate": rate, "accuracy": accuracy, "loss": loss})
            best = min(rows, key=lambda row: row["loss"])
            return {
                "arm": arm,
                "regime": regime,
                "learning_rate": best["learning_rate"],
                "tried": rows,
                "transfers": transfers,
            }

        return self.store.get(f"rates/{arm}-{regime}.json", compute)["learning_rate"]

    # ---- cells -----------------------------------------------------------------------------------------------------

    def seen(self, transfer: str, regime: str, arm: str, seed: int, draw: int = 0) -> Seen:
        """What an arm may look at."""
        return Seen(
            self.config,
            lambda: self.start(transfer, regime, seed),
            self.texts(transfer).split(seed),
            lambda: self.measured(transfer, regime, seed),
            seed,
            draw,
            (crc32(transfer.encode()), crc32(regime.encode())),
        )

    def chosen(self, arm: str, seen: Seen) -> Adaptation:
        """What the arm chooses, with the time it takes. The random state is set by the cell's seed."""
        torch.manual_seed(seen.seed)
        with seen.clock.running():
            return arm_of(arm).choose(seen)

    def training(
        self,
        transfer: str,
        regime: str,
        seed: int,
        adaptation: Adaptation,
        rate: float,
        on: str,
        how: Any = None,
    ) -> dict[str, Any]:
        """A training with its evaluation on the `test` or `validation` texts. Arms with the same choice share it."""
        key = adaptation.key(transfer=transfer, regime=regime, seed=seed, rate=rate, on=on)

        def compute() -> dict[str, Any]:
            split, texts = self.texts(transfer).split(seed), self.texts(transfer)
            adapted = self.adapted(transfer, regime, seed, adaptation)
            parameters = adaptation.parameters(adapted)
            trained = (how or self._plain(adaptation, rate, seed))(adapted, split.train)
            clock = Clock()
            with clock.running():
                metrics = evaluate(adapted, getattr(split, on), self.config.train)
            result = {
                "key": key,
                "metrics": metrics,
                **trained.facts(rate),
                "adapter_parameters": parameters,
                "total": sum(p.numel() for p in adapted.parameters()),
                "evaluation": clock.facts(),
            }
            if on == "test":
                result["source_after"] = self._remembered(texts, regime, adapted)
            return result

        return self.store.get(f"trainings/{key}.json", compute)

    def _plain(self, adaptation: Adaptation, rate: float, seed: int) -> Any:
        def how(model: nn.Module, tokens: Tokens) -> Trained:
            more = training_hooks(adaptation, model, self.config.train.steps, seed, rate)
            return train(model, tokens, self.config.train, learning_rate=rate, seed=seed, **more)

        return how

    def _remembered(self, texts: Texts, regime: str, model: nn.Module) -> dict[str, Any]:
        """Accuracy on the source's test texts afterwards, by the source's own head where the target had a new one."""
        test = texts.source_parts[1]
        if self.config.transfers[texts.name].head == "keep":
            return {**_without_bits(evaluate(model, test, self.config.train)), "head": "the target's"}
        before = self.source_model(texts.name, regime)
        wrapped: Any = model
        inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
        prefix = before.base_model_prefix
        for name, child in before.named_children():
            if name != prefix:
                setattr(inner, name, child)
        inner.num_labels = inner.config.num_labels = before.num_labels
        return {**_without_bits(evaluate(model, test, self.config.train)), "head": "the source's"}

    def source_model(self, transfer: str, regime: str) -> PreTrainedModel:
        """The model as the source training left it, with the source's head."""
        labels = tuple(self.texts(transfer).facts["source"]["labels"])
        return self._load(0, labels, self._source_folder(transfer, regime))

    def _source_folder(self, transfer: str, regime: str) -> Path:
        return self.store.path(f"{self._source_name(transfer, regime)}/model")

    def _cell(self, cell: Cell) -> bool:
        name = f"cells/{cell.name}.json"
        if self.store.path(name).is_file():
            return False
        with self.store.claim(name):
            if self.store.path(name).is_file():
                return False
            deaths = self._begin(cell)
            begin = time.perf_counter()
            try:
                if deaths >= DEATHS:
                    raise NoArm(f"{deaths} workers died while computing this cell: too little memory, most often")
                found = self._compute(cell)
            except Busy:
                self._end(cell)
                raise
            except KeyboardInterrupt:
                self._end(cell)
                raise
            except Exception as error:
                if takes_nothing(error):
                    self._end(cell)
                    raise
                text = "" if isinstance(error, (UserError, NoArm)) else traceback.format_exc()
                found = failed(self.config, cell, error, text)
            found["run_info"]["created_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            found["run_info"]["total_time"] = round(time.perf_counter() - begin, 3)
            write_json(self.store.path(name), found)
            self._end(cell)
            return True

    def _compute(self, cell: Cell) -> dict[str, Any]:
        seen = self.seen(cell.transfer, cell.regime, cell.arm, cell.seed, cell.draw or 0)
        rate = self.rate(cell.arm, cell.regime)
        seen.learning_rate = rate
        adaptation = self.chosen(cell.arm, seen)
        if cell.arm == SHALLOW:
            self.measured(cell.transfer, cell.regime, cell.seed)
        result = self.training(cell.transfer, cell.regime, cell.seed, adaptation, rate, "test")
        source = self.source(cell.transfer, cell.regime)
        return record(self.config, cell, adaptation, result, seen, source, self.texts(cell.transfer).facts)

    # Every cell leaves a note when it begins. A note that is found later belongs to a worker that died.

    def _begin(self, cell: Cell) -> int:
        path = f"claims/{cell.name.replace('/', '__')}.begun.json"
        begun = (self.store.find(path) or {"times": 0})["times"]
        write_json(self.store.path(path), {"times": begun + 1})
        return begun

    def _end(self, cell: Cell) -> None:
        self.store.path(f"claims/{cell.name.replace('/', '__')}.begun.json").unlink(missing_ok=True)


def _without_bits(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "right"}
