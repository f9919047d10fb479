"""A CKA with its standard error, number of rows, and the reason if there is no value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CkaResult"]

# Why a layer has no value: the first reason that applies, by code.
REASONS = (
    "",
    "too few rows",
    "x has NaN or infinite features",
    "y has NaN or infinite features",
    "x is constant, or not distinguishable from chance (its self term is not above 0)",
    "y is constant, or not distinguishable from chance (its self term is not above 0)",
)


@dataclass(frozen=True, eq=False)
class CkaResult:
    """CKA of each layer, with its standard error and the data it comes from.

    Attributes:
        value: float32 ``[layers]``; NaN if there is no value. Never clamped.
        delta: float32 ``[layers]``, delta-CKA: ``1 - value``, subtracted in float64. It has the same standard error.
        standard_error: float32 ``[layers]``, of the choice of sequences, not of tokens; NaN without a jackknife, or if
            it has fewer than two units.
        rows: float64 ``[layers]``, number of rows that count.
        units: float64 scalar, number of units of the jackknife: sequences, or groups of sequences; 0: no jackknife.
        sequences: float64 scalar, number of sequences; NaN if the sequences of the rows are not known.
        rank: number k of directions of the shared basis; None: full space.
        variance_kept: float64 ``[layers]``, share of the pooled variance of both sides that lies in the basis; 1
            without a basis.
        debiased: whether the estimate is debiased.
        reason: int64 ``[layers]``, code of the reason why there is no value; 0 if there is one. See `reasons`.
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
        """Layers without a value, with the reason. Synchronises with the device."""
        return {layer: REASONS[code] for layer, code in enumerate(self.reason.tolist()) if code}

    def __repr__(self) -> str:
        rows = sorted({int(n) for n in self.rows.tolist()})
        count = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
        parts = [f"{'debiased' if self.debiased else 'biased'} CKA of {count} rows"]
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
    """Codes of `REASONS`, int64 ``[layers]``, from terms ``[layers, 3]`` and sums of |u|^2, |v|^2 ``[layers, 2]``."""
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


def jackknife_error(without: Tensor, nonempty: Tensor) -> Tensor:
    """Standard error ``[layers]`` from the values ``[units, layers]`` without each unit, over the nonempty units.

    ``se^2 = (m - 1) / m sum_s (t_s - mean t)^2`` over m units (Tukey 1958); NaN for fewer than two.
    """
    m, nonempty = nonempty.sum(), nonempty[:, None]
    mean = torch.where(nonempty, without, 0.0).sum(0) / m
    squares = torch.where(nonempty, (without - mean).square(), 0.0).sum(0)
    return torch.where(m >= 2, (squares * (m - 1) / m).sqrt(), torch.nan)
