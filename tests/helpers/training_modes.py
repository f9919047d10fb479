"""What a training in some mode measures, and how it is compared with plain training."""

import numpy as np

from helpers.tiny_models import loss_of
from inflection_fast.measure import Monitor, MonitorConfig

EVERYTHING = MonitorConfig(every=1, rows=None, frozen_share=1.0)


VALUES = ("entropy", "max_logit", "collision", "sink", "activation_grad", "parameter_grad", "loss")


def measured(model, batch, steps=1, config=EVERYTHING):
    with Monitor(model, config) as monitor:
        for _ in range(steps):
            loss_of(model(**batch)).backward()
            monitor.step()
            model.zero_grad()
    return monitor.timeline


def assert_same(actual, expected, rtol=1e-6):
    for name in VALUES:
        assert np.isfinite(getattr(expected, name)).all(), name
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=rtol, err_msg=name)
