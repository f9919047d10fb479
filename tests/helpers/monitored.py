"""Tiny trainings under a monitor."""

import torch

from helpers.tiny_models import loss_of
from inflection_fast.measure import Monitor, MonitorConfig

EVERY_STEP = MonitorConfig(every=1, rows=5)


def train(model, batch, steps, config=EVERY_STEP, out=None, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, config, out, **settings) as monitor:
        for _ in range(steps):
            loss = loss_of(model(**batch))
            loss.backward()
            monitor.step(loss)
            optimizer.step()
            optimizer.zero_grad()
    return monitor
