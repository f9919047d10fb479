"""The texts of a transfer: read, without texts that stand on both sides, tokenised once, and split by seed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from inflection_fast.atomic import replacing
from inflection_fast.run.config import DataConfig
from inflection_fast.run.data import normalised, read
from inflection_fast.run.errors import UserError
from inflection_fast.run.folder import write_json
from inflection_fast.study.config import StudyConfig, TransferConfig
from inflection_fast.study.near_duplicates import near_duplicates
from inflection_fast.study.store import Store, damaged

__all__ = ["Split", "Texts", "Tokens", "texts_of"]

TASK = "sequence-classification"


@dataclass(frozen=True)
class Tokens:
    """Texts as tokens: ids [N, T] int32 padded on the right, length of each [N], label of each [N]."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Tokens:
        """Some of the texts, in the given order."""
        return Tokens(self.ids[rows], self.lengths[rows], self.labels[rows])


@dataclass(frozen=True)
class Split:
    """The target's texts for one seed; `validation` is the same for every seed."""

    train: Tokens
    test: Tokens
    validation: Tokens


@dataclass(frozen=True)
class Texts:
    """All texts of a transfer."""

    name: str
    source: Tokens
    target: Tokens
    groups: np.ndarray  # [N] which group a text of the target belongs to; groups are never split
    facts: dict[str, Any]  # counts and labels, as they are published with every cell
    config: StudyConfig

    @cached_property
    def source_parts(self) -> tuple[Tokens, Tokens]:
        """Texts to train the source on, and to measure forgetting on."""
        settings = self.config.source
        order = np.random.default_rng(settings.seed).permutation(len(self.source))
        test, train = order[: settings.test], order[settings.test :][: settings.limit]
        return self.source.take(train), self.source.take(test)

    def split(self, seed: int) -> Split:
        """The target's split for a seed."""
        sizes = self.config.target
        validation, rest = _first_groups(np.arange(len(self.target)), self.groups, sizes.validation, seed=0)
        room = len(rest) - sizes.train
        test, train = _first_groups(rest, self.groups, min(sizes.test, room), seed=seed)
        train = np.random.default_rng([seed, 1]).permutation(train)[: sizes.train]
        return Split(*(self.target.take(rows) for rows in (train, test, validation)))


def texts_of(config: StudyConfig, name: str, store: Store) -> Texts:
    """The texts of a transfer, from the folder of the study or made for it."""
    facts = store.get(f"data/{name}.json", lambda: _prepare(config, name, store))
    path = store.path(f"data/{name}.npz")
    try:
        with np.load(path) as arrays:
            source, target = (Tokens(*(arrays[f"{side}_{part}"] for part in PARTS)) for side in ("source", "target"))
            return Texts(name, source, target, arrays["groups"], facts, config)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise damaged(path) from error


PARTS = ("ids", "lengths", "labels")


