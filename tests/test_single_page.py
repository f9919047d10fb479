import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.pages import MARKUP, array_of, column, followed, manifest_of, page  # noqa: F401
from helpers.tiny_runs import HEADS, LAYERS, STEPS, write_run, write_timeline

from inflection_fast import report
from inflection_fast.report import canvas, content
from inflection_fast.report.single_page import html, state
from inflection_fast.timeline import TimelineWriter
from inflection_fast.timeline.columns import Column


def test_the_numbers_of_the_timeline_stand_in_the_page_to_four_digits(page):
    text, timeline = page
    entropy = column(text, "entropy")
    mean, low, high = array_of(text, entropy["map"])
    assert mean.shape == (LAYERS, STEPS)
    np.testing.assert_allclose(mean, timeline.entropy.mean(2).T, rtol=1e-4)
    np.testing.assert_allclose(low, timeline.entropy.min(2).T, rtol=1e-4)
    np.testing.assert_allclose(high, timeline.entropy.max(2).T, rtol=1e-4)
    heads = array_of(text, entropy["parts"])
    assert heads.shape == (1, LAYERS, HEADS, STEPS)
    np.testing.assert_allclose(heads[0], np.moveaxis(timeline.entropy, 0, -1), rtol=1e-4)
    drift = array_of(text, column(text, "delta_cka")["map"])
    np.testing.assert_allclose(drift[0], timeline.delta_cka.T, rtol=1e-4)
    assert column(text, "delta_cka")["error"] == "delta_cka_se"


def test_what_was_measured_comes_before_what_the_step_took(page):
    quantities = [(entry["quantity"], entry["name"]) for entry in manifest_of(page[0])["columns"]]
    of_step = [place for place, (quantity, _) in enumerate(quantities) if quantity == "step"]
    assert of_step == list(range(of_step[0], len(quantities))) and len(of_step) > 1
    assert quantities[of_step[0]][1] == "loss" and quantities[0][1] == "entropy"


def test_a_missing_value_is_missing_and_a_column_without_any_is_named(page):
    text, timeline = page
    gradient = array_of(text, column(text, "parameter_grad")["map"])[0]
    np.testing.assert_array_equal(np.isnan(gradient), np.isnan(timeline.parameter_grad.T))
    assert np.isnan(gradient).any()
    assert "probe_entropy" not in [entry["name"] for entry in manifest_of(text)["columns"]]
    assert re.search("Without any value in this run: [^.]*attention entropy on the probe", text)


def test_a_step_that_was_not_measured_leaves_a_hole(tmp_path):
    with TimelineWriter(tmp_path, layers=["a"], heads=1, meta={}) as out:
        for step in (0, 10, 20, 50, 60):
            out.append(step, loss=1.0)
    text = html(state(followed(tmp_path)))
    assert column(text, "loss")["steps"] == [[0, 0], [10, 10], [20, 20], [50, 50], [60, 60]]


def test_a_quantity_of_a_user_is_drawn_with_its_own_words_and_axes(tmp_path):
    own = {
        "load": Column("1", ("layer", "expert"), "load of the experts", "Share of tokens.", "router"),
        "norm": Column("l2 norm", (), "norm of everything", "One number.", "mine", scale="log"),
        "hidden": Column("1", ("layer",), "inner", "For other programs.", "mine", drawn="none"),
    }
    meta = {
        "format": 4,
        "layers": ["a", "b"],
        "heads": 1,
        "columns": {name: column.as_dict() for name, column in own.items()},
    }
    load = np.ma.array(np.arange(6.0).reshape(2, 3), mask=[[0, 0, 0], [1, 1, 1]])
    found = followed(tmp_path)
    found._tail = SimpleNamespace(meta=meta, torn=False)
    for step in range(2):
        found._add(step, {"load": load + step, "norm": np.float64(step + 1), "hidden": np.zeros(2)})
    made = state(found)
    entries = {entry["name"]: entry for entry in made.manifest["columns"]}
    assert set(entries) == {"load", "norm"}
    assert entries["load"]["label"] == "Load of the experts" and entries["load"]["unit"] == ""
    assert entries["load"]["parts"]["axis"] == "expert" and entries["load"]["parts"]["shape"] == [1, 2, 3, 2]
    mean, low, high = made.arrays[entries["load"]["map"]["id"]]
    np.testing.assert_array_equal(mean, [[1, 2], [np.nan, np.nan]])
    np.testing.assert_array_equal(high, [[2, 3], [np.nan, np.nan]])
    np.testing.assert_array_equal(low, [[0, 1], [np.nan, np.nan]])
    assert entries["norm"]["log"] and "map" not in entries["norm"]


