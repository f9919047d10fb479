import shutil
import warnings

import numpy as np
import pytest
from helpers.tiny_runs import LAYERS, STEPS, write_run

from inflection_fast.decide import SelectConfig, select
from inflection_fast.report import canvas, pictures, profile
from inflection_fast.report import folder as run_files
from inflection_fast.report.charts import index_chart, profile_chart
from inflection_fast.report.heatmap import heat_map
from inflection_fast.timeline import TimelineWriter

ALL = ("entropy", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "delta_cka")  # of tiny_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    return run, write_run(run)


@pytest.fixture
def coarse(monkeypatch):
    """Few pixels, where the test only asks whether there can be any."""
    monkeypatch.setattr(canvas, "DPI", 40)


def marked(ax):
    """Positions of the points in the colour of the chosen layers."""
    points = [line.get_xydata() for line in ax.get_lines() if line.get_color() == canvas.CHOSEN]
    return np.concatenate(points) if points else np.empty((0, 2))


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []


@pytest.fixture(scope="module")
def figures(finished):
    """The figures of the finished run by file name; their files lie in its folder."""
    drawn, save = {}, canvas.save

    def keep(figure, path):
        drawn[path.name] = figure
        save(figure, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "save", keep)
        pictures.draw(run_files.read(finished[0]), finished[0])
    return drawn


def test_numbers_that_hardly_differ_are_labelled_with_themselves(coarse, tmp_path):
    drawn = canvas.figure(4, 3)
    left, right = drawn.subplots(1, 2)
    left.plot([2.62137, 2.62141])
    drawn.colorbar(right.pcolormesh(2.6 + 1e-6 * np.arange(4.0).reshape(2, 2)), ax=right)
    canvas.save(drawn, tmp_path / "flat.png")
    for ax in (left, drawn.axes[-1]):
        assert [float(label.get_text()) for label in ax.get_yticklabels()] == pytest.approx(ax.get_yticks())


def test_the_marked_layers_are_the_plans(finished, figures):
    layers = list(finished[1].layers)
    assert marked(figures["ski.png"].axes[0])[:, 0].tolist() == layers
    assert marked(figures["profile.png"].axes[0])[:, 0].tolist() == layers
    assert marked(figures["profile.png"].axes[1])[:, 0].tolist() == layers
    for name in (*ALL, "entropy_by_head"):
        assert marked(figures[f"{name}.png"].axes[0])[:, 1].tolist() == layers


@pytest.mark.parametrize("cliff", ["steepest", "lowest"])
def test_rings_stand_where_the_plan_found_something(finished, cliff):
    plan = select(run_files.read(finished[0]).timeline, SelectConfig(cliff=cliff))
    assert profile.found(plan, "entropy minimum") == 5
    assert profile.found(plan, "gradient cliff") == 0


def test_rings_are_drawn(figures):
    for ax, layer, name in zip(figures["profile.png"].axes, (5, 0), pictures.FOUND, strict=True):
        rings = [line for line in ax.get_lines() if line.get_markerfacecolor() == "none"]
        assert [list(line.get_xdata()) for line in rings] == [[layer]] and name in legend_of(ax)


def test_maps_show_the_numbers_of_the_timeline(finished, figures):
    timeline = run_files.read(finished[0]).timeline
    for name, expected in (
        ("entropy", timeline.entropy.mean(-1)),
        ("max_logit", timeline.max_logit.mean(-1)),
        ("activation_grad", timeline.activation_grad),
    ):
        mesh = figures[f"{name}.png"].axes[0].collections[0]
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(LAYERS, STEPS), expected.T)
    assert type(mesh.norm).__name__ == "LogNorm"


def test_missing_values_are_hatched_and_named(figures):
    ax = figures["parameter_grad.png"].axes[0]
    assert "no value" in legend_of(ax) and ax.collections[0].get_array().mask.any()
    assert "no value" not in legend_of(figures["entropy.png"].axes[0])


def test_components_are_the_parts_of_ski(finished):
    plan = finished[1]
    parts = list(profile.components(plan).values())
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, plan.scores)


@pytest.mark.parametrize(("layers", "columns"), [(1, 1), (300, 5)])
@pytest.mark.parametrize("fill", ["numbers", "equal", "holes", "nothing"])
def test_any_size_gives_a_sane_map(layers, columns, fill, tmp_path, coarse):
    values = np.random.default_rng(0).random((layers, columns))
    values = {"numbers": values, "equal": values * 0 + 2, "holes": values, "nothing": values * np.nan}[fill]
    if fill == "holes":
        values[0, 0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = heat_map(values, 10 * np.arange(columns), title="t", unit="u", x="step", chosen=[layers - 1], log=True)
        canvas.save(drawn, tmp_path / "map.png")
    assert ("no value" in legend_of(drawn.axes[0])) == (fill in ("holes", "nothing"))
    assert len(drawn.axes) == (1 if not np.isfinite(values).any() else 2)  # without values there is no scale
    if fill == "equal":
        norm = drawn.axes[0].collections[0].norm
        assert norm.vmin < 2 < norm.vmax
    assert all(float(label).is_integer() for label in drawn.axes[0].get_yticks())


@pytest.mark.parametrize("layers", [1, 300])
@pytest.mark.parametrize("fill", [1.0, np.nan])
def test_any_size_gives_sane_charts(layers, fill, tmp_path, coarse):
    values, chosen = fill * np.linspace(0.2, 1, layers), [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = index_chart(values, {"a": values, "b": values}, chosen)
        rows = [("entropy", values, values / 10), ("gradient", values, values * np.nan)]
        chart = profile_chart(rows, [(0, "minimum"), None], chosen)
        for number, drawn in enumerate((index, chart)):
            canvas.save(drawn, tmp_path / f"{number}.png")
    assert len(marked(index.axes[0])) == len(marked(chart.axes[0])) == 1


def test_steps_that_were_not_to_be_probed_are_no_holes():
    writer = TimelineWriter(None, layers=["a"], heads=1, meta={"config": {"probe_every": 20}})
    for step, drift in ((0, 0.0), (10, np.nan), (20, 0.1), (30, np.nan), (40, np.nan)):
        writer.append(step, delta_cka=[drift])
    steps, values = pictures.by_layer(writer.timeline, "delta_cka")
    assert steps.tolist() == [0, 20, 40] and np.isnan(values[-1])  # step 40 was to be probed and is missing


def test_pictures_are_not_blank(finished, figures):
    from matplotlib.image import imread

    assert set(figures) == {*pictures.FILES.values(), *(f"{name}.png" for name in ALL)}
    for name in figures:
        pixels = imread(finished[0] / name)[..., :3]
        assert min(pixels.shape[:2]) >= 400, name
        assert pixels.std() > 0.05 and (pixels < 0.9).any(axis=-1).mean() > 0.01, name


def test_a_column_that_was_not_asked_for_is_not_missing(tmp_path):
    run = tmp_path / "run"
    write_run(run, drop=("delta_cka",), signals=["attention", "activation_grad"], steps=3)
    missing = {}
    pictures._measured(run_files.read(run), lambda *_: None, missing)
    assert not missing


def test_a_plan_for_another_model_marks_nothing(finished, tmp_path):
    run = tmp_path / "run"
    write_run(run, layers=6, steps=3)
    shutil.copy(finished[0] / "plan.json", run / "plan.json")
    figures = []
    pictures._measured(run_files.read(run), lambda key, title, caption, figure: figures.append(figure), {})
    assert figures and not any(len(marked(figure.axes[0])) for figure in figures)
