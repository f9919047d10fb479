"""Attention of tiny models as it is measured, and its float64 truth."""

import torch

from helpers.tiny_models import CASES, entropy, head_means, loss_of
from inflection_fast.measure import Monitor, MonitorConfig

ALL_ROWS = MonitorConfig(every=1, rows=None, signals=("attention",))


PAIRS = [(name, impl) for name, case in CASES.items() for impl in case.implementations]


def measured(model, batch, config=ALL_ROWS):
    with Monitor(model, config) as monitor:
        loss_of(model(**batch)).backward()
        monitor.step()
    return monitor.timeline


OF_ROWS = {"entropy": entropy, "collision": lambda p: p.square().sum(-1), "sink": lambda p: p[..., 0]}


def check_attention(timeline, truth, masks, signals=tuple(OF_ROWS)):
    """Entropy, collision and sink of all layers and heads; the truth must be worth comparing with."""
    expected = {name: head_means([OF_ROWS[name](p) for p in truth], masks) for name in signals}
    assert expected["entropy"].max() - expected["entropy"].min() > 0.05
    for name, values in expected.items():
        actual = torch.from_numpy(getattr(timeline, name)[0])
        torch.testing.assert_close(actual, values, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert (timeline.entropy_se == 0).all()
