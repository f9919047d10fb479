"""Texts of a transfer: nothing stands on both sides, and what does not fit is named."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny_study import tiny_study, write_texts

from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError
from inflection_fast.study.config import (
    ConfirmationConfig,
    RegimeConfig,
    SizesConfig,
    StudyConfig,
    TransferConfig,
    TuningConfig,
)
from inflection_fast.study.near_duplicates import jaccard, letters_of, near_duplicates
from inflection_fast.study.store import Store
from inflection_fast.study.texts import texts_of
from inflection_fast.study.training_loop import batch_of, batches_of


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label", "group"], *rows])
    return path


@pytest.fixture
def shared(tmp_path):
    """A study whose source holds five texts of the target, in other spelling, and three that are nearly such."""
    config = tiny_study(tmp_path)
    with open(tmp_path / "b.csv", encoding="utf-8") as file:
        target = [[row["text"], row["label"], ""] for row in csv.DictReader(file)]
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        source = [[row["text"], row["label"], ""] for row in csv.DictReader(file)]
    same = [[f"  {text.upper()}! ", label, ""] for text, label, _ in target[:5]]
    long = sorted((row for row in target[5:]), key=lambda row: -len(row[0]))[:3]
    near = [[f"{text}s", label, ""] for text, label, _ in long]
    write_rows(tmp_path / "a.csv", source + same + near)
    return config


def test_texts_on_both_sides_are_removed_exactly_and_nearly(shared):
    facts = texts_of(shared, "one", Store.of(shared)).facts
    assert facts["dropped"] == {"source texts that stand in the target": 5, "source texts like a target text": 3}
    assert facts["source"]["texts"] == 160 and not facts["leaking"]


def test_the_leaking_variant_keeps_them_and_says_so(shared):
    leaking = {"one": replace(shared.transfers["one"], leaking=True)}
    config = replace(shared, transfers=leaking)
    facts = texts_of(config, "one", Store.of(config)).facts
    assert facts["leaking"] and facts["source"]["texts"] == 168
    assert facts["dropped"] == {"none: source texts left in that stand in the target": 5}


def test_near_duplicates_can_be_left_in(shared):
    config = replace(shared, near_duplicates=None)
    facts = texts_of(config, "one", Store.of(config)).facts
    assert facts["dropped"] == {"source texts that stand in the target": 5}


def test_the_order_of_a_file_does_not_matter(tmp_path):
    config = tiny_study(tmp_path)
    texts = texts_of(config, "one", Store.of(config))
    rows = (tmp_path / "b.csv").read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    other = replace(config, output=str(tmp_path / "other"))
    again = texts_of(other, "one", Store.of(other))
    assert (texts.split(1).test.ids == again.split(1).test.ids).all()


def test_groups_are_never_split(tmp_path):
    config = tiny_study(tmp_path)
    with open(tmp_path / "b.csv", encoding="utf-8") as file:
        rows = [[row["text"], row["label"], f"film{i % 60}"] for i, row in enumerate(csv.DictReader(file))]
    write_rows(tmp_path / "b.csv", rows)
    target = replace(config.transfers["one"].target, group="group")
    config = replace(config, transfers={"one": replace(config.transfers["one"], target=target)})
    texts = texts_of(config, "one", Store.of(config))
    where = {tuple(row): group for row, group in zip(texts.target.ids.tolist(), texts.groups, strict=True)}
    split = texts.split(3)
    parts = [{where[tuple(row)] for row in part.ids.tolist()} for part in (split.train, split.test, split.validation)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_labels_that_differ_need_a_new_head(tmp_path):
    config = tiny_study(tmp_path)
    write_texts(tmp_path / "c.csv", 240, 3, labels=("bad", "good", "odd"))
    three = DataConfig(str(tmp_path / "c.csv"), labels=("bad", "good", "odd"))
    transfer = replace(config.transfers["one"], target=three)
    with pytest.raises(UserError, match=r"transfers\.one: the source has the labels .* head to \"new\""):
        texts_of(replace(config, transfers={"one": transfer}), "one", Store.of(config))
    texts = texts_of(replace(config, transfers={"one": replace(transfer, head="new")}), "one", Store.of(config))
    assert texts.facts["target"]["labels"] == ["bad", "good", "odd"]


def test_too_few_texts_after_removing_duplicates_are_named(shared, tmp_path):
    sizes = SizesConfig(train=200, test=48, least_test=16, validation=32)
    config = replace(shared, target=sizes, output=str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"240 target texts are left .* and 248 are needed"):
        texts_of(config, "one", Store.of(config))
    same = {"one": TransferConfig(shared.transfers["one"].target, shared.transfers["one"].target)}
    config = replace(shared, transfers=same, output=str(tmp_path / "y"))
    with pytest.raises(UserError, match="0 source texts are left"):
        texts_of(config, "one", Store.of(config))


def test_damaged_data_is_named(tmp_path):
    config = tiny_study(tmp_path)
    store = Store.of(config)
    texts_of(config, "one", store)
    store.path("data/one.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"one\.npz is damaged: remove it"):
        texts_of(config, "one", store)


# ---- near-duplicates -------------------------------------------------------------------------------------------------


def test_what_is_reported_is_alike_and_what_is_alike_is_reported():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 80)) for _ in range(40)]
    changed = [text[:40] + "X" + text[41:] for text in texts]  # 5 of 76 sequences differ: 71 / 81 in common
    assert all(jaccard(letters_of(a), letters_of(b)) > 0.85 for a, b in zip(texts, changed, strict=True))
    assert near_duplicates(changed, texts, 0.8) == list(range(40))
    assert near_duplicates(changed, texts, 0.95) == []
    assert near_duplicates([*texts, *changed], None, 0.8) == list(range(40, 80))


def test_short_texts_are_compared_whole():
    assert letters_of("abc") == {"abc"} and letters_of("") == {""}
    assert near_duplicates(["abc", "abd"], ["abc"], 0.8) == [0]


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_every_text_comes_once_in_a_pass_and_batches_are_cut_to_their_longest(tmp_path):
    config = tiny_study(tmp_path)
    train = texts_of(config, "one", Store.of(config)).split(1).train
    batches = list(batches_of(train, 16, 4, seed=1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(64))
    for rows in batches:
        batch = batch_of(train, rows, "cpu")
        assert batch["input_ids"].shape[1] == train.lengths[rows].max() == batch["attention_mask"].sum(dim=1).max()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert [b.tolist() for b in batches_of(train, 16, 4, seed=1)] == [b.tolist() for b in batches]
    assert [b.tolist() for b in batches_of(train, 16, 4, seed=2)] != [b.tolist() for b in batches]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": (0, 1)}, "tuning.seed 0 is among the reported seeds"),
        ({"tuning": TuningConfig(("two/under",))}, "tuning.cells must be a transfer and a regime"),
        ({"tuning": TuningConfig(("one/under",))}, "tuning.cells must be at least one of the regimes ..over.."),
        ({"confirmations": {"later": ConfirmationConfig(("all",), ("two",))}}, "confirmations.later.transfers must be"),
        ({"rates": {"lora": (1e-3, 3e-3)}}, "rates.lora must be at least three"),
        ({"near_duplicates": 1.5}, "near_duplicates must be null, or above 0 and below 1"),
        ({"gradients": ("one/under",)}, "gradients must be transfer, regime and arm"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_study(tmp_path, **changes)


def test_no_learning_rate_is_searched_on_a_transfer_that_is_held_out(tmp_path):
    held_out = {"one": replace(tiny_study(tmp_path).transfers["one"], held_out=True)}
    with pytest.raises(ValueError, match="must be of a transfer that is not held out"):
        tiny_study(tmp_path, transfers=held_out)


def test_a_regime_is_epochs_or_steps():
    with pytest.raises(ValueError, match="either epochs or steps"):
        RegimeConfig(epochs=1, steps=3)
    assert StudyConfig.__dataclass_fields__["regimes"].default_factory()["over"].epochs == 8
