"""What a block gives out, and how far it moved what it took in: sums over tokens, from one read of both."""

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
    """Sums over the rows that count, and the largest magnitude. Sums of batches and ranks add up."""

    sums: Tensor
    """float64 ``[12]``, in the order of `MOMENT_SUMS`."""
    largest: Tensor
    """float32 ``[]``, largest magnitude of `output`; 0 without rows."""


def activation_moments(output: Tensor, input: Tensor | None = None, *, mask: Tensor | None = None) -> ActivationMoments:
    """Moments of activations, and how far a block moved its input, over all rows (tokens).

    With rows y of `output` and x of `input`, `sums` holds: the number of `rows` and of their `elements`; the sums of y
    (`first`), y^2, y^3 and y^4; the number of `massive` activations, those with ``|y| > 100`` and ``|y| >= 1000 *
    median(|y|)`` over their row (Sun et al. 2024, arXiv 2402.17762; the lower median, as ``torch.median`` takes it);
    the sum of x^2 (`input`); the sum over rows of ``||y - x|| / ||x||`` (`ratio`) over the `ratio_rows` with
    ``||x|| > 0``, and of ``x.y / (||x|| ||y||)`` (`cosine`) over the `cosine_rows` where both norms are above 0. The
    last five are 0 without `input`.

    Every product and sum is float64, so any norm that the inputs' dtypes can hold comes out right. Each element is read
    once from memory; a row with an activation above 100 is read again, from the cache, and 32 times more if it has a
    massive one. Sums of powers about 0: a kurtosis from them errs by 1e-16 times (mean / standard deviation)^4. The
    same in every run and for any number of threads. Not differentiable: inputs are read as values.

    Args:
        output: ``[..., D]``, float32, bfloat16 or float16, any strides, at most 9 dimensions.
        input: of the shape of `output`, any of these dtypes; None: only `output` is described.
        mask: bool, broadcastable to ``[...]``; True counts. None: every row does.

    Returns:
        `ActivationMoments`. A row that holds NaN makes NaN of every number it is part of, infinities likewise where
        they cancel.

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
        if checks.device_tensor(mask, "mask", output, "output").dtype != torch.bool:
            raise TypeError(f"mask: expected dtype bool (True counts), got {mask.dtype}")
        rows = output.shape[:-1]
        tail = rows[len(rows) - mask.ndim :] if mask.ndim <= len(rows) else ()
        if mask.ndim > len(rows) or any(have not in (1, want) for have, want in zip(mask.shape, tail, strict=True)):
            raise ValueError(f"mask: shape {list(mask.shape)} does not broadcast to the rows' {list(rows)}")
    checks.no_tangent("activation_moments", output, input, differentiable=False)
    with torch.no_grad():
        return ActivationMoments(*torch.ops.inflection_fast.activation_moments(output, input, mask))


@torch.library.register_fake("inflection_fast::activation_moments")
def _(output, input, mask):
    sums = output.new_empty(len(MOMENT_SUMS), dtype=torch.float64)
    return sums, output.new_empty((), dtype=torch.float32)
