"""Moments of a block's output, and its distance from the block's input: sums over tokens in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, library  # noqa: F401  (library defines the operators)

__all__ = ["MASSIVE_MAGNITUDE", "MASSIVE_OF_MEDIAN", "MOMENT_SUMS", "ActivationMoments", "activation_moments"]

# The order of MomentSum in csrc/kernels.h.
MOMENT_SUMS = (
    "rows",
    "elements",
    "first",
    "second",
    "third",
    "fourth",
    "massive",
    "input",
    "ratio_rows",
    "ratio",
    "cosine_rows",
    "cosine",
)
MASSIVE_MAGNITUDE = 100.0  # kMassiveMagnitude in csrc/kernels.h
MASSIVE_OF_MEDIAN = 1000.0  # kMassiveOfMedian


class ActivationMoments(NamedTuple):
    """Sums over the rows that count, and the largest magnitude. To merge batches or ranks, add the sums."""

    sums: Tensor
    """float64 ``[12]``, in the order of `MOMENT_SUMS`."""
    largest: Tensor
    """float32 ``[]``, largest magnitude of `output`; 0 if there are no rows."""


def activation_moments(output: Tensor, input: Tensor | None = None, *, mask: Tensor | None = None) -> ActivationMoments:
    """Moments of a block's output, and how far the block moved its input, over all rows (tokens).

    With rows y of `output` and x of `input`, `sums` holds:

    * `rows` and `elements`: numbers of rows and of their elements;
    * `first` to `fourth`: sums of y, y^2, y^3 and y^4;
    * `massive`: number of activations with ``|y| > 100`` and ``|y| >= 1000 * median(|y|)`` of their row (Sun et al.
      2024, arXiv 2402.17762), with the lower median, as ``torch.median``;
    * `input`: sum of x^2;
    * `ratio`: sum of ``||y - x|| / ||x||`` over the `ratio_rows` with ``||x|| > 0``;
    * `cosine`: sum of ``x.y / (||x|| ||y||)`` over the `cosine_rows` whose norms are both above 0.

    The last five are 0 without `input`. Products and sums are float64. Powers are taken about 0: a kurtosis computed
    from them errs by 1e-16 times (mean / standard deviation)^4. Each element is read once from memory; a row with a
    massive activation is read again from the cache, to find its median. The result does not depend on the number of
    threads. Not differentiable.

    Args:
        output: ``[..., D]``, float32, bfloat16 or float16, any strides, at most 9 dimensions.
        input: same shape as `output`, any of these dtypes; None: only `output` is described.
        mask: bool, broadcastable to ``[...]``, True counts; None: all rows count.

    Returns:
        `ActivationMoments`. NaN in a row makes all numbers of that row NaN, also infinities that cancel.

    Raises:
        TypeError: an argument is no tensor of these dtypes.
        ValueError: shapes or devices that do not fit.
    """
    if checks.float_tensor(output, "output").ndim < 1 or output.ndim > 9:
        raise ValueError(f"output: expected [..., features] of 1 to 9 dimensions, got shape {list(output.shape)}")
    if input is not None:
        checks.float_tensor(input, "input")
        checks.same_device(input, "input", output, "output")
        if input.shape != output.shape:
            raise ValueError(f"input: expected the shape of output, {list(output.shape)}, got {list(input.shape)}")
    if mask is not None:
        checks.device_tensor(mask, "mask", output, "output", torch.bool)
        checks.broadcasts(mask, "mask", output.shape[:-1], "the rows")
    checks.no_tangent("activation_moments", output, input, differentiable=False)
    with torch.no_grad():
        return ActivationMoments(*torch.ops.inflection_fast.activation_moments(output, input, mask))


@torch.library.register_fake("inflection_fast::activation_moments")
def _(output, input, mask):
    sums = output.new_empty(len(MOMENT_SUMS), dtype=torch.float64)
    return sums, output.new_empty((), dtype=torch.float32)
