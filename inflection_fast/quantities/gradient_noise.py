"""Signal and noise of a gradient, from the gradients of micro-batches and ranks and that of the whole step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np

from .. import ops
from .quantity import Accumulator, Column, MeasuredModel, ModelOutput, ParameterGradient, Parameters, Quantity, Sums

__all__ = ["GradientNoise"]

logger = logging.getLogger(__name__)


_of_layer = partial(Column, "1", ("layer",), count="pieces")


class GradientNoise(Quantity):
    """Unbiased estimates of the squared norm of the true gradient and of the variance of one sequence's gradient.

    A step of n >= 2 pieces (micro-batches times ranks) of b sequences each has the gradient S, the mean of the pieces'
    x_1 ... x_n. With m = mean ||x_i||^2 (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, with B_small = b and
    B_big = n b):

    * `gradient_signal` = (n ||S||^2 - m) / (n - 1), expected ||G||^2 of the true gradient G;
    * `gradient_variance` = b n (m - ||S||^2) / (n - 1), expected tr(Sigma), Sigma the covariance of the gradient of one
      sequence;
    * `gradient_snr` = signal / variance per block (the sum over parameters of what arXiv 2310.07361 has per parameter);
    * `noise_scale` = variance / signal over all blocks, in sequences: the simple noise scale, a batch size beyond which
      more sequences bring little.

    Signal and variance are unbiased, ratios of them are not, and the signal of a single step may come out below 0: take
    means of both over steps, then the ratio. The pieces are taken to be of equal size, and the loss to be a mean over
    sequences. A step of one piece has no values. The gradients of ranks are taken to be averaged, as DDP and FSDP2 do
    by default; under FSDP2 those of a piece are read before they are averaged and sharded. Cost: one read of each
    piece's gradients. Memory: 16 bytes per parameter tensor and 16 per layer.
    """

    name = "gradient_noise"

    columns = {
        "gradient_signal": _of_layer(
            "squared norm of the true gradient", "Unbiased estimate of the squared norm of the true gradient."
        ),
        "gradient_variance": _of_layer(
            "variance of the gradient", "Unbiased estimate of the total variance of the gradient of one sequence."
        ),
        "gradient_snr": _of_layer(
            "signal-to-noise ratio of the gradient",
            "Squared norm of the true gradient over the total variance of the gradient of one sequence, estimated.",
        ),
        "noise_scale": Column(
            unit="sequences",
            axes=(),
            label="simple noise scale",
            explanation="Variance of one sequence's gradient over the true gradient's squared norm, all blocks.",
            scale="log",
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Give every parameter of the blocks a place."""
        self._places: dict[int, int] = {}
        layers: list[int] = []
        for block in model.blocks:
            for parameter in block.module.parameters():
                if id(parameter) not in self._places:
                    self._places[id(parameter)] = len(layers)
                    layers.append(block.index)
        if not layers:
            raise ValueError("gradient_noise: the blocks have no parameters; leave the quantity 'gradient_noise' out")
        self._layers, self._warned = np.array(layers), False
        self.axes = {"parameter_place": len(layers)}
        squares = partial(Accumulator, held="part", gradient_power=2)
        self.accumulators = {
            "of_pieces": squares("parameter_place"),
            "of_whole": squares("layer"),
            "seen": Accumulator("parameter_place", held="part"),
            "pieces": Accumulator("layer"),
            "sequences": Accumulator(()),
            "forwards": Accumulator(()),
            "ranks": Accumulator(()),
        }

    def on_model_output(self, sums: Sums, output: ModelOutput) -> None:
        """Count the sequences of a micro-batch."""
        batch = next((x.shape[0] for x in output.inputs.values() if hasattr(x, "shape") and len(x.shape) > 0), None)
        if batch is not None:
            sums["sequences"] += batch
            sums["forwards"] += 1
            sums["pieces"] += 1

    def on_parameter_gradient(self, sums: Sums, seen: ParameterGradient) -> None:
        """Write the squares of a parameter's gradient in this piece."""
        place = self._places.get(id(seen.parameter))
        if place is not None:
            gradient = seen.gradient.coalesce().values() if seen.gradient.is_sparse else seen.gradient
            if gradient.dtype == gradient.double().dtype:
                squares = gradient.square().sum()
            else:
                squares = ops.sum_of_squares([gradient], [0])[0]
            sums["of_pieces"][place] = squares * seen.share
            sums["seen"][place].fill_(1)

    def on_backward_end(self, sums: Sums, parameters: Parameters) -> None:
        """Write the squares of the whole gradient."""
        sums["ranks"].fill_(1)
        layers, _, gradients = parameters.gradients()
        if gradients:
            sums["of_whole"].copy_(parameters.squares(gradients, layers))

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Both estimates, and their ratios."""
        n = sums["forwards"]
        if n < 2 or not sums["seen"].any():
            if not self._warned:
                self._warned = True
                logger.warning(
                    "gradient_noise needs the gradients of at least two micro-batches or ranks in an optimizer step, "
                    "and got %d: its columns have no values. Accumulate gradients over two or more micro-batches",
                    int(n),
                )
            return {}
        layers = len(sums["of_whole"])
        of_pieces = np.bincount(self._layers, sums["of_pieces"], layers)
        # A piece's gradient is scaled for the sum over the step: n times as much estimates what the whole does. DDP
        # divides the whole by the number of ranks, but not what a rank sees of a piece.
        mean = n * of_pieces / sums["ranks"] ** 2
        b = sums["sequences"] / n
        signal = (n * sums["of_whole"] - mean) / (n - 1)
        variance = b * n * (mean - sums["of_whole"]) / (n - 1)
        trained = np.bincount(self._layers, sums["seen"], layers) > 0
        signal, variance = (np.where(trained, x, np.nan) for x in (signal, variance))
        return {
            "gradient_signal": signal,
            "gradient_variance": variance,
            "gradient_snr": signal / variance,
            "noise_scale": np.nansum(variance) / np.nansum(signal),
        }
