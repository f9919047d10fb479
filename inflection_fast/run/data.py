"""Texts from files or the hub: read, checked, and split without leaks."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TextData", "normalised", "read", "without"]

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class TextData:
    """A data set after splitting: rows with `text`, and where they apply `text_pair`, `label` (an integer), `group`."""

    train: Dataset
    test: Dataset
    probe: Dataset
    labels: tuple[str, ...]  # names in the order of their integers; empty for causal-lm
    dropped: dict[str, int] = field(default_factory=dict)  # why -> how many rows

    @property
    def majority(self) -> float | None:
        """Share of the test rows that have the most frequent label."""
        if not self.labels:
            return None
        return max(Counter(self.test["label"]).values()) / len(self.test)

    def summary(self) -> dict[str, Any]:
        """Sizes and what was dropped, for stage.json."""
        sizes = {"train": len(self.train), "test": len(self.test), "probe": len(self.probe)}
        return {**sizes, "labels": list(self.labels), "dropped": dict(self.dropped)}


def normalised(text: str) -> str:
    """The text without case, punctuation and spacing: two texts that differ only in those are one text to a model."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text


def read(config: DataConfig, task: str) -> TextData:
    """Reads, checks and splits a data set. UserError for a missing file or column, or labels that make no sense."""
    dropped: dict[str, int] = {}
    rows = _tidy(_load(config, None), config, task, dropped, config.path)
    labels: tuple[str, ...] = ()
    if task == "sequence-classification":
        labels = config.labels or _label_names(rows, config)
        rows = _numbered(rows, labels, config.path)
    if config.test is not None:
        test = _tidy(_load(config, config.test), config, task, dropped, config.test)
        if labels:
            test = _numbered(test, labels, config.test)
        if config.deduplicate:
            rows = _drop(rows, set(_keys(test)), dropped, "also in the test file")
    else:
        rows, test = _split(rows, config)
    rng = np.random.default_rng(config.split_seed)
    order = rng.permutation(len(rows))
    probe, rows = rows.select(order[: config.probe]), rows.select(order[config.probe :][: config.train_limit])
    if config.test_limit is not None:
        test = test.select(np.sort(rng.permutation(len(test))[: config.test_limit]))
    for name, part in (("train", rows), ("test", test)):
        if not len(part):
            raise UserError(f"{config.path}: nothing is left to {name} on after splitting and dropping ({dropped})")
    return TextData(rows, test, probe, labels, dropped)


def without(data: TextData, other: TextData, why: str) -> TextData:
    """`data` less the training rows whose text stands anywhere in `other`."""
    keys = {key for part in (other.train, other.test, other.probe) for key in _keys(part)}
    dropped = dict(data.dropped)
    train = _drop(data.train, keys, dropped, why)
    if not len(train):
        raise UserError(f"nothing is left to train on: every text is {why}")
    return replace(data, train=train, dropped=dropped)


def _load(config: DataConfig, test: str | None) -> Dataset:
    """The rows of the file or hub split; `test` None: those to train on."""
    import datasets

    source = test if test is not None else config.path
    kind = _format(source)
    try:
        if kind is not None:
            if not Path(source).is_file():
                raise UserError(f"{source}: there is no such file")
            options = {"sep": "\t"} if ".tsv" in Path(source).suffixes else {}
            if kind == "csv":
                options["keep_default_na"] = False  # the words "null" and "NA" are text
            return datasets.load_dataset(kind, data_files=source, split="train", **options)
        split = test if test is not None else config.split
        return datasets.load_dataset(config.path, config.name, split=split)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{source}: the data set could not be read: {reason}") from error


