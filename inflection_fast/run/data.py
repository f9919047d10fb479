"""Texts from files or the hub: read, checked, and split without leaks."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.records import DataRecord
from inflection_fast.run import chats
from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError
from inflection_fast.run.files import Rows, load_rows
from inflection_fast.run.labels import clean_labels, label_names, numbered

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TextData", "normalised", "read", "without"]

PROBE = 64  # texts of the probe if the settings give no number,
PROBE_SHARE = 0.1  # and the largest share of all texts


@dataclass(frozen=True)
class TextData:
    """A data set after splitting: rows with `text`, and if given `text_pair`, `label` (an integer) and `group`.

    Of a conversation, `text` holds its messages as plain text, and `rendered` the output of the chat template.
    """

    train: Dataset
    test: Dataset
    probe: Dataset
    labels: tuple[str, ...]  # names in the order of their integers; empty for causal-lm
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of rows

    @property
    def majority(self) -> float | None:
        """Share of the test rows that have the most frequent label."""
        if not self.labels:
            return None
        return max(Counter(self.test["label"]).values()) / len(self.test)

    def record(self) -> DataRecord:
        """Sizes and what was dropped, for stage.json."""
        return DataRecord(len(self.train), len(self.test), len(self.probe), self.labels, dict(self.dropped))


def normalised(text: str) -> str:
    """The text without case, punctuation and spacing: texts that differ only in these count as equal."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text


def read(config: DataConfig, task: str, render: chats.Render | None = None) -> TextData:
    """Read, check and split a data set. UserError for a missing file or column, or wrong labels.

    `render` turns a conversation into text to train on; None: conversations are only counted and split.
    """
    dropped: Counter[str] = Counter()
    found = _rows(config, task, None, dropped, render)
    labels: tuple[str, ...] = ()
    if task == "sequence-classification":
        labels = config.labels or label_names(found, config)
    rows = _data_set(found, labels)
    if config.test is not None:
        test = _data_set(_rows(config, task, config.test, dropped, render), labels)
        if config.deduplicate:
            rows = _without(rows, set(_keys(test)), dropped, "also in the test file")
    else:
        rows, test = _split(rows, config)
    rng = np.random.default_rng(config.split_seed)
    order = rng.permutation(len(rows))
    size = min(PROBE, math.ceil(PROBE_SHARE * len(rows))) if config.probe is None else config.probe
    if len(test) and config.probe and size >= len(rows) > 0:
        raise UserError(
            f"{config.path}: data.probe is {size}, and {len(rows)} texts are left after splitting and dropping"
            f"{_counts(dropped)}: give a smaller probe, or more texts"
        )
    probe, rows = rows.select(order[:size]), rows.select(order[size:][: config.train_limit])
    if config.test_limit is not None:
        test = test.select(np.sort(rng.permutation(len(test))[: config.test_limit]))
    for name, part in (("train", rows), ("test", test)):
        if not len(part):
            raise UserError(
                f"{config.path}: of {len(found)} texts nothing is left to {name} on after splitting and dropping"
                f"{_counts(dropped)}"
            )
    return TextData(rows, test, probe, labels, dict(+dropped))


def without(data: TextData, other: TextData, why: str) -> TextData:
    """`data` without the training rows whose text is in any part of `other`; `why` is the reason in `dropped`."""
    keys = {key for part in (other.train, other.test, other.probe) for key in _keys(part)}
    dropped = Counter(data.dropped)
    train = _without(data.train, keys, dropped, why)
    if not len(train):
        raise UserError(f"nothing is left to train on: every text is {why}")
    return replace(data, train=train, dropped=dict(+dropped))


