"""What `scan` and `compare` measure with is the whole of their texts."""

import numpy as np
from helpers.tiny_models import model_and_batch, one_thread, output_gradients  # noqa: F401

from inflection_fast import MonitorConfig, find_blocks
from inflection_fast.checkpoints.measuring import measure


def test_gradients_are_those_of_all_sequences():
    model, batch = model_and_batch("bert")
    truth = output_gradients(model, batch, find_blocks(model))
    config = MonitorConfig(every=1, quantities=("activation_grad",))
    found = measure(model.eval(), [batch], config, gradients=True).activation_grad
    expected = [gradient.norm().item() for gradient in truth]
    assert len(truth[0]) > 1, "of one sequence a share is the whole"
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