def _format(path: str) -> str | None:
    """The reader for a local file; None for a name on the hub."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    if suffixes and suffixes[-1] in FORMATS:
        return FORMATS[suffixes[-1]]
    if Path(path).is_file():
        raise UserError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    return None


def _tidy(rows: Dataset, config: DataConfig, task: str, dropped: dict[str, int], source: str) -> Dataset:
    """Only the named columns under our own names, without empty texts and duplicates."""
    wanted = {"text": config.text, "text_pair": config.text_pair, "group": config.group}
    if task == "sequence-classification":
        wanted["label"] = config.label
    elif config.text_pair is not None:
        raise UserError("causal-lm learns single texts: data.text_pair must be null")
    wanted = {ours: theirs for ours, theirs in wanted.items() if theirs is not None}
    missing = [theirs for theirs in wanted.values() if theirs not in rows.column_names]
    if missing:
        raise UserError(
            f"{source}: there is no column {', '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}"
        )
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"{source}: one column cannot be used for two things: {wanted}")
    rows = rows.select_columns(list(wanted.values())).rename_columns(
        {theirs: ours for ours, theirs in wanted.items() if ours != theirs}
    )
    for column in ("text", "text_pair"):
        if column in wanted:
            kinds = {type(value).__name__ for value in rows[column]} - {"str", "NoneType"}
            if kinds:
                raise UserError(f"{source}: column {wanted[column]!r} holds {', '.join(sorted(kinds))}, not text")
    texts = rows["text"]
    kept = [i for i, text in enumerate(texts) if text is not None and text.strip()]
    _count(dropped, "empty", len(rows) - len(kept))
    rows = rows.select(kept)
    if config.deduplicate:
        first: dict[str, int] = {}
        for i, key in enumerate(_keys(rows)):
            first.setdefault(key, i)
        _count(dropped, "duplicates", len(rows) - len(first))
        rows = rows.select(list(first.values()))
    return rows


def _keys(rows: Dataset) -> list[str]:
    """What tells one text from another, row by row."""
    texts = [normalised(text) for text in rows["text"]]
    if "text_pair" not in rows.column_names:
        return texts
    return [f"{text}\n{normalised(pair or '')}" for text, pair in zip(texts, rows["text_pair"], strict=True)]


def _drop(rows: Dataset, keys: set[str], dropped: dict[str, int], why: str) -> Dataset:
    kept = [i for i, key in enumerate(_keys(rows)) if key not in keys]
    _count(dropped, why, len(rows) - len(kept))
    return rows.select(kept)


def _count(dropped: dict[str, int], why: str, number: int) -> None:
    if number:
        dropped[why] = dropped.get(why, 0) + number


def _split(rows: Dataset, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test rows: whole groups where a group column is named, single rows otherwise."""
    rng = np.random.default_rng(config.split_seed)
    if config.group is None:
        order = rng.permutation(len(rows))
        test = round(config.test_share * len(rows))
        return rows.select(np.sort(order[test:])), rows.select(np.sort(order[:test]))
    groups = rows["group"]
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise UserError(f"{config.path}: column {config.group!r} has one value only, which cannot be split")
    names = sorted(sizes, key=str)
    chosen, count = set(), 0
    for i in rng.permutation(len(names)):
        if count >= config.test_share * len(rows) or len(chosen) == len(names) - 1:
            break
        chosen.add(names[i])
        count += sizes[names[i]]
    sides = [group in chosen for group in groups]
    return tuple(rows.select([i for i, side in enumerate(sides) if side is which]) for which in (False, True))


def _label_names(rows: Dataset, config: DataConfig) -> tuple[str, ...]:
    """The label names: those of the file format where it has any, else the sorted values."""
    declared = getattr(rows.features["label"], "names", None)
    if declared:
        return tuple(declared)
    found = {value for value in rows["label"] if value is not None}
    if any(isinstance(value, float) for value in found):
        raise UserError(f"{config.path}: column {config.label!r} holds real numbers; labels are names or integers")
    if any(isinstance(value, int) and value < 0 for value in found):
        raise UserError(f"{config.path}: column {config.label!r} holds negative labels, such as {min(found)}")
    if len(found) < 2:
        raise UserError(f"{config.path}: column {config.label!r} has fewer than two different labels: {sorted(found)}")
    return tuple(str(value) for value in sorted(found))


def _numbered(rows: Dataset, names: tuple[str, ...], source: str) -> Dataset:
    """The rows with every label as its integer."""
    values = rows["label"][:]
    numbers: dict[Any, int] = {name: i for i, name in enumerate(names)}
    spelt = [None if value is None else str(value) for value in values]
    if not numbers.keys() >= set(spelt) and all(isinstance(value, int) for value in values):
        # Integers that are not names themselves are positions in the list of names.
        numbers, spelt = {i: i for i in range(len(names))}, values
    outside = Counter(value for value in spelt if value not in numbers)
    if outside:
        some = ", ".join(repr(value) for value, _ in outside.most_common(5))
        raise UserError(
            f"{source}: {sum(outside.values())} rows have labels outside {list(names)}: {some}"
            " (leave such rows out, or name them in data.labels)"
        )
    return rows.remove_columns("label").add_column("label", [numbers[value] for value in spelt])
