"""Singular values of weight matrices, and what they say: ranks, a power law, and what stands out of noise."""

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
LEAST_TAIL = 10  # eigenvalues that a power law is fitted to
KS_CELLS = 2**18  # differences of distribution functions that are held at a time
GRAM_COLUMNS = 1024  # of the longer side that are in float64 at a time
GRAM_ROWS = 512  # of the lower triangle of a Gram matrix that are made at a time


class PowerLaw(NamedTuple):
    """A power law p(x) ~ x^-alpha for x >= xmin."""

    alpha: float
    """The exponent."""
    error: float
    """Its standard error, (alpha - 1) / sqrt(tail)."""
    distance: float
    """Largest distance between the distribution functions of the fit and of the tail (Kolmogorov-Smirnov)."""
    xmin: float
    """Where the tail begins."""
    tail: int
    """How many values are in it."""


class Spectrum(NamedTuple):
    """What the singular values s of a matrix say."""

    stable_rank: float
    """||W||_F^2 / s_1^2."""
    effective_rank: float
    """exp of the entropy of s / sum s (Roy & Vetterli 2007)."""
    alpha: float
    """Exponent of the power law of the tail of s^2."""
    alpha_error: float
    """Its standard error."""
    alpha_distance: float
    """Kolmogorov-Smirnov distance of the fit."""
    outliers: int
    """How many s stand out of noise of the matrix's size and scale."""
    norm: float
    """s_1."""


