"""A measured step as scalars for a tracker: of each signal the min, mean and max over blocks, and the worst block."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import numpy as np

from inflection_fast.measure import Row
from inflection_fast.timeline import Column

__all__ = ["PREFIX", "Scalars", "headlines", "worst_layer"]

logger = logging.getLogger(__name__)

PREFIX = "inflection/"
_OVER_BLOCKS = ("min", "mean", "max", "worst_layer")
_HIGH, _LOW = {"above", "exploding"}, {"below", "falls_below", "dead"}

Reader = Callable[[np.ma.MaskedArray], float | None]


def headlines(columns: Mapping[str, Column]) -> list[str]:
    """The first column by layer of every quantity, which is logged by default."""
    found: dict[str, str] = {}
    for name, column in columns.items():
        if column.axes[:1] == ("layer",) and column.drawn != "none":
            found.setdefault(column.quantity, name)
    return list(found.values())


def worst_layer(column: Column, values: np.ndarray) -> int:
    """The index of the worst block by the alert rules of a column.

    Of `values` [L] (masked where nothing was measured): the first value that is not finite; else the largest if a rule
    tests for large values, the smallest if one tests for small values, and the one whose logarithm is furthest from the
    median if rules test for both. Without rules: the largest.
    """
    data: np.ndarray = np.ma.filled(np.ma.asarray(values, float), np.nan)
    measured = ~np.ma.getmaskarray(values)
    if (measured & ~np.isfinite(data)).any():
        return int(np.argmax(measured & ~np.isfinite(data)))
    tests = {rule.test for rule in column.alerts}
    if tests & _HIGH and tests & _LOW:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(data)
        data = np.abs(logs - np.nanmedian(logs))
        data[measured & np.isnan(data)] = np.inf  # a norm of 0 among norms of 0
    elif tests & _LOW:
        data = -data
    return int(np.nanargmax(data))


class Scalars:
    """Turns rows into `{"inflection/entropy/min": ..., ...}`.

    By default: `min`, `mean` and `max` over blocks and `worst_layer` (see the function) of the first column of every
    quantity, heads averaged; and `inflection/alerts`, the number of alerts so far. What was not measured in a step has
    no key. `keys` are patterns of further scalars, with or without the prefix; `*` matches anything but a slash:

    * `entropy/layer_07`: one block, heads averaged; `entropy/layer_07/head_03`: one head;
    * `max_logit/*`: `min`, `mean`, `max`, `worst_layer` and every block of another column;
    * `loss`: a column of the step.

    Raises:
        TypeError: `keys` is no sequence of strings.
    """

    def __init__(self, keys: Iterable[str] = ()):
        if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
            raise TypeError(f"keys: expected a sequence of patterns such as 'entropy/layer_*', got {keys!r}")
        self._patterns = [key.removeprefix(PREFIX) for key in keys]
        self._known: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self._readers: list[tuple[str, str, Reader]] = []  # key, column, function that reads the number
        self.alerts = 0

    def of(self, row: Row) -> dict[str, float]:
        """The scalars of a row."""
        shapes = tuple((name, np.shape(value)) for name, value in row.columns.items() if name in row.described)
        if not set(shapes) <= set(self._known):
            self._known = tuple(dict.fromkeys((*self._known, *shapes)))
            self._readers = self._chosen(row.described)
        found = {}
        for key, name, read in self._readers:
            if name in row.columns:
                value = read(np.ma.asarray(row.columns[name], float))
                if value is not None:
                    found[PREFIX + key] = value
        self.alerts += len(row.alerts)
        return found | {PREFIX + "alerts": float(self.alerts)}

    def _chosen(self, columns: Mapping[str, Column]) -> list[tuple[str, str, Reader]]:
        first, unused, chosen = set(headlines(columns)), set(self._patterns), []
        keys = []
        for name, shape in self._known:
            for key, read in _readers(name, columns[name], shape):
                keys.append(key)
                matching = [pattern for pattern in self._patterns if _matches(key, pattern)]
                unused -= set(matching)
                if matching or (name in first and key.rpartition("/")[2] in _OVER_BLOCKS):
                    chosen.append((key, name, read))
        for pattern in unused:
            near = difflib.get_close_matches(pattern, keys, n=3, cutoff=0.3) or keys[:3]
            logger.warning(
                "keys: %r matches nothing that is measured; try %s, ...", pattern, ", ".join(map(repr, near))
            )
        self._patterns = [pattern for pattern in self._patterns if pattern not in unused]
        return chosen


def _matches(key: str, pattern: str) -> bool:
    parts, wanted = key.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _readers(name: str, column: Column, shape: tuple[int, ...]) -> Iterable[tuple[str, Reader]]:
    """Every key of a column, with the function that reads its number from the values of a step."""
    if not shape:
        yield name, _mean
        return
    if column.axes[0] != "layer":
        for place in range(shape[0]):
            yield f"{name}/{_place(column.axes[0], place, shape[0])}", _at(place)
        return
    for how, reduce in (("min", np.min), ("mean", np.mean), ("max", np.max)):
        yield f"{name}/{how}", _over_blocks(reduce)
    yield f"{name}/worst_layer", lambda values: _worst(column, _by_layer(values))
    for layer in range(shape[0]):
        here = f"{name}/{_place('layer', layer, shape[0])}"
        yield here, _at(layer)
        if len(shape) == 2:
            for place in range(shape[1]):
                key = f"{here}/{_place(column.axes[1], place, shape[1])}"
                yield key, _at((layer, place))


def _at(place: int | tuple[int, int]) -> Reader:
    return lambda values: _mean(values[place])


def _over_blocks(reduce: Callable[[np.ndarray], float]) -> Reader:
    return lambda values: _reduced(reduce, _by_layer(values))


def _place(axis: str, index: int, count: int) -> str:
    return f"{axis}_{index:0{max(2, len(str(count - 1)))}d}"


def _by_layer(values: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """[L]: means over the measured values of each block. NaN stays NaN; `np.ma.mean` would mask it."""
    data, mask = (x.reshape(len(values), -1) for x in (np.ma.getdata(values), np.ma.getmaskarray(values)))
    count = (~mask).sum(1)
    return np.ma.array(np.where(mask, 0.0, data).sum(1) / np.maximum(count, 1), mask=count == 0)


def _worst(column: Column, values: np.ma.MaskedArray) -> float | None:
    return None if np.ma.getmaskarray(values).all() else float(worst_layer(column, values))


def _mean(values: np.ma.MaskedArray) -> float | None:
    return _reduced(np.mean, np.ma.asarray(values))


def _reduced(reduce: Callable[[np.ndarray], float], values: np.ma.MaskedArray) -> float | None:
    measured = np.ma.getdata(values)[~np.ma.getmaskarray(values)]
    return float(reduce(measured)) if measured.size else None
