"""A quantity as a user writes one, and a training that measures it."""

import numpy as np
import torch

from helpers.tiny_models import loss_of
from inflection_fast import Accumulator, AlertRule, Column, Monitor, Quantity

BY_LAYER = ("layer",)


def column(name="value", **settings):
    return Column(
        **{"unit": "1", "axes": BY_LAYER, "label": name, "explanation": f"{name}.", "count": "count"} | settings
    )


class OutputRms(Quantity):
    """RMS of block outputs over tokens."""

    name = "output_rms"
    accumulators = {"squares": Accumulator(held="output"), "count": Accumulator(held="output")}
    columns = {"output_rms": column("RMS", alerts=(AlertRule("above", 0.0, measurements=1),))}

    def on_block(self, sums, block):
        squares = block.output.double().square()
        if block.tokens is not None:
            squares = squares * block.tokens[..., None]
        sums["squares"][block.layer] += squares.sum()
        tokens = block.tokens.sum() if block.tokens is not None else squares[..., 0].numel()
        sums["count"][block.layer] += tokens * squares.shape[-1]

    def values(self, sums):
        return {"output_rms": np.sqrt(sums["squares"] / sums["count"])}


def train(model, batch, config, steps=3, micro_batches=1, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, config, **settings) as monitor:
        for _ in range(steps):
            for _ in range(micro_batches):
                loss_of(model(**batch)).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.timeline
