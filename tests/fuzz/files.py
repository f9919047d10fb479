"""Damaged files and wrong settings: each is read as what it says, or refused by an error of the promised kind."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import gzip
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from inflection_fast.alerts import AlertConfig
from inflection_fast.decide import Plan, SelectConfig
from inflection_fast.records import DataRecord, Metrics, RunRecord, StageRecord
from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS, Timeline, TimelineWriter

from .draw import Draw

VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**40, -(2**70), 0.5, -0.0, 1e308, "", "a", "0", "-1", "\ud800", "ü\n"),
    *([], [0], [1, 0], [None], ["a", "b"], [[0]], {}, {"0": 1}, {"a": []}, {"layers": ["x"]}),
)
JSON_TEXT = ("NaN", "Infinity", "1e999", "-", "[", "}", '"', "\\u0000", "0x1", "9" * 400, "[" * 3000)


@functools.cache
def folder() -> Path:
    """A folder of this process, removed when it ends."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def damaged(draw: Draw, data: bytes) -> bytes:
    """With bits flipped, a part cut out, doubled, zeroed or moved, or an end that is missing."""
    for _ in range(draw.one((1, 1, 1, 2, 5))):
        if not data:
            return data
        start = draw.whole(0, len(data) - 1)
        end = min(len(data), start + draw.one((1, 1, 2, 4, 8, 64, 700)))
        kind = draw.one(("flip", "flip", "cut", "double", "zero", "random", "end", "number"))
        if kind == "flip":
            changed = bytes([data[start] ^ (1 << draw.whole(0, 7))])
            data = data[:start] + changed + data[start + 1 :]
        elif kind == "end":
            data = data[:start]
        elif kind == "number":
            word = draw.one((0, 1, -1, 2**31 - 1, -(2**31), 255)).to_bytes(4, "little", signed=True)
            data = data[:start] + word + data[start + 4 :]
        else:
            part = data[start:end]
            put = {"cut": b"", "double": part * 2, "zero": bytes(len(part)),
                   "random": bytes(draw.whole(0, 255) for _ in part)}[kind]  # fmt: skip
            data = data[:start] + put + data[end:]
    return data


def changed(draw: Draw, content):
    """JSON with a value somewhere replaced, removed, renamed or moved."""
    content = copy.deepcopy(content)
    for _ in range(draw.one((1, 1, 2, 4))):
        node = content
        for _ in range(draw.whole(0, 4)):
            inner = [key for key in (node if isinstance(node, dict) else range(len(node)))
                     if isinstance(node[key], dict | list) and node[key]]  # fmt: skip
            if not inner:
                break
            node = node[draw.one(inner)]
        if not node:
            continue
        key = draw.one(list(node) if isinstance(node, dict) else range(len(node)))
        kind = draw.one(("replace", "replace", "remove", "add", "copy"))
        if kind == "replace":
            node[key] = copy.deepcopy(draw.one(VALUES))
        elif kind == "remove":
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[draw.one(("x", "", "0", "-1", "layers", "1e3", "²"))] = copy.deepcopy(draw.one(VALUES))
        elif isinstance(node, list):
            node.insert(key, copy.deepcopy(draw.one((*VALUES, node[key]))))
        else:
            node[draw.one(list(node))] = copy.deepcopy(node[key])
    return content


def json_bytes(draw: Draw, content) -> bytes:
    """Of a changed value, or of the text with something put into it, or damaged bytes."""
    text = json.dumps(changed(draw, content) if draw.chance(0.7) else content)
    if draw.chance(0.2):
        place = draw.whole(0, len(text))
        text = text[:place] + draw.one(JSON_TEXT) + text[place:]
    data = text.encode("utf-8", "surrogatepass")
    return damaged(draw, data) if draw.chance(0.3) else data


# ---- timelines -------------------------------------------------------------------------------------------------------


@functools.cache
def timelines() -> tuple[bytes, ...]:
    """Whole files: with and without rows, of this and of an older format."""
    found = [(Path(__file__).parents[1] / "timelines" / "format3.arrows").read_bytes()]
    for steps in ((0, 10, 20), ()):
        place = folder() / f"timeline{len(steps)}"
        meta = {"model": {"class": "BertModel", "model_type": "bert", "parameters": 10}, "config": {"every": 10}}
        with TimelineWriter(place, layers=["a.0", "a.1", "a.2"], heads=2, meta=meta) as out:
            for step in steps:
                rng = np.random.default_rng(step)
                out.append(
                    step,
                    **{name: rng.normal(size=(3, 2)) for name in HEAD_SIGNALS},
                    **{name: rng.normal(size=3) for name in LAYER_SIGNALS},
                    **{name: rng.random() for name in STEP_SIGNALS},
                )
        found.append((place / "timeline.arrows").read_bytes())
    return tuple(found)


