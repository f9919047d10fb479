"""Spectra of weight matrices, compared with random matrices of their sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from inflection_fast.checkpoints.files import Source
from inflection_fast.checkpoints.memory import trim_memory
from inflection_fast.checkpoints.numbers import finite_or_none
from inflection_fast.checkpoints.threads import threads_for
from inflection_fast.ops import weight_spectrum
from inflection_fast.ops.spectrum import Spectrum, noise_singular_values, spectrum_of
from inflection_fast.quantities.spectrum import matrices_of_checkpoint

__all__ = ["MatrixSpectrum", "spectra"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class MatrixSpectrum:
    """Statistics of the singular values of a matrix, and of a random matrix of its size; None: no value."""

    name: str
    layer: int | None  # the first number in its name
    kind: str  # its name without that
    shape: tuple[int, int]
    norm: float | None  # None: it holds NaN or infinity
    stable_rank: float | None
    effective_rank: float | None
    alpha: float | None
    outliers: int
    random_stable_rank: float
    random_effective_rank: float
    random_alpha: float | None


def spectra(source: Source, *, progress: Callable[[int], None] = lambda done: None) -> list[MatrixSpectrum]:
    """The spectra of all matrices of a checkpoint, and those of random matrices (`ops.noise_singular_values`).

    Memory: the largest matrix as it is stored (dequantised, in float32), and what `ops.singular_values` takes.
    """
    random: dict[tuple[int, int], Spectrum] = {}
    found = []
    for name, matrix in matrices_of_checkpoint(source.weights):
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        try:
            with threads_for(min(shape) ** 3):  # of the eigenvalues, a long row of small operations
                said = weight_spectrum(matrix)
        except ValueError:  # it holds NaN or infinity
            said = Spectrum(math.nan, math.nan, math.nan, math.nan, math.nan, 0, math.nan)
        del matrix  # before the next one is read
        trim_memory()
        size = (min(shape), max(shape))
        if size not in random:
            random[size] = spectrum_of(noise_singular_values(*size), *size)
        null = random[size]
        number = _NUMBER.search(name)
        found.append(
            MatrixSpectrum(
                name=name,
                layer=None if number is None else int(number[1]),
                kind=_NUMBER.sub(".", name, count=1).strip("."),
                shape=shape,
                norm=finite_or_none(said.norm),
                stable_rank=finite_or_none(said.stable_rank),
                effective_rank=finite_or_none(said.effective_rank),
                alpha=finite_or_none(said.alpha),
                outliers=said.outliers,
                random_stable_rank=null.stable_rank,
                random_effective_rank=null.effective_rank,
                random_alpha=finite_or_none(null.alpha),
            )
        )
        progress(len(found))
    return found
