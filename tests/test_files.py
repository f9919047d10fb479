import bz2
import gzip
import json
import lzma
import zipfile

import pytest

pytest.importorskip("datasets")

from inflection_fast.run.config import DataConfig
from inflection_fast.run.errors import UserError
from inflection_fast.run.files import load_rows

WANTED = ["text", "label"]


def load(path, *wanted, **settings):
    return load_rows(DataConfig(str(path), **settings), list(wanted) or WANTED)


def written(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def refused(path, message, *wanted, **settings):
    with pytest.raises(UserError, match=message) as caught:
        load(path, *wanted, **settings)
    assert "\n" not in str(caught.value)


def test_fields_are_what_is_written(tmp_path):
    path = written(
        tmp_path / "a.csv",
        'label,text\r\n1,"one, two"\r\n\r\n0,"three\nfour ""five"""\r\n1,007\r\n0,1e3\r\n1,null\r\n0,  spaces \r\n',
    )
    rows = load(path)
    assert rows.columns["text"] == ["one, two", 'three\nfour "five"', "007", "1e3", "null", "  spaces "]
    assert rows.columns["label"] == ["1", "0", "1", "0", "1", "0"]
    assert (rows.unit, rows.places) == ("line", [2, 4, 6, 7, 8, 9])
    assert rows.where([1, 2]) == "lines 4, 6" and rows.where([5]) == "line 9"
    assert rows.where(list(range(6))) == "lines 2, 4, 6, 7, 8 and 1 more"


def test_a_column_that_begins_with_many_numbers_is_text(tmp_path):
    texts = [str(i) for i in range(30000)] + ["and a word"]
    path = written(tmp_path / "a.csv", "text,label\n" + "".join(f"{text},1\n" for text in texts))
    assert load(path).columns["text"] == texts


def test_a_field_may_be_long(tmp_path):
    path = written(tmp_path / "a.csv", "text,label\n" + "x" * 300000 + ",1\n")
    assert len(load(path).columns["text"][0]) == 300000


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_row_of_another_length_is_refused_with_its_line(tmp_path, name):
    tab = "\t" if name == "a.tsv" else ","
    rows = [["text", "label"], ["good", "1"], ["bad", "but short", "0"], ["fine", "1"], ["lone"]]
    path = written(tmp_path / name, "".join(tab.join(row) + "\n" for row in rows))
    refused(
        path, r"a\..sv, line 3: 3 fields, and the header has 2 \(text, label\) \(1 more rows differ from the header\)"
    )
    every = written(tmp_path / name, f"text{tab}label\n" + "".join(f"{i}{tab}text{i}{tab}1\n" for i in range(5)))
    refused(every, "line 2: 3 fields, .*; so have all rows: name the column that is missing in the header")


def test_a_path_is_one_file_whatever_is_in_its_name(tmp_path):
    for name in ("a[1].csv", "b*.csv", "a::b.csv", "c?.csv", "x=1.csv"):
        written(tmp_path / name, f"text,label\n{name},1\n")
    written(tmp_path / "bad.csv", "text,label\nother,0\n")
    for name in ("a[1].csv", "b*.csv", "a::b.csv", "c?.csv", "x=1.csv"):
        assert load(tmp_path / name).columns["text"] == [name]
    refused(tmp_path / "z*.csv", "there is no such file")
    (tmp_path / "label=7").mkdir()
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "label=7" / "a.parquet")
    refused(tmp_path / "label=7" / "a.parquet", "no column 'label'; it has text")


def test_home_is_where_the_tilde_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "a.csv", "text,label\ngood,1\n")
    assert load("~/a.csv").columns["text"] == ["good"]
    refused("~/b.csv", "there is no such file")


@pytest.mark.parametrize("pack", [gzip.open, bz2.open, lzma.open, "zst", "zip"])
def test_compressed_files_are_read_and_damage_is_said(tmp_path, pack):
    content = b"text,label\n" + b"".join(b"text %d,1\n" % i for i in range(5000))
    path = tmp_path / f"a.csv.{'zst zip gz bz2 xz'.split()[['zst', 'zip', gzip.open, bz2.open, lzma.open].index(pack)]}"
    if pack == "zst":
        import pyarrow

        with pyarrow.output_stream(path, compression="zstd") as file:
            file.write(content)
    elif pack == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.csv", content)
    else:
        with pack(path, "wb") as file:
            file.write(content)
    assert load(path).columns["text"][4999] == "text 4999"
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, "damaged")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "looks like UTF-16: write `encoding: utf-16`"),
        ("utf-16-le", "looks like UTF-16: write `encoding: utf-16-le`"),
        ("utf-16-be", "looks like UTF-16: write `encoding: utf-16-be`"),
        ("latin-1", "line 2: .* looks like Latin-1: write `encoding: latin-1`"),
        ("cp1252", "line 2: .* looks like Windows-1252: write `encoding: cp1252`"),
    ],
)
def test_another_encoding_is_recognised_and_named(tmp_path, name, encoding, message):
    text = "naïve café" + (" “quoted”" if encoding == "cp1252" else "")
    content = {
        "a.csv": f"text,label\n{text},1\n",
        "a.jsonl": f'{{"text": "a", "label": 1}}\n{{"text": "{text}", "label": 0}}\n',
        "a.txt": f"a\n{text}\n",
    }[name]
    wanted = ["text"] if name == "a.txt" else WANTED
    path = written(tmp_path / name, content, encoding)
    refused(path, message, *wanted)
    assert load(path, *wanted, encoding=encoding).columns["text"][-1] == text


