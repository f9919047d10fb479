"""The shapes of the columns of a timeline, and checks of what is written to them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .columns import Column
from .older import STANDARD

__all__ = ["HEAD_SIGNALS", "LAYER_SIGNALS", "STEP_SIGNALS", "checked", "shapes_of", "stored"]

# The columns that every timeline has as attributes, whether or not they were measured.
# Of the training batch, and those that begin with "probe_" of the probe set: [S, L, H], float32; [S, L], float64
HEAD_SIGNALS = tuple(name for name, column in STANDARD.items() if column.axes == ("layer", "head"))
LAYER_SIGNALS = tuple(name for name, column in STANDARD.items() if column.axes == ("layer",))
STEP_SIGNALS = tuple(name for name, column in STANDARD.items() if column.axes == ())


def sizes_of(meta: dict) -> dict[str, int]:
    """The number of places on every axis."""
    own = {axis: len(places) if isinstance(places, list) else places for axis, places in meta.get("axes", {}).items()}
    return {"layer": len(meta["layers"]), "head": meta["heads"], **own}


def shapes_of(columns: Mapping[str, Column], meta: dict) -> dict[str, tuple[int, ...]]:
    """The shape of the values of one step, for all columns."""
    sizes = sizes_of(meta)
    return {name: tuple(sizes[axis] for axis in column.axes) for name, column in columns.items()}


def stored(column: Column) -> type:
    """The dtype of a column in the file: float32 for more than a number per layer."""
    return np.float32 if len(column.axes) > 1 or (column.axes and column.axes != ("layer",)) else np.float64


def checked(values: Mapping, columns: Mapping[str, Column], shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Every column as a copy, masked where nothing was measured.

    A masked array says so; in a plain array NaN means it. `ValueError` names a column that is unknown or does not fit.
    """
    unknown = sorted(set(values) - set(shapes))
    if unknown:
        raise ValueError(f"unknown signals {unknown}: expected some of {list(shapes)}")
    found = {}
    for name, shape in shapes.items():
        dtype = stored(columns[name])
        if name not in values:
            found[name] = np.ma.masked_all(shape, dtype)
            found[name].data[...] = np.nan
            continue
        value = values[name]
        try:
            array: np.ndarray = np.array(np.ma.getdata(value), dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected numbers, got {type(value).__name__}") from error
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        mask = np.ma.getmaskarray(value) if isinstance(value, np.ma.MaskedArray) else np.isnan(array)
        array[mask] = np.nan
        found[name] = np.ma.array(array, mask=mask)
    return found
