"""A timeline in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .arrow import columns_in, read
from .columns import Column
from .frames import frame_of, html_of, words_of
from .older import STANDARD
from .signals import shapes_of, sizes_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["FILE_NAME", "Timeline", "stack"]

FILE_NAME = "timeline.arrows"


class Timeline:
    """What was measured, in `S` steps, `L` layers (transformer blocks in order) and `H` heads. NaN: no value.

    Every column is an attribute, float64: `timeline.entropy` is [S, L, H] where `timeline.columns["entropy"].axes` is
    ("layer", "head"), [S, L] for ("layer",) and [S] for (). `columns` says of each its unit, label and meaning.
    The columns of `inflection_fast.timeline.older.STANDARD` are attributes always, NaN if they were not asked for:

    * entropy, entropy_se, max_logit, collision, sink, probe_entropy [S, L, H];
    * activation_grad, parameter_grad, delta_cka, delta_cka_se, probe_activation_grad [S, L];
    * loss, skipped, missing_ranks, measure_ms, probe_ms [S].

    Args:
        steps: [S] int64, optimizer steps, strictly increasing.
        layers: names of the blocks.
        meta: format, layers, heads, model, config, versions, columns, axes.
        truncated: a torn end was dropped while loading.
        columns: by name; None: the standard ones among `values`.
        measured: name -> bool array like the column, False where nothing was measured. For other columns this is not
            known, and NaN means either.
        values: the columns by name.
    """

    def __init__(
        self,
        steps: np.ndarray,
        *,
        layers: list[str],
        meta: dict,
        truncated: bool = False,
        columns: Mapping[str, Column] | None = None,
        measured: Mapping[str, np.ndarray] | None = None,
        **values: np.ndarray,
    ):
        self.steps, self.layers, self.meta, self.truncated = steps, layers, meta, truncated
        if columns is None:
            columns = {name: STANDARD[name] for name in values if name in STANDARD}
        unknown = sorted(set(values) - set(columns))
        if unknown:
            raise TypeError(f"values: {unknown} are no columns; expected some of {list(columns)}")
        self.columns: dict[str, Column] = dict(columns)
        self._values, self._measured = values, dict(measured or {})

    def __getattr__(self, name: str) -> np.ndarray:
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        if name in STANDARD and "steps" in self.__dict__:
            shapes = shapes_of(STANDARD, {"layers": self.layers, "heads": self.heads})
            return np.full((len(self.steps), *shapes[name]), np.nan)
        hint = f"; its columns are {sorted(values)}" if not name.startswith("_") else ""
        raise AttributeError(f"this timeline has no column {name!r}{hint}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return words_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)

    def to_pandas(self, by: str = "layer") -> pandas.DataFrame:
        """Every column in one frame, with a row per step ("step"), step and layer ("layer"), or also head ("head").

        Axes beyond that are averaged over what has a value, and what has fewer is repeated. `ValueError` for another
        `by`, `ModuleNotFoundError` without pandas.
        """
        return frame_of(self, by)

    def plot(self, name: str, ax: Axes | None = None, *, layers: Sequence[int] | None = None) -> Axes:
        """Draw a column by layer and step as a map, or as a line for each of `layers`; needs matplotlib.

        `ValueError` for a column that there is not, or that is not by layer.
        """
        from ..report import signal_lines, signal_map

        return signal_map(self, name, ax) if layers is None else signal_lines(self, name, ax, layers=layers)

    @property
    def heads(self) -> int:
        """The number of attention heads `H`: of the widest attention."""
        by_head = [self._values[n].shape[2] for n, c in self.columns.items() if c.axes[:2] == ("layer", "head")]
        return by_head[0] if by_head else self.meta.get("heads", 1)

    @property
    def axes(self) -> dict[str, list[str] | int]:
        """Places, or their number, of the axes of columns other than layers and heads."""
        return dict(self.meta.get("axes", {}))

    def masked(self, name: str) -> np.ndarray:
        """A column as a masked array, masked where nothing was measured; a plain array if that is not known."""
        if name not in self._measured:
            return getattr(self, name)
        return np.ma.array(self._values[name], mask=~self._measured[name])

    @classmethod
    def load(cls, path: str | os.PathLike) -> Timeline:
        """Read a timeline from its file, or from the folder that holds it.

        An incomplete end (the writer was killed, the disk was full) is dropped with a warning, and `truncated` is set.
        `FileNotFoundError` if there is no file, `ValueError` if it is not a timeline.
        """
        path = _file_of(path)
        rows, meta, torn = read(path)
        if torn:
            last = f"after step {rows[-1][0]}" if rows else "before the first step"
            warnings.warn(f"{path} ends in {torn} unreadable bytes {last}; they were dropped", stacklevel=2)
        return stack(rows, meta, truncated=torn > 0)


def _file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no timeline at {path}")
    return path


def stack(rows: list, meta: dict, *, truncated: bool) -> Timeline:
    """A timeline of rows (step, masked columns by name)."""
    columns, sizes = columns_in(meta), sizes_of(meta)
    values, measured = {}, {}
    for name, column in columns.items():
        shape = (len(rows), *(sizes[axis] for axis in column.axes))
        values[name] = np.array([np.ma.getdata(row[name]) for _, row in rows], np.float64).reshape(shape)
        if meta["format"] >= 4:
            measured[name] = ~np.array([np.ma.getmaskarray(row[name]) for _, row in rows], bool).reshape(shape)
            values[name][~measured[name]] = np.nan
    steps = np.array([step for step, _ in rows], np.int64)
    layers = list(meta["layers"])
    return Timeline(steps, layers=layers, meta=meta, truncated=truncated, columns=columns, measured=measured, **values)