@functools.cache
def parsed_timelines():
    """Schemas with their metadata, and what follows them."""
    import pyarrow as pa

    found = []
    for data in timelines():
        source = pa.BufferReader(data)
        schema = pa.ipc.read_schema(pa.ipc.read_message(source))
        found.append((schema, json.loads(schema.metadata[b"inflection_fast"]), data[source.tell() :]))
    return found


def timeline(draw: Draw) -> None:
    """`Timeline.load`: a timeline whose parts fit each other, or ValueError."""
    if draw.chance(0.4):
        schema, meta, rest = draw.one(parsed_timelines())
        text = json_bytes(draw, meta)
        data = schema.with_metadata({b"inflection_fast": text}).serialize().to_pybytes() + rest
    else:
        data = damaged(draw, draw.one(timelines()))
    path = folder() / "damaged.arrows"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = Timeline.load(path)
        except ValueError as error:
            assert str(path) in str(error), error
            return
    layers = len(loaded.layers)
    assert layers and (np.diff(loaded.steps) > 0).all()
    for name, column in loaded.columns.items():
        values = getattr(loaded, name)
        assert values.dtype == np.float64 and len(values) == len(loaded.steps)
        assert "layer" not in column.axes or values.shape[1] == layers
        assert np.shape(loaded.masked(name)) == values.shape


# ---- plans and records -----------------------------------------------------------------------------------------------


@functools.cache
def plan_document() -> dict:
    """A plan as it is saved."""
    path = folder() / "plan.json"
    count = 5
    Plan(
        layers=(1, 3), summary="Two layers.", reasons={1: "steep", 3: "low"}, scores=np.linspace(0, 1, count),
        profile={"entropy": [1.0, 0.5, math.nan, 0.2, 0.1]}, config={"method": "greedy", "window": 1},
        model={"model_type": "bert", "class": "BertModel", "named": False, "layers": list("abcde")},
        found={"entropy minimum": [3]}, ranks={1: 4}, heads={3: (0, 2)},
        actions=({"intervention": "unfreeze", "words": "a"},),
    ).save(path)  # fmt: skip
    return json.loads(path.read_text())


def plan(draw: Draw) -> None:
    """`Plan.load`: a plan that is saved and loaded as it is, or ValueError."""
    path, again = folder() / "damaged.json", folder() / "again.json"
    path.write_bytes(json_bytes(draw, plan_document()))
    try:
        loaded = Plan.load(path)
    except ValueError as error:
        assert str(path) in str(error), error
        return
    loaded.save(again)
    other = Plan.load(again)
    for name in ("layers", "reasons", "ranks", "heads", "actions"):
        assert getattr(loaded, name) == getattr(other, name), name
    np.testing.assert_array_equal(loaded.scores, other.scores)


@functools.cache
def record_documents() -> list[tuple[type, dict]]:
    """`stage.json` and `run.json`."""
    data = DataRecord(9, 3, 2, ("neg", "pos"), {"duplicates": 1})
    metrics = Metrics(3, 0.5, accuracy=2 / 3, correct=2, right="110")
    stage = StageRecord(
        "measure", "shallow", "sequence-classification", data, 0.6, metrics, 10, 20, (0, 1), 60, 1.5, 0.2
    )
    run = RunRecord(finished=("source", "measure"), versions={"torch": "2"}, seed=3)
    found = []
    for record in (stage, run):
        path = folder() / "record.json"
        record.save(path)
        found.append((type(record), json.loads(path.read_text())))
    return found


def record(draw: Draw) -> None:
    """Records of a run folder: one that is saved and loaded as it is, or ValueError that names the file."""
    kind, document = draw.one(record_documents())
    path, again = folder() / "damaged.json", folder() / "again.json"
    path.write_bytes(json_bytes(draw, document))
    try:
        loaded = kind.load(path)
    except ValueError as error:
        assert str(path) in str(error), error
        return
    loaded.save(again)
    assert kind.load(again) == loaded


# ---- settings --------------------------------------------------------------------------------------------------------


def settings(draw: Draw) -> None:
    """Configurations: one that holds what was given, or TypeError or ValueError that names the argument."""
    from inflection_fast import MonitorConfig

    kind = draw.one((MonitorConfig, SelectConfig, AlertConfig))
    names = [item.name for item in dataclasses.fields(kind)]
    some = (*VALUES, math.nan, math.inf, object(), (1, 2), "greedy", "tokens")
    chosen = draw.random.sample(names, draw.one((1, 1, 1, 2)))
    given = {name: copy.deepcopy(draw.one(some)) for name in chosen}
    try:
        kind(**given)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in given), (given, error)


