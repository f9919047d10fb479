import json

import helpers.tiny_texts as tiny
import pytest
from helpers.small_runs import own_cache  # noqa: F401

pytest.importorskip("datasets")

from inflection_fast.run.batches import Batches
from inflection_fast.run.config import DataConfig
from inflection_fast.run.data import normalised, read, without
from inflection_fast.run.errors import UserError

CLASSES = "sequence-classification"


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


def test_copies_that_contradict_each_other_are_counted_apart(tmp_path, rows):
    other = {"pos": "neg", "neg": "pos"}
    copies = [{**row, "text": row["text"] + "!"} for row in rows[:7]]
    contradicting = [{**row, "label": other[row["label"]]} for row in rows[5:15]]
    path = tiny.write_csv(tmp_path / "a.csv", rows + copies + contradicting)
    data = read(config(path), CLASSES)
    assert data.dropped == {"duplicates": 5, "copies with contradicting labels": 22}
    gone = {row["text"] for row in rows[5:15]}
    assert not gone & set(texts(data.train, data.test, data.probe))
    data = read(config(path, contradicting="first"), CLASSES)
    assert data.dropped == {"duplicates": 5, "copies with contradicting labels after the first": 12}
    truth = {row["text"]: data.labels.index(row["label"]) for row in rows}
    assert all(truth[row["text"]] == row["label"] for part in (data.train, data.test, data.probe) for row in part)
    assert not read(config(tiny.write_csv(tmp_path / "b.csv", rows)), CLASSES).dropped
    spaced = [*rows, {**rows[0], "label": rows[0]["label"] + " "}]
    assert read(config(tiny.write_csv(tmp_path / "c.csv", spaced)), CLASSES).dropped == {"duplicates": 1}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_without_a_label_are_never_a_class(tmp_path, rows, suffix):
    import pandas

    frame = pandas.DataFrame([*rows, {"text": "one more", "label": None, "film": "a"}, {**rows[0], "label": None}])
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    places = {"parquet": "rows 101, 102", "jsonl": "lines 101, 102"}.get(suffix, "lines 102, 103")
    with pytest.raises(UserError, match=rf"2 of 102 rows have no label in column 'label' \({places}\)"):
        read(config(path), CLASSES)
    data = read(config(path, drop_missing=True), CLASSES)
    assert data.labels == ("neg", "pos") and data.dropped == {"without a label": 2}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbers_are_text_too(tmp_path, suffix):
    import pandas

    frame = pandas.DataFrame({"text": range(1000, 1100), "label": ["a", "b"] * 50})
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        (frame.to_parquet if suffix == "parquet" else frame.to_csv)(path, index=False)
    data = read(config(path), CLASSES)
    assert sorted(texts(data.train, data.test, data.probe)) == [str(i) for i in range(1000, 1100)]
    lists = tmp_path / "lists.jsonl"
    lists.write_text('{"text": ["a"], "label": 1}\n{"text": true, "label": 0}\n')
    with pytest.raises(UserError, match="column 'text' holds bool, list, not text"):
        read(config(lists), CLASSES)


@pytest.mark.parametrize(("count", "probe"), [(70, 6), (400, 32), (1000, 64)])
def test_the_probe_is_a_tenth_of_few_texts(tmp_path, count, probe):
    data = read(config(tiny.write_csv(tmp_path / "a.csv", tiny.reviews(count)), probe=None), CLASSES)
    assert len(data.probe) == probe and len(data.test) == round(0.2 * count)
    assert len(data.train) == count - probe - len(data.test)


def test_lines_of_a_text_file_are_texts_for_a_language_model(tmp_path, rows):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(row["text"] for row in rows) + "\n")
    data = read(config(path), "causal-lm")
    assert sorted(texts(data.train, data.test, data.probe)) == sorted(row["text"] for row in rows)
    assert data.dropped == {"empty": 99}
    with pytest.raises(UserError, match="it has no column 'label'"):
        read(config(path), CLASSES)


def test_a_folder_is_read_as_a_data_set_of_the_hub(tmp_path, rows):
    (tmp_path / "set").mkdir()
    tiny.write_csv(tmp_path / "set" / "train.csv", rows)
    data = read(config(tmp_path / "set"), CLASSES)
    assert len(texts(data.train, data.test, data.probe)) == 100 and data.labels == ("neg", "pos")
    with pytest.raises(UserError, match="no column 'body'"):
        read(config(tmp_path / "set", text="body"), CLASSES)


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
        (
            {"label": 7},
            {"labels": ("a", "b")},
            r"100 rows have labels outside \['a', 'b'\]: '7' \(lines 2, 3, .* 95 more",
        ),
        ({"label": 0.5}, {}, "real numbers; labels are names or integers$"),
        ({"label": "only"}, {}, "fewer than two different labels"),
        ({"film": "one"}, {"group": "film"}, "only one value"),
        ({"text": "same"}, {"labels": ("neg", "pos")}, "nothing is left to train on"),
        ({}, {"probe": 80}, "data.probe is 80, and 80 texts are left"),
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
        ("data.doc", "a,b\n1,2\n", "must end in one of"),
        ("data.txt", "a,b\n1,2\n", "holds texts only, one per line; it has no column 'label'"),
        ("data.parquet", "not a parquet file", "not Parquet, or is damaged$"),
        ("data.jsonl", "{broken", "line 1: not JSON"),
        ("data.csv", "", "the first line must hold the names of the columns"),
        ("data.csv", "text,label\n", "there is no row in it, only the names of the columns"),
        ("data.jsonl", "", "there is no row in it"),
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
