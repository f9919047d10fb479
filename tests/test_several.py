import json

import numpy as np
import pytest
from helpers.pages import array_of, column, manifest_of
from helpers.tiny_runs import LAYERS, STEPS, write_run, write_stage, write_timeline

from inflection_fast import cli, report
from inflection_fast.report.content import Content
from inflection_fast.report.several import groups_of, interval
from inflection_fast.timeline import Timeline, TimelineWriter


def runs_of(folder, *, seeds=(1, 2), last=(0.80, 0.82), shift=0.0, name="a", extra=""):
    """Runs that differ in the seed, with entropies that differ by their number."""
    paths = []
    for i, (seed, accuracy) in enumerate(zip(seeds, last, strict=True)):
        run = folder / f"{name}{i}"
        write_run(run)
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(facts | {"seed": seed}))
        config = (run / "config.yaml").read_text().replace("output: runs/demo", f"output: {run}\nseed: {seed}")
        (run / "config.yaml").write_text(config + extra)
        write_stage(run, "tune", accuracy, layers=[3], label="LoRA on the planned layers")
        (run / "measure" / "timeline.arrows").unlink()
        with TimelineWriter(run / "measure", layers=list("abcdefghijkl"), heads=1, meta={}) as out:
            for step in range(0, 40, 10):
                out.append(step, entropy=np.full((12, 1), 1 + i + shift), loss=1.0 / (1 + step + i))
        paths.append(run)
    return paths


def test_an_interval_is_student_t_over_the_runs():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).standard_normal((5, 3))
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 4, loc=values.mean(0), scale=stats.sem(values, axis=0))
    np.testing.assert_allclose(mean, (low + high) / 2)
    np.testing.assert_allclose(half, (high - low) / 2, rtol=4e-4)  # quantiles of three decimals
    assert np.isnan(interval(values[:1])[1]).all()


def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
    paths = runs_of(tmp_path) + runs_of(tmp_path, name="b", seeds=(7,), last=(0.7,), extra="measure: {unfreeze: 3}\n")
    runs = [Content(path) for path in paths]
    for run in runs:
        run.update()
    groups = groups_of(runs)
    assert [group.name for group in groups] == ["a0 and 1 more", "b0"]
    assert [len(group.runs) for group in groups] == [2, 1]


def test_the_page_overlays_groups_and_maps_their_differences(tmp_path):
    one = runs_of(tmp_path)
    two = runs_of(tmp_path, name="b", last=(0.60, 0.61), shift=0.5, extra="measure: {unfreeze: 3}\n")
    text = report.write_several([*one, *two], tmp_path / "out").read_text()
    entropy = column(text, "entropy")
    mean, half = array_of(text, entropy["lines"][0])
    np.testing.assert_allclose(mean, 1.5)
    np.testing.assert_allclose(half, 12.706 * 0.5, rtol=1e-3)  # two runs that are 1 apart
    (difference,) = entropy["differences"]
    assert difference["group"] == 1 and difference["steps"] == [[step, step] for step in (0, 10, 20, 30)]
    values, errors = array_of(text, difference)
    assert values.shape == (12, 4)
    np.testing.assert_allclose(values, 0.5)
    np.testing.assert_allclose(errors, np.hypot(12.706 / 2, 12.706 / 2), rtol=1e-3)
    assert "a0 and 1 more is better than b0 and 1 more by 20.5 ±" in text
    assert "<code>measure.unfreeze</code>" in text


def test_one_run_of_each_cannot_tell(tmp_path):
    write_timeline(tmp_path / "x", drop=("loss",))
    write_timeline(tmp_path / "y")
    text = report.write_several([tmp_path / "x", tmp_path / "y"]).read_text()
    assert (tmp_path / "comparison" / "index.html").is_file()
    assert "cannot tell a difference from chance" in text
    assert [line["group"] for line in column(text, "loss")["lines"]] == [1]
    values, errors = array_of(text, column(text, "delta_cka")["differences"][0])
    assert values.shape == (LAYERS, STEPS) and np.isnan(errors).all()
    np.testing.assert_array_equal(values, 0)
    gradient, _ = array_of(text, column(text, "parameter_grad")["differences"][0])
    missing = np.isnan(Timeline.load(tmp_path / "x").parameter_grad.T)
    np.testing.assert_array_equal(np.isnan(gradient), missing)


def test_only_steps_that_both_have_are_compared(tmp_path):
    for name, steps in (("x", (0, 10, 20)), ("y", (10, 15, 20)), ("z", (1, 2))):
        with TimelineWriter(tmp_path / name, layers=["a"], heads=1, meta={}) as out:
            for step in steps:
                out.append(step, entropy=np.full((1, 1), step))
    text = report.write_several([tmp_path / name for name in "xyz"]).read_text()
    (difference,) = column(text, "entropy")["differences"]
    assert difference["steps"] == [[10, 10], [20, 20]]


def test_runs_of_other_layers_have_no_maps(tmp_path):
    write_timeline(tmp_path / "x", layers=4)
    write_timeline(tmp_path / "y", layers=6)
    text = report.write_several([tmp_path / "x", tmp_path / "y"]).read_text()
    assert not any("differences" in entry for entry in manifest_of(text)["columns"])
    assert "different numbers of layers" in text


def test_what_cannot_be_compared_is_a_sentence(tmp_path, capsys):
    write_timeline(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    for folders, message in (
        (["x", "x"], "is given twice"),
        (["x", "empty"], "is not a run folder: it holds no timeline"),
        (["x", "none"], "is not a run folder: there is no such folder"),
    ):
        assert cli.main(["report", *(str(tmp_path / folder) for folder in folders)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "x"), "--out", "y"]) == 2
    assert "--out: expected several runs" in capsys.readouterr().err