# ---- data ------------------------------------------------------------------------------------------------------------

ROWS = [(f"a text of {i} words, and more", ("pos", "neg")[i % 2], i // 3) for i in range(12)]
TABLE = ("text", "label", "group")


@functools.cache
def data_files() -> dict[str, bytes]:
    """The same rows in every format."""
    import io

    import pyarrow as pa
    import pyarrow.parquet

    dicts = [dict(zip(TABLE, row, strict=True)) for row in ROWS]
    csv = "text,label,group\n" + "".join(f'"{t}",{label},{g}\n' for t, label, g in ROWS)
    parquet = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(dicts), parquet)
    lines = "\n".join(map(json.dumps, dicts))
    return {
        "csv": csv.encode(),
        "tsv": csv.replace(",", "\t").encode(),
        "jsonl": lines.encode(),
        "json": json.dumps(dicts).encode(),
        "field.json": json.dumps({"version": 1, "data": dicts}).encode(),
        "parquet": parquet.getvalue(),
        "csv.gz": gzip.compress(csv.encode(), mtime=0),
        "txt": "\n".join(text for text, *_ in ROWS).encode(),
        "jsonl.gz": gzip.compress(lines.encode(), mtime=0),
        "utf16.csv": csv.encode("utf-16"),
    }


def data(draw: Draw) -> None:
    """`load_rows`: columns of equal length with texts in them, or UserError."""
    from inflection_fast.run.config import DataConfig
    from inflection_fast.run.errors import UserError
    from inflection_fast.run.files import load_rows

    name, whole = draw.one(list(data_files().items()))
    if name.endswith(("json", "jsonl")) and draw.chance(0.4):
        whole = json_bytes(draw, json.loads(data_files()["json"]))
        if name == "jsonl":
            whole = whole.strip(b"[]").replace(b"}, {", b"}\n{")
    elif draw.chance(0.95):
        if name.endswith(".gz") and draw.chance(0.5):
            whole = gzip.compress(damaged(draw, gzip.decompress(whole)))
        else:
            whole = damaged(draw, whole)
    path = folder() / f"data.{name}"
    path.write_bytes(whole)
    wanted = (
        ["text"] if name == "txt" else draw.one((["text"], ["text", "label"], ["text", "label", "group"], ["other"]))
    )
    options = {}
    if draw.chance(0.2):
        options["delimiter"] = draw.one((",", ";", "\t", "|", '"', "\n", "a"))
    if draw.chance(0.1):
        options["encoding"] = draw.one(("utf-8", "latin-1", "utf-16", "ascii"))
    if draw.chance(0.1):
        options["quoting"] = draw.one(("standard", "none"))
    try:
        rows = load_rows(DataConfig(str(path), **options), wanted)
    except UserError as error:
        assert path.name in str(error), error
        return
    assert len(rows) and set(rows.columns) == set(wanted), (len(rows), list(rows.columns))
    assert all(len(values) == len(rows) for values in rows.columns.values())


def rows(draw: Draw) -> None:
    """`read`: a split data set, or UserError, of a table with awkward labels and texts."""
    import datasets

    from inflection_fast.run.config import DataConfig
    from inflection_fast.run.data import read
    from inflection_fast.run.errors import UserError

    datasets.disable_progress_bars()
    texts = ("a text", "another", "", " ", "A TEXT!", None, 3, "x" * 1000, "ü", "\u2028", "third one", "fourth")
    labels = ("pos", "neg", "pos ", "Pos", "", None, 0, 1, -1, 1.0, True, "0")
    few = draw.random.sample(labels, draw.whole(1, 4))
    many = draw.whole(0, 40)
    content = [{"text": draw.one(texts) if draw.chance(0.3) else f"text {i}", "label": draw.one(few), "group": i // 4}
               for i in range(many)]  # fmt: skip
    path = folder() / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, content)))
    options = {"probe": draw.one((None, None, 0, 3, 100)), "group": draw.one((None, "group")),
               "drop_missing": draw.chance(0.4), "deduplicate": draw.chance(0.7),
               "contradicting": draw.one(("drop", "first")), "test_share": draw.one((0.01, 0.2, 0.9))}  # fmt: skip
    task = draw.one(("sequence-classification", "causal-lm"))
    try:
        found = read(DataConfig(str(path), **options), task)
    except UserError:
        return
    parts = (found.train, found.test, found.probe)
    assert len(found.train) and len(found.test) and sum(map(len, parts)) <= many
    assert all(isinstance(text, str) and text.strip() for part in parts for text in part["text"])
    if found.labels:
        assert all(0 <= label < len(found.labels) for part in parts for label in part["label"])