def _counts(dropped: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {why}' for why, count in (+dropped).items())})" if +dropped else ""


def _rows(config: DataConfig, task: str, test: str | None, dropped: Counter[str], render: chats.Render | None) -> Rows:
    """The columns under the names of `TextData`, without empty texts and duplicates, labels cleaned."""
    texts = {"text": config.text, "text_pair": config.text_pair}
    columns_of = {**(texts if config.messages is None else {"messages": config.messages}), "group": config.group}
    if config.messages is not None and task != "causal-lm":
        raise UserError(f"data.messages is for causal-lm: name a column of plain text as data.text for {task}")
    if task == "sequence-classification":
        columns_of["label"] = config.label
    elif config.text_pair is not None:
        raise UserError("causal-lm learns single texts: data.text_pair must be null")
    wanted = {ours: theirs for ours, theirs in columns_of.items() if theirs is not None}
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"{test or config.path}: one column cannot be used for two things: {wanted}")
    rows = load_rows(config, list(wanted.values()), test)
    columns = {ours: rows.columns[theirs] for ours, theirs in wanted.items()}
    for ours in ("text", "text_pair"):
        if ours in columns:
            columns[ours] = _as_text(columns[ours], f"{rows.source}: column {wanted[ours]!r}")
    names = {ours: rows.names[theirs] for ours, theirs in wanted.items() if theirs in rows.names}
    if "messages" in columns:
        columns["text"] = chats.plain_text(rows, wanted["messages"])
    rows = Rows(rows.source, columns, rows.unit, rows.places, names)
    kept = [i for i, text in enumerate(columns["text"]) if text is not None and text.strip()]
    dropped["empty"] += len(rows) - len(kept)
    rows = rows.select(kept)
    if "label" in wanted:
        rows = clean_labels(rows, config, dropped)
        if config.labels is None and test is None:
            label_names(rows, config)  # an error of all labels comes before rows are dropped for their own label
    rows = _once(rows, config, dropped) if config.deduplicate else rows
    if (conversations := rows.columns.pop("messages", None)) is not None and render is not None:
        rows.columns["rendered"] = chats.rendered(rows, conversations, render)
    return rows


def _as_text(values: list[Any], column: str) -> list[str | None]:
    """The values as text: numbers as Python writes them, NaN as None. UserError for other types."""
    accepted = (str, int, float, type(None))
    others = {type(v).__name__ for v in values if isinstance(v, bool) or not isinstance(v, accepted)}
    if others:
        raise UserError(f"{column} holds {', '.join(sorted(others))}, not text")
    return [None if value is None or value != value else str(value) for value in values]


def _once(rows: Rows, config: DataConfig, dropped: Counter[str]) -> Rows:
    """Every text once. Copies with different labels are counted apart from duplicates."""
    copies: dict[str, list[int]] = {}
    for i, key in enumerate(_keys(rows.columns)):
        copies.setdefault(key, []).append(i)
    labels = rows.columns.get("label")
    first = config.contradicting == "first"
    contradicting = f"copies with contradicting labels{' after the first' if first else ''}"
    dropped["duplicates"] += 0  # messages name these first
    kept = []
    for equal in copies.values():
        agree = labels is None or len({str(labels[i]) for i in equal}) == 1
        if agree or first:
            kept.append(equal[0])
        dropped["duplicates" if agree else contradicting] += len(equal) - (agree or first)
    return rows.select(kept)


def _data_set(rows: Rows, labels: tuple[str, ...]) -> Dataset:
    """The rows as a data set, every label as its integer."""
    from datasets import Dataset

    columns = dict(rows.columns)
    if labels:
        columns["label"] = numbered(rows, labels)
    return Dataset.from_dict(columns)


def _keys(rows: Dataset | dict[str, list[Any]]) -> list[str]:
    """The normalised text of every row, which decides whether two texts are equal."""
    texts = [normalised(text) for text in rows["text"]]
    if "text_pair" not in (rows if isinstance(rows, dict) else rows.column_names):
        return texts
    return [f"{text}\n{normalised(pair or '')}" for text, pair in zip(texts, rows["text_pair"], strict=True)]


def _without(rows: Dataset, keys: set[str], dropped: Counter[str], why: str) -> Dataset:
    kept = [i for i, key in enumerate(_keys(rows)) if key not in keys]
    dropped[why] += len(rows) - len(kept)
    return rows.select(kept)


def _split(rows: Dataset, config: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test rows: whole groups if there is a group column, else single rows."""
    rng = np.random.default_rng(config.split_seed)
    if config.group is None:
        order = rng.permutation(len(rows))
        test = round(config.test_share * len(rows))
        return rows.select(np.sort(order[test:])), rows.select(np.sort(order[:test]))
    groups = rows["group"]
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise UserError(f"{config.path}: column {config.group!r} has only one value, which cannot be split")
    names = sorted(sizes, key=str)
    chosen: set[Any] = set()
    count = 0
    for i in rng.permutation(len(names)):
        if count >= config.test_share * len(rows) or len(chosen) == len(names) - 1:
            break
        chosen.add(names[i])
        count += sizes[names[i]]
    sides = [group in chosen for group in groups]
    return tuple(rows.select([i for i, side in enumerate(sides) if side is which]) for which in (False, True))
