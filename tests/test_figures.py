import re

import matplotlib
import numpy as np
import pytest
from helpers.tiny_runs import HEADS, LAYERS, STEPS, write_run, write_timeline

from inflection_fast import report
from inflection_fast.decide import Plan
from inflection_fast.report import canvas
from inflection_fast.timeline import Timeline

MAPPED = ("entropy", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "delta_cka")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def timeline(run):
    return Timeline.load(run / "measure")


@pytest.fixture
def axis():
    return canvas.figure(4, 3).add_subplot()


def mesh_of(ax):
    (mesh,) = [part for part in ax.get_children() if isinstance(part, matplotlib.collections.QuadMesh)]
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


def test_a_map_is_drawn_on_the_axis_that_is_given_with_the_numbers_of_the_timeline(timeline, axis):
    assert report.signal_map(timeline, "entropy", axis, chosen=[3]) is axis
    np.testing.assert_allclose(mesh_of(axis), timeline.entropy.mean(2).T)
    assert axis.get_title(loc="left") == "Attention entropy" and axis.get_xlabel() == "optimizer step"


def test_layers_without_a_value_stay_empty(timeline, axis):
    report.signal_map(timeline, "parameter_grad", axis)
    np.testing.assert_array_equal(np.isnan(mesh_of(axis)), np.isnan(timeline.parameter_grad.T))


def test_lines_follow_the_layers_that_were_asked_for(timeline, axis):
    report.signal_lines(timeline, "delta_cka", axis, layers=[0, 11])
    lines = axis.get_lines()
    np.testing.assert_allclose(lines[1].get_ydata(), timeline.delta_cka[:, 11])
    assert [line.get_label() for line in lines] == ["layer 0", "layer 11"]
    band = axis.collections[1].get_paths()[0].vertices
    last = timeline.delta_cka[-1, 11] + timeline.delta_cka_se[-1, 11]
    assert band[:, 1].max() == pytest.approx(last)


def test_heads_of_a_layer(timeline, axis):
    report.head_map(timeline, "sink", 5, axis)
    np.testing.assert_allclose(mesh_of(axis), timeline.sink[:, 5].T)
    assert mesh_of(axis).shape == (HEADS, STEPS)


def test_scores_and_profile_of_a_plan(run, axis):
    plan = Plan.load(run / "plan.json")
    report.score_line(plan, axis)
    np.testing.assert_allclose(axis.get_lines()[0].get_ydata(), plan.scores)
    drawn = report.score_line(plan, name="entropy")
    np.testing.assert_allclose(drawn.get_lines()[0].get_ydata(), plan.profile["entropy"])


def test_the_colours_of_a_difference_are_even_on_both_sides_of_zero(axis):
    report.difference_map(np.array([[1.0, -3.0], [np.nan, 0.0]]), np.array([0, 10]), axis)
    mesh = next(part for part in axis.get_children() if isinstance(part, matplotlib.collections.QuadMesh))
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-3, 3)
    np.testing.assert_array_equal(mesh_of(axis), [[1, np.nan], [-3, 0]])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda t: report.signal_map(t, "entropi"), "name: expected one of"),
        (lambda t: report.signal_map(t, "loss"), "name: expected a column by layer, and loss is one number a step"),
        (lambda t: report.signal_map(t, "probe_entropy"), "probe_entropy has no value in this timeline"),
        (lambda t: report.signal_lines(t, "entropy", layers=[LAYERS]), "layers: expected numbers from 0 to 11, got"),
        (lambda t: report.head_map(t, "delta_cka", 0), "name: expected a column by layer and another axis"),
        (lambda t: report.head_map(t, "sink", -1), "layer: expected a number from 0 to 11, got -1"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(timeline, draw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(timeline)


def test_a_picture_is_svg_and_pdf_with_text_as_text_and_the_same_bytes_every_time(run, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ax = report.score_line(Plan.load(run / "plan.json"))
        canvas.save_vectors(ax.figure, tmp_path / name / "ski")
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"ski.svg", "ski.pdf"}
    assert written[0]["ski.pdf"].startswith(b"%PDF") and b"<text" in written[0]["ski.svg"]


def test_every_chart_of_the_page_is_written(run, monkeypatch):
    monkeypatch.setattr(canvas, "save", lambda drawn, path: path.touch())
    monkeypatch.setattr(canvas, "save_vectors", lambda drawn, path: path.touch())
    folder = report.write(run, figures=True).parent / "figures"
    wanted = {f"by_layer_{name}" for name in MAPPED}
    wanted |= {"over_steps_loss", "over_steps_entropy", "ski", "profile", "stages", "heads", "drift"}
    assert wanted <= {path.name for path in folder.iterdir()}
    report.write(run)
    assert not folder.exists()


def test_a_folder_of_a_monitor_with_one_step_has_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "save_vectors", lambda drawn, path: path.touch())
    write_timeline(tmp_path, steps=1, layers=2, heads=1)
    folder = report.write(tmp_path, figures=True).parent / "figures"
    assert {"by_layer_entropy", "over_steps_loss"} <= {path.name for path in folder.iterdir()}
