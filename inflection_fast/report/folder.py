"""Reading a run folder: every file of it once, checked, with what is missing kept as None.

A report is written about finished and about half-finished runs alike, so an absent stage is a value and not an error. A
file that is there and cannot be understood is an error, because a report without it would look complete.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inflection_fast.decide import Plan
from inflection_fast.timeline import Timeline

__all__ = ["Run", "Stage", "read"]

FORMAT = 1
FIXED_STAGES = ("source", "measure", "tune")
BASELINE = "baseline-"
UNTRAINED = "source-on-target"  # no folder of its own: the source stage's model, scored on the target's test texts


@dataclass(frozen=True)
class Stage:
    """One `stage.json`. None stands for what the file does not say."""

    name: str
    label: str
    accuracy: float | None
    loss: float | None
    perplexity: float | None
    n: int | None
    majority: float | None
    trainable: int | None
    total: int | None
    layers: tuple[int, ...] | None
    steps: int | None
    train_seconds: float | None
    evaluate_seconds: float | None
    overhead: dict[str, float] | None
    data: dict[str, Any] | None
    right: str | None = None  # a "1" per example that was right, else "0"

    @property
    def standard_error(self) -> float | None:
        """Binomial standard error of the accuracy."""
        if self.accuracy is None or not self.n:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


@dataclass(frozen=True)
class Run:
    """A run folder as it was found."""

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
        """Whether there are a plan and a timeline, of equally many layers."""
        if self.plan is None or self.timeline is None:
            return False
        return len(self.plan.scores) == len(self.timeline.layers)

    @property
    def in_order(self) -> list[Stage]:
        """Every stage with results, the injected model last, beside what it is compared with."""
        return [stage for stage in (self.source, *self.baselines, self.tune) if stage is not None]

    @property
    def baselines(self) -> list[Stage]:
        """Everything the injected model is to be compared with: no training, shallow training, LoRA in other layers."""
        names = [UNTRAINED, "measure", *(name for name in self.stages if name.startswith(BASELINE))]
        return [self.stages[name] for name in names if name in self.stages]


def read(folder: str | Path) -> Run:
    """Reads a run folder; ValueError if it is not one or if a file in it cannot be understood."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run folder: there is no such folder.")
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} is not a run folder: it holds no run.json.")
    facts = _json(folder / "run.json")
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / 'run.json'} has format {facts.get('format')!r}; this version reads format {FORMAT}."
        )
    names = [name for name in FIXED_STAGES if (folder / name / "stage.json").is_file()]
    names += sorted(path.parent.name for path in folder.glob(f"{BASELINE}*/stage.json"))
    plan, timeline = folder / "plan.json", folder / "measure" / "timeline.arrows"
    config, settings = _settings(folder / "config.yaml")
    stages = {name: _stage(_json(folder / name / "stage.json"), folder / name / "stage.json", name) for name in names}
    if "source" in stages:
        target = next((stage for name, stage in stages.items() if name != "source"), None)
        stages |= _untrained(folder / "source" / "stage.json", target.majority if target else None)
    return Run(
        folder=folder,
        finished=tuple(facts.get("finished") or ()),
        versions=dict(facts.get("versions") or {}),
        seed=facts.get("seed"),
        config=config,
        settings=settings,
        stages=stages,
        plan=Plan.load(plan) if plan.is_file() else None,
        timeline=Timeline.load(timeline) if timeline.is_file() else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}.")
    return content


def _settings(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The configuration as it is written, and what it says."""
    if not path.is_file():
        return None, {}
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name; it holds a {type(content).__name__}.")
    return text, content


def _untrained(path: Path, majority: float | None) -> dict[str, Stage]:
    """The source model as it is, on the target: what every training on the target has to improve upon."""
    content = _json(path)
    if not content.get("on_target"):
        return {}
    known = {"label": "source model, not trained further", "metrics": content["on_target"]}
    known |= {"majority": majority, "trainable_parameters": 0, "layers": [], "steps": 0}
    return {UNTRAINED: _stage(known, path, UNTRAINED)}


def _stage(content: dict[str, Any], path: Path, name: str) -> Stage:
    metrics = content.get("metrics") or {}
    layers = content.get("layers")
    return Stage(
        name=name,
        label=str(content.get("label") or name),
        accuracy=_number(path, metrics, "accuracy"),
        loss=_number(path, metrics, "loss"),
        perplexity=_number(path, metrics, "perplexity"),
        n=_number(path, metrics, "n"),
        majority=_number(path, content, "majority"),
        trainable=_number(path, content, "trainable_parameters"),
        total=_number(path, content, "total_parameters"),
        layers=None if layers is None else tuple(layers),
        steps=_number(path, content, "steps"),
        train_seconds=_number(path, content, "train_seconds"),
        evaluate_seconds=_number(path, content, "evaluate_seconds"),
        overhead=content.get("overhead"),
        data=content.get("data"),
        right=_right(path, metrics),
    )


def _right(path: Path, metrics: dict[str, Any]) -> str | None:
    right = metrics.get("right")
    if right is not None and not (
        isinstance(right, str) and set(right) <= set("01") and len(right) == metrics.get("n")
    ):
        raise ValueError(f"{path}: right must be a text of one 0 or 1 per example.")
    return right


def _number(path: Path, content: dict[str, Any], key: str) -> Any:
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{path}: {key} must be a number; it is {value!r}.")
    return value if value is None or math.isfinite(value) else None
