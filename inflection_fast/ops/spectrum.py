"""Singular values of weight matrices, and statistics of them: ranks, a power-law fit, and outliers above noise."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks

__all__ = [
    "PowerLaw",
    "Spectrum",
    "marchenko_pastur_median",
    "noise_singular_values",
    "power_law",
    "singular_values",
    "spectrum_of",
    "weight_spectrum",
]

TRACY_WIDOM = 3.27  # the 99.9 % quantile of the distribution of order 1
MP_POINTS = 20_001  # of the integral of the Marchenko-Pastur density
MIN_TAIL = 10  # least number of values for a power-law fit
KS_CELLS = 2**18  # differences of distribution functions in memory at a time
GRAM_COLUMNS = 1024  # of the longer side, converted to float64 at a time
GRAM_ROWS = 512  # of the lower triangle of a Gram matrix, computed at a time


class PowerLaw(NamedTuple):
    """A power law p(x) ~ x^-alpha for x >= xmin."""

    alpha: float
    """The exponent."""
    error: float
    """Its standard error, (alpha - 1) / sqrt(tail)."""
    distance: float
    """Largest distance between the distribution functions of the fit and of the tail (Kolmogorov-Smirnov)."""
    xmin: float
    """Smallest value of the tail."""
    tail: int
    """Number of values in the tail."""


class Spectrum(NamedTuple):
    """Statistics of the singular values s of a matrix."""

    stable_rank: float
    """||W||_F^2 / s_1^2."""
    effective_rank: float
    """exp of the entropy of s / sum(s) (Roy & Vetterli 2007)."""
    alpha: float
    """Exponent of the power law of the tail of s^2."""
    alpha_error: float
    """Its standard error."""
    alpha_distance: float
    """Kolmogorov-Smirnov distance of the fit."""
    outliers: int
    """Number of s above the edge of noise of the same size and scale; see `outliers`."""
    norm: float
    """s_1."""


def singular_values(weight: Tensor) -> np.ndarray:
    """Singular values of a matrix, float64, in falling order, from the eigenvalues of the smaller of W W^T and W^T W.

    The product is summed in float64, so a singular value s errs by about 1e-16 s_1^2 / s: values below 1e-8 s_1 are
    rounding errors. Memory beside the matrix: twice its smaller Gram matrix in float64, and 1024 of its columns (rows).
    Only the lower triangle of the Gram matrix is computed.

    Raises:
        TypeError: `weight` is no floating-point tensor.
        ValueError: it is no matrix, or holds NaN or infinity.
    """
    if not checks.tensor(weight, "weight").is_floating_point():
        raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected a matrix, got shape {list(weight.shape)}")
    with torch.no_grad():
        matrix = weight if weight.shape[0] <= weight.shape[1] else weight.mT
        low, high = weight.aminmax()  # not `matrix`: aminmax would copy a transposed one
        largest = torch.maximum(-low, high).double()
        if not torch.isfinite(largest):
            raise ValueError("weight: holds NaN or infinity, so it has no singular values")
        if largest == 0:
            return np.zeros(matrix.shape[0])
        gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        for columns in matrix.split(GRAM_COLUMNS, 1):
            columns = columns.double() / largest  # squares of 1e-200 or 1e200 would leave the range of float64
            for begin in range(0, len(matrix), GRAM_ROWS):
                end = min(begin + GRAM_ROWS, len(matrix))
                gram[begin:end, :end].addmm_(columns[begin:end], columns[:end].mT)
        values = torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp(min=0.0)
        return (values.sqrt() * largest).cpu().numpy()


def weight_spectrum(weight: Tensor) -> Spectrum:
    """Ranks, power law and outliers of a weight matrix; see `singular_values`, `power_law` and `outliers`.

    For a matrix of zeros all are NaN, `norm` and `outliers` 0. Singular values are computed on the device of `weight`.
    """
    return spectrum_of(singular_values(weight), *weight.shape)


def spectrum_of(s: np.ndarray, rows: int, columns: int) -> Spectrum:
    """Statistics of the singular values `s`, float64, in falling order, of a `rows` x `columns` matrix."""
    if s[0] == 0:
        return Spectrum(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0.0)
    p = s / s.sum()
    p = p[p > 0]
    squares = (s / s[0]) ** 2
    fit = power_law(squares[squares > 1e-14])  # smaller ones are rounding errors
    return Spectrum(
        stable_rank=float(squares.sum()),
        effective_rank=float(np.exp(-(p * np.log(p)).sum())),
        alpha=fit.alpha,
        alpha_error=fit.error,
        alpha_distance=fit.distance,
        outliers=outliers(s, rows, columns),
        norm=float(s[0]),
    )


def power_law(values: np.ndarray) -> PowerLaw:
    """Fit of p(x) ~ x^-alpha, x >= xmin, to positive values (Clauset, Shalizi & Newman 2009, arXiv 0706.1062).

    For each xmin with at least 10 values in the tail, alpha = 1 + n / sum log(x / xmin) maximises the likelihood. The
    fit with the smallest Kolmogorov-Smirnov distance is returned. NaN for fewer than 10 values.
    """
    x = np.sort(np.asarray(values, np.float64))
    logs = np.log(x)
    above = np.cumsum(logs[::-1])[::-1]  # sums of the logarithms of each value and those above it
    best = PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)
    firsts = np.arange(max(0, len(x) - MIN_TAIL + 1))
    tails = len(x) - firsts
    excess = above[firsts] - tails * logs[firsts]
    usable = (excess > 0) & np.concatenate([[True], x[1:] > x[:-1]])[firsts]
    firsts, tails, alphas = firsts[usable], tails[usable], 1 + tails[usable] / excess[usable]
    per_part = max(1, KS_CELLS // max(len(x), 1))
    for part in range(0, len(firsts), per_part):
        first, tail, alpha = (of[part : part + per_part, None] for of in (firsts, tails, alphas))
        at = np.arange(first[0, 0], len(x))[None]  # indices from the first xmin of this part on
        fitted = 1 - np.exp((1 - alpha) * np.maximum(logs[at] - logs[first], 0.0))
        gaps = np.maximum(np.abs((at - first + 1) / tail - fitted), np.abs((at - first) / tail - fitted))
        distances = np.where(at >= first, gaps, 0.0).max(1)
        i = int(distances.argmin())
        if not distances[i] >= best.distance:
            a, n = float(alpha[i, 0]), int(tail[i, 0])
            best = PowerLaw(a, (a - 1) / math.sqrt(n), float(distances[i]), float(x[first[i, 0]]), n)
    return best


def outliers(s: np.ndarray, rows: int, columns: int) -> int:
    """Number of singular values `s` of a `rows` x `columns` matrix above the edge of noise of its size and scale.

    Noise is a matrix of independent entries with mean 0 and equal variance. The variance is estimated from the median
    singular value and the median of the Marchenko-Pastur law of this shape (Gavish & Donoho 2014, arXiv 1305.5870); a
    signal of less than half of the rank hardly changes it. The edge of s^2 / variance, for sides n >= m, is
    ``(sqrt(n - 1) + sqrt(m))^2 + q (sqrt(n - 1) + sqrt(m)) (1 / sqrt(n - 1) + 1 / sqrt(m))^(1/3)`` (Johnstone 2001),
    with q the 99.9 % quantile of the Tracy-Widom law: one of 1000 matrices of pure noise has an outlier.
    """
    n, m = max(rows, columns), min(rows, columns)
    if n < 2:
        return 0
    scale = np.median(s) / math.sqrt(n * marchenko_pastur_median(m / n))
    width = math.sqrt(n - 1) + math.sqrt(m)
    edge = width**2 + TRACY_WIDOM * width * (1 / math.sqrt(n - 1) + 1 / math.sqrt(m)) ** (1 / 3)
    return int((s > scale * math.sqrt(edge)).sum())


def noise_singular_values(rows: int, columns: int) -> np.ndarray:
    """Expected singular values of a matrix of independent entries, mean 0, variance 1; float64, in falling order.

    They are quantiles of the Marchenko-Pastur law: the i-th smallest of m is the (i - 1/2) / m quantile. The singular
    values of a random matrix lie close to them. Nothing is drawn or decomposed.
    """
    n, m = max(rows, columns), min(rows, columns)
    return np.sqrt(n * _marchenko_pastur(m / n, (np.arange(m, 0, -1) - 0.5) / m))


@functools.lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur law: eigenvalues of X X^T / n, X m x n with variance 1, `ratio` m / n in (0, 1].

    Accurate to 1e-7.
    """
    return float(_marchenko_pastur(ratio, np.array(0.5)))


def _marchenko_pastur(ratio: float, shares: np.ndarray) -> np.ndarray:
    """Quantiles of the Marchenko-Pastur law at these `shares`; see `marchenko_pastur_median`.

    The density sqrt((b - x)(x - a)) / (2 pi ratio x) on [a, b], a, b = (1 -+ sqrt(ratio))^2 (Marchenko & Pastur 1967),
    is integrated over the angle t with x = 1 + ratio - 2 sqrt(ratio) cos t, in which it is smooth.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a number above 0 and at most 1, got {ratio}")
    t = np.linspace(0.0, math.pi, MP_POINTS)
    x = 1 + ratio - 2 * math.sqrt(ratio) * np.cos(t)
    density = np.zeros_like(t)
    np.divide(2 * np.sin(t) ** 2, math.pi * x, out=density, where=x > 0)
    if ratio == 1:
        density = (1 + np.cos(t)) / math.pi  # the same without 0 / 0 at t = 0
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return np.interp(below[-1] * shares, below, x)
