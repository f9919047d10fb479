"""The settings of a run: a tree of frozen dataclasses that check their values when they are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inflection_fast.decide import SelectConfig
from inflection_fast.measure import MonitorConfig

__all__ = [
    "BASELINES", "DataConfig", "LoraConfig", "MeasureConfig", "ModelConfig", "RunConfig", "SourceConfig", "TrainConfig",
    "TuneConfig", "check", "differences", "to_dict",
]  # fmt: skip

BASELINES = ("last", "first", "random", "all")
_ENCODINGS = "null or a text encoding that Python knows, such as utf-16, latin-1 or cp1252"


def check(condition: bool, name: str, value: Any, accepted: str) -> None:
    """ValueError that names the setting, its value and what is accepted, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model.

    Args:
        path: folder of a saved model, or its name on the hub
        revision: branch, tag or commit on the hub
        gguf_file: name of a GGUF file in that folder or repository; its weights are read and dequantised
        attention: attention implementation of Transformers, such as sdpa or eager; null: the model's own
        dtype: number format of the weights
        max_length: texts are cut to this number of tokens
        trust_remote_code: run Python code that comes with the model
    """

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    attention: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int = 128
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check(bool(self.path), "model.path", self.path, "a folder or a hub name")
        check(self.max_length >= 2, "model.max_length", self.max_length, "at least 2")


@dataclass(frozen=True)
class DataConfig:
    """A data set: where it is, which columns are used, and how it is split.

    Texts that are equal after normalisation (case, punctuation, spacing) are kept once, so that none is in both parts
    of a split. The test part is, in this order: the file or hub split `test`, whole groups if `group` is given, or a
    random share.

    Args:
        path: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (one text per line), also compressed (.gz, .bz2, .xz,
            .zst, .zip), or the name of a data set on the hub
        name: configuration of the hub data set
        split: split of the hub data set to train on
        encoding: character encoding of a text file; null: UTF-8
        delimiter: character between the fields of a .csv or .tsv file; null: a comma or a tab
        quoting: standard: a field in quotation marks may hold delimiters and line ends; none: quotation marks are text;
            null: standard, and a .tsv file in which quotation marks join lines is refused
        field: key of the list of rows in a .json file; null: the only key with such a list
        text: column of the text
        text_pair: column of a second text, for pairs of sentences
        messages: column of conversations, lists of {role, content}, instead of `text`; the chat template of the
            model's tokenizer renders them; causal-lm only
        label: column of the label (names or integers); not used by causal-lm
        labels: label names in the order of their integers; null: the sorted values of the column
        test: a file, or a split of the hub data set, to test on
        test_share: share of the rows to test on if `test` is null
        group: column whose values are never in both parts of the split, such as the film of a review
        drop_missing: leave out rows without a label, and count them; false: refuse them
        probe: number of texts kept out of training, to compare representations over time; null: 64, or a tenth of the
            texts if that is fewer
        train_limit: largest number of texts to train on, drawn at random
        test_limit: largest number of texts to test on, drawn at random
        deduplicate: keep texts once (see above)
        contradicting: for a text that occurs with different labels: drop all of its copies, or keep the first; both
            are counted
        split_seed: seed of the split and the draws; separate from the seed of training, so that seeds share a test set
    """

    path: str
    name: str | None = None
    split: str = "train"
    encoding: str | None = None
    delimiter: str | None = None
    quoting: Literal["standard", "none"] | None = None
    field: str | None = None
    text: str = "text"
    text_pair: str | None = None
    messages: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None
    test: str | None = None
    test_share: float = 0.2
    group: str | None = None
    drop_missing: bool = False
    probe: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    deduplicate: bool = True
    contradicting: Literal["drop", "first"] = "drop"
    split_seed: int = 0

    def __post_init__(self) -> None:
        check(bool(self.path), "data.path", self.path, "a file or a hub name")
        check(0 < self.test_share < 1, "data.test_share", self.test_share, "above 0 and below 1")
        check(self.probe is None or self.probe >= 0, "data.probe", self.probe, "null or at least 0")
        single = self.delimiter is None or len(self.delimiter) == 1
        check(single, "data.delimiter", self.delimiter, 'null or one character (a tab is "\\t")')
        check(self.encoding is None or _is_encoding(self.encoding), "data.encoding", self.encoding, _ENCODINGS)
        for name in ("train_limit", "test_limit"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"data.{name}", value, "null or at least 1")
        if self.messages is not None and self.text_pair is not None:
            raise ValueError("data.messages and data.text_pair are two kinds of text: give one of them")
        if self.test is not None and self.group is not None:
            raise ValueError("data.test and data.group are two ways to split: give one of them")
        if self.labels is not None:
            check(len(self.labels) >= 2, "data.labels", self.labels, "at least two names")
            check(len(set(self.labels)) == len(self.labels), "data.labels", self.labels, "distinct names")
            stripped = all(name == name.strip() and name for name in self.labels)
            check(stripped, "data.labels", self.labels, "names without spaces around them")


@dataclass(frozen=True)
class TrainConfig:
    """One training, done by transformers.Trainer.

    Args:
        steps: optimizer steps; null: the steps of `epochs`
        epochs: passes over the data if `steps` is null
        batch_size: texts per forward pass, divided among the processes of torchrun
        accumulate: forward passes per optimizer step
        learning_rate: highest learning rate
        weight_decay: decoupled weight decay
        warmup_share: share of the steps over which the learning rate rises
        schedule: how the learning rate falls afterwards
        max_grad_norm: gradients are clipped to this norm; 0: never
        eval_batch_size: texts per device and forward pass of an evaluation
        precision: arithmetic of the forward pass; bfloat16 and float16 by autocast, which keeps the weights as they are
        checkpoint_every: optimizer steps between checkpoints, from which an interrupted training continues
        log_every: optimizer steps between the losses written to log.json
        activation_checkpointing: recompute activations in the backward pass to save memory
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    max_grad_norm: float = 1.0
    eval_batch_size: int = 64
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpoint_every: int = 200
    log_every: int = 10
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, "train.steps", self.steps, "null or at least 1")
        for name in ("batch_size", "accumulate", "eval_batch_size", "checkpoint_every", "log_every"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("epochs", "learning_rate"):
            check(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "above 0")
        for name in ("weight_decay", "max_grad_norm"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        check(0 <= self.warmup_share < 1, "train.warmup_share", self.warmup_share, "at least 0 and below 1")


@dataclass(frozen=True)
class SourceConfig:
    """Full fine-tuning on another data set before the target is touched.

    Args:
        data: the source data set
        train: its training
    """

    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class MeasureConfig:
    """The training that is measured: the top blocks and the head train on the target, the rest is frozen.

    Args:
        unfreeze: number of blocks at the top that are trained, with the head; null: the whole model
        head: name prefixes of the modules that are trained as the head; null: everything after the last block
        train: its training
        monitor: what is measured and how often
        overhead_pairs: number of steps with and without measuring that are timed afterwards; 0: none, as with fsdp
    """

    unfreeze: int | None = 2
    head: tuple[str, ...] | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    overhead_pairs: int = 5

    def __post_init__(self) -> None:
        check(self.unfreeze is None or self.unfreeze >= 0, "measure.unfreeze", self.unfreeze, "null or at least 0")
        pairs = self.overhead_pairs
        check(pairs == 0 or pairs >= 3, "measure.overhead_pairs", pairs, "0 or at least 3")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters.

    Args:
        r: rank
        alpha: scale of the update; null: twice the rank
        dropout: dropout before the adapter
        target_modules: names of the linear modules inside a block; null: by the rules of `inject`
        modules_to_save: modules trained in full beside the adapters; null: the task's head
    """

    r: int = 4
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check(self.r >= 1, "lora.r", self.r, "at least 1")
        check(self.alpha is None or self.alpha >= 1, "lora.alpha", self.alpha, "null or at least 1")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True)
class TuneConfig:
    """LoRA in the planned blocks, trained on the target; the baselines train in the same way.

    Args:
        lora: the adapters
        train: their training
        when_empty: if the plan names no layer: stop without injecting, or take the layers with the top scores
        top: number of layers taken in that case
    """

    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=5e-4))
    when_empty: Literal["stop", "top"] = "stop"
    top: int = 2

    def __post_init__(self) -> None:
        check(self.top >= 1, "tune.top", self.top, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        model: the pretrained model
        target: the data set to adapt to
        output: folder for all files of the run
        task: what the model is trained for
        source: an optional first training on another data set
        measure: the measured training
        select: how layers are chosen from what was measured
        tune: LoRA on the chosen layers
        baselines: other choices of equally many layers to compare with: last, first, random; or all layers
        parallel: how several processes hold the model: ddp: each has all of it; fsdp: it is sharded (FSDP2)
        seed: seed of initialisation, order of texts and dropout
    """

    model: ModelConfig
    target: DataConfig
    output: str
    task: Literal["sequence-classification", "causal-lm"] = "sequence-classification"
    source: SourceConfig | None = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    baselines: tuple[str, ...] = ("last", "random")
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 42

    def __post_init__(self) -> None:
        check(bool(self.output), "output", self.output, "a folder")
        check(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2**32 - 1")
        for name in self.baselines:
            check(name in BASELINES, "baselines", name, "among " + ", ".join(BASELINES))
        check(len(set(self.baselines)) == len(self.baselines), "baselines", self.baselines, "distinct names")

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output).expanduser()

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Every training of the run by the name of its settings."""
        source = {} if self.source is None else {"source.train": self.source.train}
        return {**source, "measure.train": self.measure.train, "tune.train": self.tune.train}


def to_dict(config: Any) -> Any:
    """A configuration as dictionaries, lists and scalars, for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {item.name: to_dict(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The settings in which two configurations from `to_dict` differ, each as `name (old -> new)`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix} ({_short(old)} -> {_short(new)})"]
    found = []
    for key in list(old) + [key for key in new if key not in old]:
        name = f"{prefix}.{key}" if prefix else str(key)
        found += differences(old.get(key), new.get(key), name)
    return found


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
