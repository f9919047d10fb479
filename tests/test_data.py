import json

import pytest
import tiny_texts as tiny

pytest.importorskip("datasets")

from inflection_fast.run.batches import Batches
from inflection_fast.run.config import DataConfig
from inflection_fast.run.data import normalised, read, without
from inflection_fast.run.errors import UserError

CLASSES = "sequence-classification"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def rows():
    return tiny.reviews(100)


def config(path, **changes):
    return DataConfig(str(path), **{"probe": 5, **changes})


def texts(*parts):
    return [text for part in parts for text in part["text"]]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path, rows, suffix):
    import pandas

    path = tmp_path / f"data.{suffix}"
    frame = pandas.DataFrame(rows)
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    data = read(config(path), CLASSES)
    assert sorted(texts(data.train, data.test, data.probe)) == sorted(row["text"] for row in rows)
    assert data.labels == ("neg", "pos")
    labels = {row["text"]: data.labels.index(row["label"]) for row in rows}
    assert all(labels[row["text"]] == row["label"] for part in (data.train, data.test) for row in part)


def test_shares_are_kept_and_the_parts_do_not_overlap(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows), test_share=0.3), CLASSES)
    assert (len(data.train), len(data.test), len(data.probe)) == (65, 30, 5)
    assert len(set(texts(data.train, data.test, data.probe))) == 100


def test_a_group_stands_on_one_side_only(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows), group="film"), CLASSES)
    trained = {row["group"] for part in (data.train, data.probe) for row in part}
    tested = set(data.test["group"])
    assert trained and tested and not trained & tested
    assert 20 <= len(data.test) <= 45


def test_the_split_follows_its_own_seed(tmp_path, rows):
    path = tiny.write_csv(tmp_path / "a.csv", rows)
    first, same, other = (read(config(path, split_seed=seed), CLASSES) for seed in (1, 1, 2))
    assert texts(first.test) == texts(same.test) != texts(other.test)


def test_limits_draw_at_random_from_their_own_part(tmp_path, rows):
    path = tiny.write_csv(tmp_path / "a.csv", rows)
    whole = read(config(path), CLASSES)
    small = read(config(path, train_limit=20, test_limit=7), CLASSES)
    assert (len(small.train), len(small.test)) == (20, 7)
    assert set(texts(small.train)) < set(texts(whole.train))
    assert set(texts(small.test)) < set(texts(whole.test))
    assert texts(small.test) != texts(whole.test)[:7]


def test_texts_that_differ_in_case_and_punctuation_are_one(tmp_path, rows):
    assert normalised("  It's GOOD,\tthough... ") == normalised("it s good though")
    assert normalised("!?") == "!?"
    doubled = rows + [{**row, "text": row["text"].upper() + "!"} for row in rows[:30]]
    data = read(config(tiny.write_csv(tmp_path / "a.csv", doubled)), CLASSES)
    assert data.dropped == {"duplicates": 30}
    kept = [normalised(text) for text in texts(data.train, data.test, data.probe)]
    assert len(kept) == len(set(kept)) == 100


def test_duplicates_stay_where_asked(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows + rows[:10]), deduplicate=False), CLASSES)
    assert len(texts(data.train, data.test, data.probe)) == 110 and not data.dropped


def test_training_texts_of_the_test_file_are_dropped(tmp_path, rows):
    train = tiny.write_csv(tmp_path / "a.csv", rows)
    test = tiny.write_csv(tmp_path / "b.csv", [*tiny.reviews(20, seed=1), {**rows[0], "text": rows[0]["text"] + "."}])
    data = read(config(train, test=str(test)), CLASSES)
    assert len(data.test) == 21 and len(data.train) + len(data.probe) == 99
    assert rows[0]["text"] not in texts(data.train, data.probe)
    assert data.dropped == {"also in the test file": 1}


def test_source_texts_of_the_target_are_dropped(tmp_path, rows):
    target = read(config(tiny.write_csv(tmp_path / "a.csv", rows)), CLASSES)
    more = [*tiny.reviews(40, seed=3), *({**row, "text": row["text"].upper()} for row in rows[:25])]
    source = read(config(tiny.write_csv(tmp_path / "b.csv", more), probe=0), CLASSES)
    clean = without(source, target, "also in the target")
    shared = {normalised(row["text"]) for row in rows}
    assert not shared & {normalised(text) for text in clean.train["text"]}
    assert clean.dropped["also in the target"] == len(source.train) - len(clean.train) > 0
    with pytest.raises(UserError, match="nothing is left to train on"):
        without(target, target, "also in the target")


def test_empty_texts_are_dropped_and_counted(tmp_path, rows):
    path = tiny.write_csv(tmp_path / "a.csv", [*rows, {**rows[0], "text": "  "}, {**rows[0], "text": ""}])
    assert read(config(path), CLASSES).dropped == {"empty": 2}


