"""A diagnostic of your own: how much of each block's output lies in a few of its features.

One class declares it: what it listens to, what it adds up, and what the sums mean. The monitor does the rest: several
micro-batches and processes, the file, alerts. A package offers one to everybody by an entry point, in pyproject.toml:

    [project.entry-points."inflection_fast.quantities"]
    feature_share = "own_quantity:FeatureShare"

Nothing is fetched, and it takes seconds:

    python examples/own_quantity.py
"""

from __future__ import annotations

import numpy as np
import torch
from plain_loop import Classifier, batch

from inflection_fast import Accumulator, AlertRule, Column, Monitor, MonitorConfig, Quantity


class FeatureShare(Quantity):
    """The share of the squared norm of a block's output that the largest feature of each token has."""

    name = "feature_share"
    accumulators = {"share": Accumulator("layer", held="output"), "tokens": Accumulator("layer", held="output")}
    columns = {
        "feature_share": Column(
            unit="1",
            axes=("layer",),
            label="share of the largest feature",
            explanation="Squared largest number over squared norm of a block's output, mean over tokens.",
            count="tokens",
            alerts=(AlertRule("above", 0.9), AlertRule("not_finite")),
        )
    }

    def on_block(self, sums, block):
        """Add the shares of one block up."""
        squares = block.output.float().square()  # [B, T, D]
        counts = torch.ones_like(squares[..., 0]) if block.tokens is None else block.tokens.float()  # [B, T]
        share = squares.amax(-1) / squares.sum(-1)
        sums["share"][block.layer] += share.masked_fill(counts == 0, 0.0).sum()
        sums["tokens"][block.layer] += counts.sum()

    def values(self, sums):
        """The mean."""
        return {"feature_share": sums["share"] / sums["tokens"]}


def main() -> np.ndarray:
    """Train, and return the share of every measured step and block."""
    torch.manual_seed(0)
    model, generator = Classifier(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = MonitorConfig(quantities=("attention", FeatureShare()), every={"attention": 20, "feature_share": 5})
    with Monitor(model, config) as monitor:
        for _ in range(60):
            tokens, labels = batch(32, generator)
            torch.nn.functional.cross_entropy(model(tokens), labels).backward()
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    column = monitor.timeline.columns["feature_share"]
    print(f"{column.label}: {column.explanation}")
    for step, share in zip(monitor.timeline.steps, monitor.timeline.feature_share, strict=True):
        print(f"step {step:3d}: " + " ".join(f"{one:.3f}" for one in share))
    return monitor.timeline.feature_share


if __name__ == "__main__":
    main()