def test_the_first_lines_are_verdict_why_next(page):
    answer = re.search(r'<section id="answer".*?</section>', page[0], re.S)[0]
    assert re.findall(r"<dt>(\w+)</dt>", answer) == ["Verdict", "Why", "Next"]
    assert "The injected model beats all 4 baselines beyond the noise." in answer
    assert "inflection-fast run --config" in answer and "--seed 43" in answer


def test_nothing_is_loaded_from_elsewhere(page):
    text = page[0]
    assert not re.search(r"<(link|iframe|img)\b", text)
    assert not re.findall(r"\b(?:src|href)\s*=\s*[\"'](?!#)", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy


def test_markup_in_names_is_text(tmp_path):
    run = tmp_path / "x"
    write_run(run)
    stage = json.loads((run / "tune" / "stage.json").read_text())
    (run / "tune" / "stage.json").write_text(json.dumps(stage | {"label": MARKUP}))
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"versions": {MARKUP: MARKUP}}))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"\n# {MARKUP}\n")
    config = (run / "config.yaml").read_text().replace("models/tiny-bert", f"'models/{MARKUP}'")
    (run / "config.yaml").write_text(config)
    (run / "measure" / "timeline.arrows").unlink()
    with TimelineWriter(run / "measure", layers=[f"{MARKUP}.{i}" for i in range(LAYERS)], heads=1, meta={}) as out:
        out.append(0, loss=1.0)
    text = html(state(followed(run)))
    assert "onerror" in text and "<img" not in text
    assert text.count("</script>") == text.count("<script")
    assert manifest_of(text)["layers"][0] == f"{MARKUP}.0"


def test_the_same_run_gives_the_same_bytes(tmp_path):
    write_run(tmp_path / "x")
    assert html(state(followed(tmp_path / "x"))) == html(state(followed(tmp_path / "x")))


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "MAP_COLUMNS", (8, 8))
    monkeypatch.setattr(content, "HEAD_COLUMNS", (4, 4))
    with TimelineWriter(tmp_path, layers=list("abc"), heads=2, meta={}) as out:
        for step in range(100):
            entropy = np.ones((3, 2))
            entropy[1, 1] = 9.0 if step == 57 else 1.0
            out.append(step, entropy=entropy)
    text = html(state(followed(tmp_path)))
    entropy = column(text, "entropy")
    mean, low, high = array_of(text, entropy["map"])
    at = [first <= 57 <= last for first, last in entropy["steps"]].index(True)
    assert entropy["length"] == 16 and high[1, at] == 9 and low[1, at] == 1
    assert mean[1, at] == pytest.approx((31 + 9) / 32, rel=1e-3)
    assert (high == 9).sum() == 1
    assert array_of(text, entropy["parts"])[2, 1, 1].max() == 9


def test_a_folder_of_a_monitor_gets_the_page_alone(tmp_path):
    write_timeline(tmp_path / "a")
    path = report.write(tmp_path / "a")
    assert path == tmp_path / "a" / "report" / "index.html"
    assert [found.name for found in path.parent.iterdir()] == ["index.html"]
    assert "inflection-fast plan" in path.read_text()


def test_a_run_gets_both_pages_and_a_second_report_replaces_both(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "save", lambda drawn, path: path.touch())
    write_run(tmp_path / "x")
    report.write(tmp_path / "x")
    page = tmp_path / "x" / "report" / "index.html"
    page.write_text("old")
    assert report.write(tmp_path / "x") == page.with_suffix(".md")
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_that_is_no_run_is_refused(tmp_path, prepare):
    prepare(tmp_path / "x")
    with pytest.raises(ValueError, match="is not a run folder"):
        report.write(tmp_path / "x")


def test_a_run_without_a_step_says_so(tmp_path):
    write_timeline(tmp_path, steps=0)
    text = html(state(followed(tmp_path)))
    assert "Nothing has been measured yet." in text and "has no measured step yet" in text
    assert manifest_of(text)["columns"] == []