def test_the_word_null_is_text(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", [*rows, {**rows[0], "text": "null"}])), CLASSES)
    assert "null" in texts(data.train, data.test, data.probe)


def test_pairs_are_told_apart_by_their_second_text(tmp_path, rows):
    pairs = [{**row, "text": "same", "other": row["text"]} for row in rows]
    data = read(config(tiny.write_csv(tmp_path / "a.csv", pairs), text_pair="other"), CLASSES)
    assert not data.dropped
    batches = Batches(tiny.tokenizer(), CLASSES, 16)
    items = batches.items(data.train)
    batch = batches.collate(items[:3])
    alone = tiny.tokenizer()("same", items[1]["text_pair"])["input_ids"]
    assert batch["input_ids"][1, : len(alone)].tolist() == alone


@pytest.mark.parametrize("labels", [None, ("no", "yes")])
def test_integer_labels_are_positions(tmp_path, rows, labels):
    numbered = [{**row, "label": int(row["label"] == "pos")} for row in rows]
    data = read(config(tiny.write_csv(tmp_path / "a.csv", numbered), labels=labels), CLASSES)
    assert data.labels == (labels or ("0", "1"))
    truth = {row["text"]: row["label"] for row in numbered}
    assert all(truth[row["text"]] == row["label"] for row in data.train)


def test_labels_follow_the_order_that_is_given(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows), labels=("pos", "neg")), CLASSES)
    truth = {row["text"]: int(row["label"] == "neg") for row in rows}
    assert all(truth[row["text"]] == row["label"] for row in data.test)
    share = sum(row["label"] == 1 for row in data.test) / len(data.test)
    assert data.majority == max(share, 1 - share)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"text": "body"}, r"no column 'body'; it has text, label, film"),
        ({}, {"group": "year", "label": "stars"}, r"no column 'year', 'stars'"),
        ({}, {"labels": ("pos", "neutral")}, r"rows have labels outside \['pos', 'neutral'\]: 'neg'"),
        ({"label": 7}, {"labels": ("a", "b")}, r"100 rows have labels outside \['a', 'b'\]: 7"),
        ({"label": 0.5}, {}, "real numbers"),
        ({"label": -1}, {}, "negative labels"),
        ({"label": "only"}, {}, "fewer than two different labels"),
        ({"film": "one"}, {"group": "film"}, "one value only"),
        ({"text": "same"}, {"labels": ("neg", "pos")}, "nothing is left to train on"),
        ({"text": 3}, {}, "holds int, not text"),
    ],
)
def test_bad_columns_are_one_clear_sentence(tmp_path, rows, change, settings, message):
    path = tiny.write_csv(tmp_path / "a.csv", [{**row, **change} for row in rows])
    with pytest.raises(UserError, match=message) as caught:
        read(config(path, **settings), CLASSES)
    assert "\n" not in str(caught.value)


def test_a_test_label_that_training_lacks_is_refused(tmp_path, rows):
    train = tiny.write_csv(tmp_path / "a.csv", rows)
    test = tiny.write_csv(tmp_path / "b.csv", [{**row, "label": "mixed"} for row in tiny.reviews(3, seed=9)])
    with pytest.raises(UserError, match="3 rows have labels outside"):
        read(config(train, test=str(test)), CLASSES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("/nowhere/at/all", None, "no such file or folder"),
        ("data.txt", "a,b\n1,2\n", "must end in one of"),
        ("data.parquet", "not a parquet file", "could not be read"),
        ("data.jsonl", "{broken", "could not be read"),
        ("data.csv", "", "could not be read"),
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(config(path), CLASSES)


def test_language_pieces_hold_every_token_once(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows)), "causal-lm")
    assert data.labels == () and data.majority is None
    batches = Batches(tiny.tokenizer(), "causal-lm", 5)
    pieces = batches.items(data.train)
    whole = [tiny.tokenizer()(text)["input_ids"] for text in data.train["text"]]
    lost = sum(len(ids) % 5 == 1 for ids in whole)  # a last piece of one token predicts nothing
    assert sum(map(len, pieces)) == sum(map(len, whole)) - lost
    assert max(map(len, pieces)) == 5
    batch = batches.collate(sorted(pieces, key=len)[:2] + pieces[:1])
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    assert (batch["labels"][batch["labels"] >= 0] == batch["input_ids"][batch["attention_mask"] == 1]).all()


def test_classification_batches_are_cut_and_padded(tmp_path, rows):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", rows)), CLASSES)
    batches = Batches(tiny.tokenizer(), CLASSES, 6)
    items = batches.items(data.test, by_length=True)
    lengths = [len(item["text"]) for item in items]
    assert lengths == sorted(lengths)
    batch = batches.collate(items)
    assert batch["input_ids"].shape == (len(data.test), 6)
    assert batch["labels"].tolist() == [item["label"] for item in items]
    probe = batches.probe(data.probe, 2)
    assert [len(part["input_ids"]) for part in probe] == [2, 2, 1] and all("labels" not in part for part in probe)
