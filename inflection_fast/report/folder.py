"""Reading a run folder: every file once, checked; missing ones are None.

Reports are written about finished and unfinished runs, so a missing stage is no error. A file that exists and cannot be
read is an error, because a report without it would look complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inflection_fast.decide import Plan
from inflection_fast.records import RUN, STAGE, RunRecord
from inflection_fast.records import StageRecord as Stage
from inflection_fast.timeline import Timeline

__all__ = ["Run", "Stage", "read"]

FIXED_STAGES = ("source", "measure", "tune")
BASELINE = "baseline-"
UNTRAINED = "source-on-target"  # no folder of its own: the source stage's model, scored on the target's test texts


@dataclass(frozen=True)
class Run:
    """The contents of a run folder."""

    folder: Path
    finished: tuple[str, ...]
    versions: dict[str, str]
    seed: int | None
    config: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    plan: Plan | None = None
    timeline: Timeline | None = None

    @property
    def source(self) -> Stage | None:
        """The stage on the source task."""
        return self.stages.get("source")

    @property
    def measure(self) -> Stage | None:
        """The stage that was measured while it trained."""
        return self.stages.get("measure")

    @property
    def tune(self) -> Stage | None:
        """The stage with LoRA in the planned layers."""
        return self.stages.get("tune")

    @property
    def fits(self) -> bool:
        """Whether there are a plan and a timeline with equal numbers of layers."""
        if self.plan is None or self.timeline is None:
            return False
        return len(self.plan.scores) == len(self.timeline.layers)

    @property
    def in_order(self) -> list[Stage]:
        """All stages with results; the injected model is the last."""
        return [stage for stage in (self.source, *self.baselines, self.tune) if stage is not None]

    @property
    def baselines(self) -> list[Stage]:
        """The baselines of the injected model: no training, shallow training, LoRA in other layers."""
        names = [UNTRAINED, "measure", *(name for name in self.stages if name.startswith(BASELINE))]
        return [self.stages[name] for name in names if name in self.stages]


def read(folder: str | Path, *, timeline: bool = True) -> Run:
    """Read a run folder, with or without its timeline. ValueError if it is none or a file cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder: there is no such folder.")
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} is not a run folder: it holds no run.json.")
    facts = RunRecord.load(folder / RUN)
    names = [name for name in FIXED_STAGES if (folder / name / STAGE).is_file()]
    names += sorted(path.parent.name for path in folder.glob(f"{BASELINE}*/{STAGE}"))
    plan, measured = folder / "plan.json", folder / "measure" / "timeline.arrows"
    config, settings = _settings(folder / "config.yaml")
    stages = {name: Stage.load(folder / name / STAGE) for name in names}
    if "source" in stages and stages["source"].on_target is not None:
        target = next((stage for name, stage in stages.items() if name != "source"), None)
        stages[UNTRAINED] = _untrained(stages["source"], target.majority if target else None)
    return Run(
        folder=folder,
        finished=facts.finished,
        versions=facts.versions,
        seed=facts.seed,
        config=config,
        settings=settings,
        stages=stages,
        plan=Plan.load(plan) if plan.is_file() else None,
        timeline=Timeline.load(measured) if timeline and measured.is_file() else None,
    )


def _settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The text of the configuration, and its settings."""
    if not path.is_file():
        return None, {}
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name; it holds a {type(content).__name__}.")
    return text, content


def _untrained(source: Stage, majority: float | None) -> Stage:
    """The source model on the target without further training."""
    return replace(
        source,
        stage=UNTRAINED,
        label="source model, not trained further",
        data=None,
        majority=majority,
        metrics=source.on_target,
        trainable_parameters=0,
        total_parameters=None,
        layers=(),
        steps=0,
        train_seconds=None,
        evaluate_seconds=None,
        on_target=None,
    )
