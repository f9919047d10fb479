"""The first-order gain of adapters, against singular values in float64."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import in_float64, loss_of, model_and_batch, one_thread  # noqa: F401

from inflection_fast import Monitor, MonitorConfig
from inflection_fast.quantities.first_order import FirstOrder, random_share, top_squares


@pytest.mark.parametrize("shape", [(7, 7), (5, 33), (40, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e18])
def test_top_squares_are_those_of_the_singular_values(shape, scale):
    torch.manual_seed(0)
    matrix = scale * torch.randn(shape)
    truth = torch.linalg.svdvals(matrix.double())[:3].square().sum()
    assert float(top_squares(matrix, 3)) == pytest.approx(float(truth), rel=1e-5)
    turn = torch.linalg.qr(torch.randn(shape[0], shape[0]))[0]
    assert float(top_squares(turn @ matrix, 3)) == pytest.approx(float(truth), rel=1e-5)


def test_no_gradient_has_no_gain():
    assert float(top_squares(torch.zeros(4, 9), 2)) == 0


def test_gains_of_a_training_step_equal_the_truth():
    model, batch = model_and_batch("bert")
    with Monitor(model, MonitorConfig(every=1, quantities=(FirstOrder(3, every=1),))) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step(loss_scale=1.0)
        timeline = monitor.timeline
    wide, inputs = in_float64(model, batch)
    wide.zero_grad()
    loss_of(wide(**inputs)).backward()
    names = timeline.meta["axes"]["module"]
    for layer, block in enumerate(wide.bert.encoder.layer):
        for place, name in enumerate(names):
            s = torch.linalg.svdvals(block.get_parameter(name).grad).square()
            assert timeline.first_order_gain[0, layer, place] == pytest.approx(float(s[:3].sum()), rel=1e-4)
            assert timeline.first_order_share[0, layer, place] == pytest.approx(float(s[:3].sum() / s.sum()), rel=1e-4)
    assert "attention.self.query.weight" in names


def test_frozen_weights_have_no_value():
    model, batch = model_and_batch("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    with Monitor(model, MonitorConfig(every=1, quantities=(FirstOrder(every=1),))) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
        gain = monitor.timeline.first_order_gain[0]
    assert np.isnan(gain[0]).all() and np.isfinite(gain[1:]).all()


def test_noise_holds_about_its_share():
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (128, 512)):
        noise = torch.randn(rows, columns)
        share = float(top_squares(noise, 4) / noise.double().square().sum())
        assert 0.8 * random_share(rows, columns, 4) < share <= 1.05 * random_share(rows, columns, 4)
    assert random_share(4, 4, 8) == 1


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        FirstOrder(0)
    with pytest.raises(TypeError, match="rank: expected an integer"):
        FirstOrder(2.5)
