"""The files of a run folder: one schema for the stages that write them and the report that reads them."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from inflection_fast.atomic import read_json, write_json

__all__ = ["FORMAT", "DataRecord", "Metrics", "OverheadRecord", "RunRecord", "StageRecord", "load_json"]

FORMAT = 2
RUN, STAGE = "run.json", "stage.json"
Record = TypeVar("Record", bound="_Record")


@dataclass(frozen=True)
class Metrics:
    """The evaluation of a model on the test texts.

    Args:
        n: texts (of a language model: tokens) that it was evaluated on
        loss: mean cross-entropy in nats, per text (per token)
        accuracy: share of the texts with the right label; None for a language model
        correct: how many those are
        right: one character per text, "1" if its label was predicted and "0" if not, to compare models text by text
        perplexity: exponential of the loss, of a language model
        largest_probability: mean over the texts of the largest class probability; None for a language model
        share_above_099: share of the texts whose largest class probability is above 0.99
    """

    n: int
    loss: float
    accuracy: float | None = None
    correct: int | None = None
    right: str | None = None
    perplexity: float | None = None
    largest_probability: float | None = None
    share_above_099: float | None = None

    def __post_init__(self) -> None:
        if self.right is not None and not (set(self.right) <= set("01") and len(self.right) == self.n):
            raise ValueError("right must be a string with one 0 or 1 per text")


@dataclass(frozen=True)
class DataRecord:
    """Sizes of a data set after splitting, the label names, and how many rows were left out for which reason."""

    train: int
    test: int
    probe: int
    labels: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OverheadRecord:
    """Median time of a step without and with measuring in ms; the cost as a ratio of whole trainings, and its error."""

    off_ms: float
    on_ms: float
    noise: float
    ratio: float


class _Record:
    """A dataclass that is a JSON file with a format number."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, {"format": FORMAT, **_plain(self)})

    @classmethod
    def load(cls: type[Record], path: Path) -> Record:
        """Read the file. ValueError that names the field if it has another content or format."""
        content = load_json(path)
        found = content.pop("format", None)
        if found != FORMAT:
            raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}.")
        try:
            return _decoded(cls, content, "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from error


@dataclass(frozen=True)
class StageRecord(_Record):
    """`stage.json`: what a stage did, and the evaluation of its model.

    Args:
        stage: its name, which is that of its folder
        label: a description for the reader
        task: what the model is trained for
        data: the data set of the stage
        majority: share of the test texts that have the most frequent label; None for a language model
        metrics: of the model on the test texts; None if it was not evaluated
        trainable_parameters: number of trained parameters
        total_parameters: number of all parameters
        layers: blocks with LoRA; None if the stage injects nothing
        steps: optimizer steps
        train_seconds: duration of the training, without interruptions
        evaluate_seconds: duration of the evaluation
        overhead: the cost of measuring, if it was timed
        on_target: of a source stage: its model on the test texts of the target, before any training on the target
        draws: of random layers: number of draws until they differed from the plan and the other baselines
    """

    stage: str
    label: str
    task: str
    data: DataRecord | None
    majority: float | None
    metrics: Metrics | None
    trainable_parameters: int
    total_parameters: int | None
    layers: tuple[int, ...] | None
    steps: int
    train_seconds: float | None
    evaluate_seconds: float | None
    overhead: OverheadRecord | None = None
    on_target: Metrics | None = None
    draws: int | None = None

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the test texts."""
        return self.metrics.accuracy if self.metrics else None

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy on the test texts."""
        return self.metrics.loss if self.metrics else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the test texts."""
        return self.metrics.perplexity if self.metrics else None

    @property
    def n(self) -> int | None:
        """Number of test texts (tokens)."""
        return self.metrics.n if self.metrics else None

    @property
    def right(self) -> str | None:
        """Which test texts were classified correctly, as in `Metrics`."""
        return self.metrics.right if self.metrics else None

    @property
    def standard_error(self) -> float | None:
        """Binomial standard error of the accuracy."""
        if self.accuracy is None or not self.n:
            return None
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


@dataclass(frozen=True)
class RunRecord(_Record):
    """`run.json`: the finished stages, the versions of packages, and the seed."""

    finished: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if the file holds something else."""
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(content).__name__}.")
    return content


def _plain(record: Any) -> dict[str, Any]:
    """The fields by name, without those whose value and default are None."""
    plain = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if value is not None or item.default is not None:
            plain[item.name] = _plain(value) if dataclasses.is_dataclass(value) else value
    return plain


# ---- from JSON to dataclasses ----------------------------------------------------------------------------------------


def _decoded(kind: Any, value: Any, name: str) -> Any:
    """`value` converted to the annotation `kind`. ValueError that names the field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (one for one in arguments if one is not type(None))
        return _decoded(kind, value, name)
    if dataclasses.is_dataclass(kind):
        return _decoded_dataclass(kind, value, name)
    if origin is tuple:
        _check(isinstance(value, list), name, "a list", value)
        return tuple(_decoded(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, dict), name, "an object", value)
        return {key: _decoded(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        _check(number, name, "a number", value)
        return float(value)
    if kind is int:
        _check(isinstance(value, int) and not isinstance(value, bool), name, "a whole number", value)
        return value
    _check(isinstance(value, str), name, "a text", value)
    return value


def _decoded_dataclass(kind: Any, value: Any, name: str) -> Any:
    _check(isinstance(value, dict), name or "the file", "an object", value)
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    lead = f"{name}." if name else ""
    unknown = sorted(value.keys() - {item.name for item in fields})
    if unknown:
        raise ValueError(f"{lead}{unknown[0]} is not known")
    required = [item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING]
    missing = [one for one in required if one not in value]
    if missing:
        raise ValueError(f"{lead}{missing[0]} is missing")
    return kind(**{key: _decoded(hints[key], item, f"{lead}{key}") for key, item in value.items()})


def _check(condition: bool, name: str, accepted: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {accepted}; it is {value!r}")
