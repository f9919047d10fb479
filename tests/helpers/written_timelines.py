"""Timelines written step by step, and how two are compared."""

import numpy as np

from inflection_fast.timeline import HEAD_SIGNALS, LAYER_SIGNALS, STEP_SIGNALS, TimelineWriter

LAYERS = ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]


HEADS = 2


META = {
    "model": {"class": "BertModel", "model_type": "bert", "parameters": 10},
    "config": {"every": 10, "blocks": (1, 2)},
}


ALL_SIGNALS = HEAD_SIGNALS + LAYER_SIGNALS + STEP_SIGNALS


def signals_of(step):
    rng = np.random.default_rng(step)
    values = {name: rng.normal(size=(3, HEADS)) for name in HEAD_SIGNALS}
    values |= {name: rng.normal(size=3) for name in LAYER_SIGNALS}
    return values | {name: rng.random() for name in STEP_SIGNALS}


def writer(folder, **options):
    return TimelineWriter(folder, **{"layers": LAYERS, "heads": HEADS, "meta": META} | options)


def written(folder, steps=(0, 10, 20)):
    with writer(folder) as out:
        for step in steps:
            out.append(step, **signals_of(step))
    return folder / "timeline.arrows"


def assert_same(a, b):
    assert a.layers == b.layers and a.meta == b.meta
    np.testing.assert_array_equal(a.steps, b.steps)
    for name in ALL_SIGNALS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