def _prepare(config: StudyConfig, name: str, store: Store) -> dict[str, Any]:
    transfer = config.transfers[name]
    dropped: dict[str, int] = {}
    source, source_labels = _rows(transfer.source, dropped, "source")
    target, target_labels = _rows(transfer.target, dropped, "target")
    _check_labels(name, transfer, source_labels, target_labels)
    target = _without_near(target, None, config.near_duplicates, dropped, "target texts like another target text")
    both = {row["key"] for row in target} & {row["key"] for row in source}
    if transfer.leaking:
        dropped["none: source texts left in that stand in the target"] = len(both)
    else:
        source = [row for row in source if row["key"] not in both]
        dropped["source texts that stand in the target"] = len(both)
        words = "source texts like a target text"
        source = _without_near(source, target, config.near_duplicates, dropped, words)
    _check_sizes(name, config, len(source), len(target))
    facts = {
        "transfer": name,
        "leaking": transfer.leaking,
        "near_duplicates": config.near_duplicates,
        "source": {"texts": len(source), "labels": list(source_labels)},
        "target": {"texts": len(target), "labels": list(target_labels)},
        "dropped": {why: count for why, count in dropped.items() if count},
    }
    tokenizer = _tokenizer(config)
    arrays: dict[str, np.ndarray] = {}
    for side, rows in (("source", source), ("target", target)):
        arrays.update({f"{side}_{k}": v for k, v in zip(PARTS, _tokenised(tokenizer, rows, config), strict=True)})
    numbers = {group: i for i, group in enumerate(dict.fromkeys(row["group"] for row in target))}
    arrays["groups"] = np.array([numbers[row["group"]] for row in target])
    path = store.path(f"data/{name}.npz")
    with replacing(path) as fresh, open(fresh, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    write_json(store.path(f"data/{name}.facts.json"), facts)
    return facts


def _rows(config: DataConfig, dropped: dict[str, int], side: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """All rows of a data set in the order of their normalised texts, so that no order of a file matters."""
    if config.text_pair is not None:
        raise UserError(f"{config.path}: a study takes single texts: text_pair must be null")
    data = read(config, TASK)
    rows = []
    for part in (data.train, data.test, data.probe):
        columns = [part["text"][:], part["label"][:]]
        columns.append(part["group"][:] if "group" in part.column_names else [None] * len(part))
        for text, label, group in zip(*columns, strict=True):
            key = normalised(text)
            rows.append({"text": text, "label": label, "key": key, "group": key if group is None else group})
    for why, count in data.dropped.items():
        dropped[f"{side}: {why}"] = count
    return sorted(rows, key=lambda row: row["key"]), data.labels


def _without_near(
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]] | None,
    threshold: float | None,
    dropped: dict[str, int],
    why: str,
) -> list[dict[str, Any]]:
    if threshold is None:
        return rows
    keys = [row["key"] for row in rows]
    near = set(near_duplicates(keys, None if others is None else [row["key"] for row in others], threshold))
    dropped[why] = len(near)
    return [row for i, row in enumerate(rows) if i not in near]


def _check_labels(name: str, transfer: TransferConfig, source: tuple[str, ...], target: tuple[str, ...]) -> None:
    if transfer.head == "keep" and len(source) != len(target):
        raise UserError(
            f"transfers.{name}: the source has the labels {list(source)} and the target {list(target)}:"
            ' set head to "new", because the head of the source does not fit'
        )


def _check_sizes(name: str, config: StudyConfig, source: int, target: int) -> None:
    sizes = config.target
    needed = sizes.validation + sizes.train + sizes.least_test
    if target < needed:
        raise UserError(
            f"transfers.{name}: {target} target texts are left after duplicates were removed, and {needed} are needed"
            f" (target.train {sizes.train}, target.validation {sizes.validation}, target.least_test {sizes.least_test})"
        )
    needed = config.source.test + min(config.source.limit, 2 * config.train.batch_size)
    if source < needed:
        raise UserError(
            f"transfers.{name}: {source} source texts are left after those that resemble the target were removed,"
            f" and at least {needed} are needed (source.test is {config.source.test})"
        )


def _tokenizer(config: StudyConfig) -> Any:
    from inflection_fast.run.models import load_tokenizer

    return load_tokenizer(config.model)


def _tokenised(tokenizer: Any, rows: list[dict[str, Any]], config: StudyConfig) -> Iterable[np.ndarray]:
    longest = config.model.max_length
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=longest)["input_ids"]
    lengths = np.array([len(ids) for ids in encoded])
    ids = np.full((len(rows), max(lengths)), tokenizer.pad_token_id, np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    return ids, lengths.astype(np.int32), np.array([row["label"] for row in rows], np.int64)


def _first_groups(rows: np.ndarray, groups: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` in two parts, the first of at most `count` rows: whole groups, drawn at random."""
    selected = groups[rows]
    names, sizes = np.unique(selected, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    inside = names[order[np.cumsum(sizes[order]) <= count]]
    chosen = np.isin(selected, inside)
    return rows[chosen], rows[~chosen]
