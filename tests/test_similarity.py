"""Pictures of CKA: what they show is what they were given."""

import numpy as np
import pytest

from inflection_fast.report import canvas, cka_map, drift_chart


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(canvas, "DPI", 40)


def image_of(figure, path):
    from matplotlib.image import imread

    canvas.save(figure, path)
    return imread(path)[..., :3]


def test_a_map_shows_every_value_on_the_scale_from_0_to_1(tmp_path):
    values = np.array([[1.0, 0.5, -0.02], [0.5, 1.0, np.nan]])
    figure = cka_map(values, title="two models", x="layer of B", y="layer of A")
    mesh = figure.axes[0].collections[0]
    shown = mesh.get_array().reshape(2, 3)
    np.testing.assert_array_equal(shown.filled(np.nan), values)
    assert mesh.get_clim() == (0, 1)
    assert {text.get_text() for text in figure.axes[0].texts} == {"1.00", "0.50", "-0.02"}
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["no value"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("layer of B", "layer of A")
    assert image_of(figure, tmp_path / "map.png").std() > 0.05


def test_a_large_map_has_no_numbers_in_it(tmp_path):
    figure = cka_map(np.eye(40))
    assert not figure.axes[0].texts
    assert image_of(figure, tmp_path / "map.png").std() > 0.05


def test_drift_has_bars_of_one_standard_error(tmp_path):
    steps = np.array([0, 10, 20])
    delta = np.outer([0.0, 0.1, 0.2], np.arange(8.0))
    error = 0.05 + 0.01 * delta
    error[2, 3] = np.nan
    figure = drift_chart(steps, delta, error, chosen=(2,))
    above, below = figure.axes
    points, _, (bars,) = above.containers[0]
    np.testing.assert_array_equal(points.get_xydata(), np.column_stack([np.arange(8), delta[2]]))
    segments = bars.get_segments()
    np.testing.assert_allclose([np.ptp(segments[layer][:, 1]) / 2 for layer in (0, 1, 2, 4)], error[2][[0, 1, 2, 4]])
    assert not np.size(segments[3])  # no error, no bar
    assert len(below.containers) == 6
    courses = [container[0].get_ydata() for container in below.containers]
    assert all(any(np.array_equal(course, delta[:, layer]) for layer in range(8)) for course in courses)
    assert image_of(figure, tmp_path / "drift.png").std() > 0.05


def test_steps_without_a_snapshot_leave_no_gap():
    steps, delta = np.arange(4), np.full((4, 2), np.nan)
    delta[[0, 2]] = [[0.0, 0.0], [0.3, 0.4]]
    figure = drift_chart(steps, delta, np.full_like(delta, np.nan))
    assert figure.axes[0].get_title(loc="left") == "Representation drift at step 2"
    assert all(len(container[0].get_xdata()) == 2 for container in figure.axes[1].containers)
