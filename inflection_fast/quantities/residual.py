"""The residual stream: moments of blocks' outputs, and the relative change by a block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from .. import ops
from .quantity import Accumulator, AlertRule, BlockForward, Column, Quantity, Sums

__all__ = ["Residual"]


_of_layer = partial(Column, "1", ("layer",), count="rows")


class Residual(Quantity):
    """Moments of every block's output over tokens, and its way from the block's input.

    With y the output and x the input of a block at one token, all sums in float64:

    * `residual_rms`: sqrt(mean of y^2) over tokens and features;
    * `residual_max`: largest magnitude;
    * `residual_kurtosis`: E[(y - mean)^4] / E[(y - mean)^2]^2 over tokens and features, 3 for normal numbers;
    * `massive_activations`: how many of the step's numbers are above 100 and at least 1000 times the median magnitude
      of their token (Sun et al. 2024, arXiv 2402.17762);
    * `block_ratio`: mean over tokens of ||y - x|| / ||x||, where y - x is what the block adds to the residual stream;
    * `block_cosine`: mean over tokens of x.y / (||x|| ||y||).

    Cost: one read of each block's input and output (`ops.activation_moments`). Memory: 116 bytes per layer.
    """

    name = "residual"
    axes = {"moment": ops.MOMENT_SUMS}
    accumulators = {
        "moments": Accumulator(("layer", "moment"), held="output"),
        "rows": Accumulator("layer", held="output"),
        "pairs": Accumulator("layer", held="output"),
        "largest": Accumulator("layer", dtype="float32", join="max", held="output"),
    }
    columns = {
        "residual_rms": _of_layer(
            "RMS of block outputs",
            "Root of the mean square of a block's output, over tokens and features.",
            scale="log",
            alerts=(AlertRule("exploding", 10.0), AlertRule("not_finite")),
        ),
        "residual_max": _of_layer(
            "largest output of a block", "Largest magnitude in a block's output, over tokens.", scale="log"
        ),
        "residual_kurtosis": _of_layer(
            "kurtosis of block outputs",
            "Fourth central moment of a block's output over its squared variance: 3 if normal, more with outliers.",
            scale="log",
        ),
        "massive_activations": _of_layer(
            "massive activations",
            "Numbers in a block's output above 100 and at least 1000 times the median magnitude of their token.",
            drawn="heatmap",
        ),
        "block_ratio": _of_layer(
            "relative change by a block",
            "Norm of what a block adds to its input over the norm of that input, mean over tokens.",
            count="pairs",
            scale="log",
        ),
        "block_cosine": _of_layer(
            "cosine of a block's input and output",
            "Cosine of the angle between a block's input and its output, mean over tokens.",
            count="pairs",
        ),
    }

    def on_block(self, sums: Sums, block: BlockForward) -> None:
        """Add the moments of a block."""
        output, before = block.output, block.input
        if before is not None and before.shape != output.shape:
            before = None  # a block that changes the width or the length has no residual stream through it
        mask = block.tokens
        if mask is not None and mask.shape != output.shape[:-1]:
            raise ValueError(
                f"block {block.layer} returns {list(output.shape)} where the tokens are {list(mask.shape)}; "
                "expected [batch, tokens, features]"
            )
        moments = ops.activation_moments(output, before, mask=mask)
        place = sums["moments"][block.layer]
        place += moments.sums
        sums["rows"][block.layer] += moments.sums[ROWS]
        sums["pairs"][block.layer] += moments.sums[PAIRS]
        largest = sums["largest"][block.layer]
        torch.maximum(largest, moments.largest, out=largest)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over tokens."""
        of = dict(zip(ops.MOMENT_SUMS, sums["moments"].T, strict=True))
        return {
            "residual_rms": np.sqrt(of["second"] / of["elements"]),
            "residual_max": sums["largest"],
            "residual_kurtosis": kurtosis(of),
            "massive_activations": of["massive"],
            "block_ratio": of["ratio"] / of["ratio_rows"],
            "block_cosine": of["cosine"] / of["cosine_rows"],
        }


ROWS, PAIRS = ops.MOMENT_SUMS.index("rows"), ops.MOMENT_SUMS.index("ratio_rows")


def kurtosis(of: Mapping[str, np.ndarray]) -> np.ndarray:
    """Fourth central moment over the squared variance, from sums of powers by the names of `MOMENT_SUMS`."""
    mean, second, third, fourth = (of[name] / of["elements"] for name in ("first", "second", "third", "fourth"))
    variance = second - mean**2
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
