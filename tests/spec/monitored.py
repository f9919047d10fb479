"""Rows of a timeline held against float64 truths."""

import numpy as np

VALUES = ("entropy", "collision", "sink", "max_logit", "activation_grad", "parameter_grad")


def assert_row(timeline, i, truth, rtol=2e-4, skip=()):
    for name in VALUES:
        if name in skip:
            continue
        got = getattr(timeline, name)[i]
        assert got.shape == truth[name].shape, name
        assert np.allclose(got, truth[name], rtol=rtol, atol=2e-5, equal_nan=True), f"{name}: {got} {truth[name]}"
