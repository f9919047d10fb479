"""A loop of Accelerate that accumulates gradients: its optimizer steps are the steps of the timeline."""

import numpy as np
import torch
from accelerate import Accelerator
from helpers import trainers
from helpers.tiny_models import one_thread  # noqa: F401

from inflection_fast.measure import Monitor, MonitorConfig

CONFIG = MonitorConfig(every=1, rows=None)
STEPS, PARTS, SIZE = 3, 2, 2


def batches():
    items = trainers.items(STEPS * PARTS * SIZE)
    parts = [items[i : i + SIZE] for i in range(0, len(items), SIZE)]
    return [{name: torch.stack([item[name] for item in part]) for name in part[0]} for part in parts]


def test_steps_are_those_of_the_optimizer():
    model = trainers.classifier().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Monitor(model, CONFIG) as plain:
        for i, batch in enumerate(batches()):
            (model(**batch).loss / PARTS).backward()
            if i % PARTS == PARTS - 1:
                plain.step()
                optimizer.step()
                optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model = trainers.classifier().train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with Monitor(model, CONFIG, accelerator=accelerator) as monitor:
        for batch in batches():
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                monitor.step()
                optimizer.step()
                optimizer.zero_grad()
    assert monitor.timeline.steps.tolist() == plain.timeline.steps.tolist() == list(range(STEPS))
    for name in ("entropy", "activation_grad", "parameter_grad", "loss"):
        expected = getattr(plain.timeline, name)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(getattr(monitor.timeline, name), expected, rtol=1e-5, err_msg=name)