def test_the_named_encoding_is_the_one_that_is_used(tmp_path):
    path = written(tmp_path / "a.csv", "text,label\nnaïve,1\n", "latin-1")
    refused(path, "not utf-16: name another `encoding:`", encoding="utf-16")
    marked = written(tmp_path / "b.csv", "text,label\nnaïve,1\n", "utf-8-sig")
    assert load(marked).columns["text"] == ["naïve"]


@pytest.mark.parametrize(("delimiter", "words"), [(";", "semicolons"), ("|", "vertical bars"), ("\t", "tabs")])
def test_another_delimiter_is_recognised_and_named(tmp_path, delimiter, words):
    path = written(tmp_path / "a.csv", f"text{delimiter}label\none, two{delimiter}1\n")
    escaped = {"|": r"\|", "\t": r"\\t"}.get(delimiter, delimiter)
    refused(path, f'names are separated by {words}: write `delimiter: "{escaped}"`')
    assert load(path, delimiter=delimiter).columns["text"] == ["one, two"]


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    refused(written(tmp_path / "a.csv", "text,label,text\na,1,b\n"), "column 'text' occurs 2 times")


def test_quotation_marks_that_are_text(tmp_path):
    glue = 'text\tlabel\n"stray\t1\nhe said "so"\t0\nlast" one\t1\n'
    path = written(tmp_path / "a.tsv", glue)
    refused(path, "line 2: a quotation mark opens a field .*: write `quoting: none`")
    rows = load(path, quoting="none")
    assert rows.columns["text"] == ['"stray', 'he said "so"', 'last" one']
    # Two strays that happen to close each other would swallow a row: refused unless it is said which is meant.
    path = written(tmp_path / "b.tsv", 'text\tlabel\n"one\t1\ntwo"\t0\nthree\t1\n')
    refused(path, "line 2: a quotation mark joins this line with the next one")
    assert load(path, quoting="none").columns["text"] == ['"one', 'two"', "three"]
    assert load(path, quoting="standard").columns["text"] == ["one\t1\ntwo", "three"]
    open_end = written(tmp_path / "c.csv", 'text,label\na,1\n"b,1\nc,1\n')
    refused(open_end, "line 3: a quotation mark opens a field and none closes it")


ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 0, "more": [1]}, {"text": "c"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
    ],
)
def test_json_in_every_layout(tmp_path, name, content):
    rows = load(written(tmp_path / name, content))
    assert rows.columns == {"text": ["a", "b", "c"], "label": [1, 0, None]}


def test_json_lists_under_several_keys_are_chosen_by_name(tmp_path):
    path = written(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    refused(path, r"several lists of objects: name one of \['train', 'test'\] as `field:`")
    assert load(path, field="test").columns["text"] == ["a"]
    refused(path, "'dev' is not a list of objects", field="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', "line 2: expected an object with the columns, got list"),
        ("a.json", '[{"text": "a", "label": 1},\n{"text": "b" "label"}]', "line 2: not JSON"),
        ("a.json", '{"text": {"0": "a"}}', "must hold a list of objects; it holds one object with text"),
        ("a.json", "3", "must hold a list of objects"),
        ("a.jsonl", '{"body": "a"}\n', "no column 'text', 'label'; it has body"),
    ],
)
def test_json_that_holds_no_rows_is_refused(tmp_path, name, content, message):
    refused(written(tmp_path / name, content), message)


def test_a_text_file_is_one_text_per_line(tmp_path):
    path = written(tmp_path / "a.txt", "one\r\n\r\n two \nthree")
    rows = load(path, "text")
    assert rows.columns["text"] == ["one", "", " two ", "three"] and list(rows.places) == [1, 2, 3, 4]
    refused(path, "one per line; it has no column 'label'")


def test_names_of_a_parquet_label_are_known(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(path)
    rows = load(path)
    assert rows.names == {"label": ("no", "yes")} and rows.columns["label"] == [1, 0] and rows.unit == "row"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_nested_too_deep_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("[" * 10**5)
    refused(path, "nested too deep")


def test_a_parquet_file_of_a_type_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    import pyarrow.parquet

    def fail(path):
        raise pyarrow.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    refused(path, "not Parquet, or is damaged")
