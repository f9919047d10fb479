"""Singular values of weight matrices: ranks, power law, and outliers from noise."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.spectrum import Spectrum as SpectrumOfMatrix
from ..ops.spectrum import weight_spectrum
from .arguments import check_count, matrix_names
from .quantity import Accumulator, Column, MeasuredModel, Quantity

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader

__all__ = ["Spectrum", "matrices_of_checkpoint", "spectra_of_checkpoint"]

LEAST_SIDE = 16  # of a matrix that is looked at
GGUF_ROWS = 1024  # that are dequantised at a time
_FIELDS = ("stable_rank", "effective_rank", "alpha", "alpha_error", "alpha_distance", "outliers")


_of_matrix = partial(Column, "1", ("layer", "matrix"), count="measured", drawn="none")


class Spectrum(Quantity):
    """Stable and effective rank, power law and outliers of the singular values of every weight matrix of the blocks.

    With s_1 >= s_2 >= ... the singular values of a matrix (`ops.weight_spectrum` has formulas and sources):
    `spectrum_stable_rank` = sum s^2 / s_1^2; `spectrum_effective_rank` = exp(entropy of s / sum s); `spectrum_alpha`,
    the exponent of a power law of the tail of s^2 (WeightWatcher, arXiv 2102.06571, calls 2 to 6 well trained), with
    its standard error `spectrum_alpha_error` and Kolmogorov-Smirnov distance `spectrum_alpha_distance`; and
    `spectrum_outliers`, how many s stand out of noise of the matrix's size.

    Matrices are those with both sides at least 16. Each is measured in a thread of the lowest importance on a copy on
    the host, while training goes on: about 4 m^3 / 3 + 2 m^2 n operations in float64 for an m x n matrix, m <= n; the
    result is in the next measured step. Every 500 steps where `MonitorConfig.every` is one number. Memory: copies of
    the weights on the host until they are done, one matrix and its Gram matrix in float64, 56 bytes per matrix in the
    packet.
    """

    name = "spectrum"

    def __init__(self, every: int | None = 500):
        check_count("every", every, optional=True)
        self.every = every

    columns = {
        "spectrum_stable_rank": _of_matrix(
            "stable rank", "Sum of the squared singular values over the largest of them."
        ),
        "spectrum_effective_rank": _of_matrix(
            "effective rank", "Exponential of the entropy of the singular values, normalised to a sum of 1."
        ),
        "spectrum_alpha": _of_matrix(
            "power-law exponent", "Exponent of a power law fitted to the tail of the squared singular values."
        ),
        "spectrum_alpha_error": _of_matrix("error of the exponent", "Standard error of the power-law exponent."),
        "spectrum_alpha_distance": _of_matrix(
            "distance of the power law",
            "Largest distance between the distribution functions of the tail and of its fit.",
        ),
        "spectrum_outliers": _of_matrix(
            "singular values above noise", "Singular values above the edge of noise of the matrix's size and scale."
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Give every matrix of a block a place by its name there; `ValueError` where there is none."""
        names = matrix_names(model.blocks, lambda parameter: self.wants(0, "", parameter))
        if not names:
            raise ValueError(
                f"spectrum: the blocks have no matrices of at least {LEAST_SIDE} x {LEAST_SIDE}; leave the quantity out"
            )
        self._places, self._blocks = {name: i for i, name in enumerate(names)}, len(model.blocks)
        self.axes = {"matrix": names}
        self.accumulators = {name: Accumulator(("layer", "matrix"), held="part") for name in (*_FIELDS, "measured")}

    def wants(self, layer: int, name: str, parameter: nn.Parameter) -> bool:
        """Matrices that are not tiny."""
        return parameter.ndim == 2 and min(parameter.shape) >= LEAST_SIDE and parameter.is_floating_point()

    def in_background(self, layer: int, name: str, weight: Tensor) -> Mapping[str, np.ndarray]:
        """The spectrum of one matrix."""
        found = weight_spectrum(weight)
        return {
            key: self._at(layer, name, 1.0 if key == "measured" else getattr(found, key)) for key in self.accumulators
        }

    def _at(self, layer: int, name: str, value: float) -> np.ndarray:
        array = np.zeros((self._blocks, len(self._places)))
        array[layer, self._places[name]] = value
        return array

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What was measured."""
        return {f"spectrum_{name}": sums[name] for name in _FIELDS}


def spectra_of_checkpoint(path: str | Path) -> Iterator[tuple[str, SpectrumOfMatrix]]:
    """Spectra of the matrices of a checkpoint, tensor by tensor, without the model.

    Memory: that of `matrices_of_checkpoint`, and of `ops.singular_values`.

    Args:
        path: as for `matrices_of_checkpoint`.

    Yields:
        (name of the tensor, its `ops.Spectrum`) for every floating-point matrix with both sides at least 16.

    Raises:
        ValueError: there is no such file, or the folder holds none.
    """
    for name, matrix in matrices_of_checkpoint(path):
        yield name, weight_spectrum(matrix)


def matrices_of_checkpoint(path: str | Path | Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The weight matrices of a checkpoint one after the other, as they are stored, or dequantised to float32.

    Memory: the largest matrix; of a GGUF file that is quantised, in float32.

    Args:
        path: a safetensors or GGUF file, a folder of safetensors files (the shards of a checkpoint), which are read in
            the order of their names, or such files.

    Yields:
        (name of the tensor, floating-point ``[m, n]``) for every one with both sides at least 16.

    Raises:
        ValueError: there is no such file, or the folder holds none.
    """
    if isinstance(path, (str, Path)):
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
    else:
        files = list(path)
    if not files:
        raise ValueError(f"path: {path} is no safetensors file and no folder with one")
    for file in files:
        yield from _of_gguf(file) if file.suffix == ".gguf" else _of_safetensors(file)


def _is_matrix(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and min(shape) >= LEAST_SIDE


def _of_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if _is_matrix(tensors.get_slice(name).get_shape())]
    for name in names:
        # Opened for each: pages that were read stay in the memory of the process as long as their file is mapped.
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if tensor.is_floating_point():
            yield name, tensor
        del tensor


def _of_gguf(file: Path) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for tensor in reader.tensors:
        if _is_matrix([int(side) for side in tensor.shape]):
            values = dequantised(tensor.data, tensor.tensor_type)
            forget_pages(reader)
            if np.issubdtype(values.dtype, np.floating):
                yield tensor.name, torch.from_numpy(values)
            del values


def dequantised(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The numbers of a tensor of a GGUF file, as `gguf.dequantize` gives them, in memory of their own.

    Some rows at a time: in one go the library takes twice the memory of its result.
    """
    from gguf.quants import dequantize

    if data.ndim < 2 or len(data) <= GGUF_ROWS:
        return np.array(dequantize(data, kind))
    first = dequantize(data[:GGUF_ROWS], kind)
    found = np.empty((len(data), *first.shape[1:]), first.dtype)
    found[:GGUF_ROWS] = first
    for begin in range(GGUF_ROWS, len(data), GGUF_ROWS):
        found[begin : begin + GGUF_ROWS] = dequantize(data[begin : begin + GGUF_ROWS], kind)
    return found


def forget_pages(reader: GGUFReader) -> None:
    """Let go of the memory of what was read of the file; what is looked at again is read again."""
    mapped = reader.data.base
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)