def singular_values(weight: Tensor) -> np.ndarray:
    """Singular values of a matrix, float64, falling, from the eigenvalues of W W^T or W^T W, whichever is smaller.

    The product is summed in float64, so a singular value s errs by about 1e-16 s_1^2 / s: by 1e-9 of s_1 where it is
    1e-7 of s_1, and what is below 1e-8 s_1 is noise. Memory beside the matrix: twice its smaller Gram matrix in
    float64, and 1024 of its columns (rows), however long its longer side is. Of the Gram matrix the lower triangle is
    made, which is all that the eigenvalues are taken from.

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
        low, high = weight.aminmax()  # of a transposed one a copy would be made
        largest = torch.maximum(-low, high).double()
        if not torch.isfinite(largest):
            raise ValueError("weight: holds NaN or infinity, so it has no singular values")
        if largest == 0:
            return np.zeros(matrix.shape[0])
        gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
        for columns in matrix.split(GRAM_COLUMNS, 1):
            columns = columns.double() / largest  # squares of 1e-200 or 1e200 are no numbers
            for begin in range(0, len(matrix), GRAM_ROWS):
                end = min(begin + GRAM_ROWS, len(matrix))
                gram[begin:end, :end].addmm_(columns[begin:end], columns[:end].mT)
        values = torch.linalg.eigvalsh(gram, UPLO="L").flip(0).clamp(min=0.0)
        return (values.sqrt() * largest).cpu().numpy()


def weight_spectrum(weight: Tensor) -> Spectrum:
    """Ranks, power law and outliers of a weight matrix; see `singular_values`, `power_law` and `outliers`.

    A matrix of zeros has NaN everywhere, and 0 outliers. Runs where `weight` is; the statistics on the host.
    """
    return spectrum_of(singular_values(weight), *weight.shape)


def spectrum_of(s: np.ndarray, rows: int, columns: int) -> Spectrum:
    """What the singular values `s` of a `rows` x `columns` matrix say; float64, falling."""
    if s[0] == 0:
        return Spectrum(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0.0)
    p = s / s.sum()
    p = p[p > 0]
    squares = (s / s[0]) ** 2
    fit = power_law(squares[squares > 1e-14])  # below it there is rounding
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

    For every xmin among the values that leaves at least 10 in the tail, alpha = 1 + n / sum log(x / xmin) maximises the
    likelihood; the xmin with the smallest Kolmogorov-Smirnov distance wins. NaN for fewer than 10 values.
    """
    x = np.sort(np.asarray(values, np.float64))
    logs = np.log(x)
    above = np.cumsum(logs[::-1])[::-1]  # sums of the logarithms from each value on
    best = PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)
    firsts = np.arange(max(0, len(x) - LEAST_TAIL + 1))
    tails = len(x) - firsts
    excess = above[firsts] - tails * logs[firsts]
    usable = (excess > 0) & np.concatenate([[True], x[1:] > x[:-1]])[firsts]
    firsts, tails, alphas = firsts[usable], tails[usable], 1 + tails[usable] / excess[usable]
    per_part = max(1, KS_CELLS // max(len(x), 1))
    for part in range(0, len(firsts), per_part):
        first, tail, alpha = (of[part : part + per_part, None] for of in (firsts, tails, alphas))
        at = np.arange(first[0, 0], len(x))[None]  # values from the first start of this part on
        fitted = 1 - np.exp((1 - alpha) * np.maximum(logs[at] - logs[first], 0.0))
        gaps = np.maximum(np.abs((at - first + 1) / tail - fitted), np.abs((at - first) / tail - fitted))
        distances = np.where(at >= first, gaps, 0.0).max(1)
        i = int(distances.argmin())
        if not distances[i] >= best.distance:
            a, n = float(alpha[i, 0]), int(tail[i, 0])
            best = PowerLaw(a, (a - 1) / math.sqrt(n), float(distances[i]), float(x[first[i, 0]]), n)
    return best


def outliers(s: np.ndarray, rows: int, columns: int) -> int:
    """How many singular values `s` of a `rows` x `columns` matrix are above the edge of noise of its size and scale.

    Noise is a matrix of independent numbers with mean 0 and one variance. Its scale is taken from the median singular
    value and the median of the Marchenko-Pastur law of this shape (Gavish & Donoho 2014, arXiv 1305.5870), which a
    signal of less than half of the rank hardly moves. The edge of s^2, in units of the variance, with n >= m the sides:
    (sqrt(n - 1) + sqrt(m))^2, and above it q (sqrt(n - 1) + sqrt(m)) (1 / sqrt(n - 1) + 1 / sqrt(m))^(1/3), where the
    largest value of noise fluctuates (Johnstone 2001), q the 99.9 % quantile of the Tracy-Widom law: of 1000 matrices
    of pure noise one has an outlier.
    """
    n, m = max(rows, columns), min(rows, columns)
    if n < 2:
        return 0
    scale = np.median(s) / math.sqrt(n * marchenko_pastur_median(m / n))
    width = math.sqrt(n - 1) + math.sqrt(m)
    edge = width**2 + TRACY_WIDOM * width * (1 / math.sqrt(n - 1) + 1 / math.sqrt(m)) ** (1 / 3)
    return int((s > scale * math.sqrt(edge)).sum())


def noise_singular_values(rows: int, columns: int) -> np.ndarray:
    """Where the singular values of a matrix of independent numbers with mean 0 and variance 1 lie, float64, falling.

    They are quantiles of the Marchenko-Pastur law: below the i-th smallest of m lies the share (i - 1/2) / m. Those of
    a drawn matrix lie close to them, as singular values repel each other; nothing is drawn and nothing decomposed.
    """
    n, m = max(rows, columns), min(rows, columns)
    return np.sqrt(n * _marchenko_pastur(m / n, (np.arange(m, 0, -1) - 0.5) / m))


@functools.lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the eigenvalues of X X^T / n, X m x n of independent numbers with variance 1, `ratio` m / n in (0, 1].

    To 1e-7.
    """
    return float(_marchenko_pastur(ratio, np.array(0.5)))


def _marchenko_pastur(ratio: float, shares: np.ndarray) -> np.ndarray:
    """The eigenvalues below which these shares of the Marchenko-Pastur law lie, see `marchenko_pastur_median`.

    The density sqrt((b - x)(x - a)) / (2 pi ratio x) on [a, b], a, b = (1 -+ sqrt(ratio))^2 (Marchenko & Pastur 1967),
    is integrated over an angle, in which it has no edges: x = 1 + ratio - 2 sqrt(ratio) cos t.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a number above 0 and at most 1, got {ratio}")
    t = np.linspace(0.0, math.pi, MP_POINTS)
    x = 1 + ratio - 2 * math.sqrt(ratio) * np.cos(t)
    density = np.zeros_like(t)
    np.divide(2 * np.sin(t) ** 2, math.pi * x, out=density, where=x > 0)
    if ratio == 1:
        density = (1 + np.cos(t)) / math.pi  # the same, with the 0 / 0 at t = 0 cancelled
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return np.interp(below[-1] * shares, below, x)
