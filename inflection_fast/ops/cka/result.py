"""A CKA with what belongs to it: its standard error, how many rows it comes from, why it is missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CkaResult"]

# Why a layer has no value, by code; the first that applies.
REASONS = (
    "",
    "too few rows",
    "x holds NaN or infinite features",
    "y holds NaN or infinite features",
    "x is constant, or has nothing left that chance would not give (its self term is not above 0)",
    "y is constant, or has nothing left that chance would not give (its self term is not above 0)",
)


@dataclass(frozen=True, eq=False)
class CkaResult:
    """CKA of every layer, what it rests on, and how far it may be off.

    Attributes:
        value: float32 ``[layers]``, NaN where there is none, never clamped.
        delta: float32 ``[layers]``, delta-CKA: ``1 - value``, subtracted in float64. Its standard error is the same.
        standard_error: float32 ``[layers]``: of the choice of sequences, not of tokens; NaN if it was not asked for or
            fewer than two units are left out in turn.
        rows: float64 ``[layers]``, rows that counted.
        units: float64 scalar: sequences or groups of sequences that were left out in turn; 0: no jackknife.
        sequences: float64 scalar, sequences seen; NaN if nobody told which row is of which.
        rank: k of the shared basis; None: full space.
        variance_kept: float64 ``[layers]``, the share of the variance of both sides pooled that lies in the basis; 1
            without one.
        debiased: which estimate.
        reason: int64 ``[layers]``, why there is no value: index of `reasons`' sentences, 0 where there is one.
    """

    value: Tensor
    delta: Tensor
    standard_error: Tensor
    rows: Tensor
    units: Tensor
    sequences: Tensor
    rank: int | None
    variance_kept: Tensor
    debiased: bool
    reason: Tensor

    @property
    def reasons(self) -> dict[int, str]:
        """Layers without a value, and why. Reads the device."""
        return {layer: REASONS[code] for layer, code in enumerate(self.reason.tolist()) if code}

    def __repr__(self) -> str:
        rows = sorted({int(n) for n in self.rows.tolist()})
        told = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
        parts = [f"{'debiased' if self.debiased else 'biased'} CKA of {told} rows"]
        if not self.sequences.isnan():
            parts.append(f"{int(self.sequences)} sequences")
        if self.units > 0:
            parts.append(f"{int(self.units)} left out in turn")
        parts.append("full space" if self.rank is None else f"rank {self.rank}")
        lines, reasons = [f"CkaResult({', '.join(parts)})"], self.reasons
        numbers = zip(self.value.tolist(), self.standard_error.tolist(), self.variance_kept.tolist(), strict=True)
        for layer, (value, error, kept) in enumerate(numbers):
            line = f"  layer {layer:3d}  {value:8.5f}"
            line += f" +- {error:.5f}" if error == error else ""
            line += f"  {100 * kept:.1f} % of the variance" if self.rank is not None else ""
            lines.append(f"  layer {layer:3d}       nan  {reasons[layer]}" if layer in reasons else line)
        return "\n".join(lines)


def reason_of(terms: Tensor, rows: Tensor, norms: Tensor, min_rows: int) -> Tensor:
    """int64 ``[layers]`` from the terms ``[layers, 3]`` and the sums ``[layers, 2]`` of |u|^2 and |v|^2."""
    code = torch.zeros(len(terms), dtype=torch.int64, device=terms.device)
    for number, applies in (
        (5, ~(terms[:, 2] > 0)),
        (4, ~(terms[:, 1] > 0)),
        (3, ~norms[:, 1].isfinite()),
        (2, ~norms[:, 0].isfinite()),
        (1, rows < min_rows),
    ):
        code = torch.where(applies, number, code)
    return code


def jackknife_error(without: Tensor, there: Tensor) -> Tensor:
    """Standard error ``[layers]`` from the values ``[units, layers]`` without each unit, of the units that are there.

    ``se^2 = (m - 1) / m sum_s (t_s - mean t)^2`` over m units (Tukey 1958); NaN for fewer than two.
    """
    m, there = there.sum(), there[:, None]
    mean = torch.where(there, without, 0.0).sum(0) / m
    squares = torch.where(there, (without - mean).square(), 0.0).sum(0)
    return torch.where(m >= 2, (squares * (m - 1) / m).sqrt(), torch.nan)
