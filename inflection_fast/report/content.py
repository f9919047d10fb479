"""The contents of the page of a run, read row by row: the run may be very long, or still be training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from inflection_fast.alerts import Alert, AlertWatch
from inflection_fast.decide import Plan
from inflection_fast.report import folder as run_files
from inflection_fast.report.buckets import Buckets
from inflection_fast.timeline import Timeline, columns_in
from inflection_fast.timeline.columns import Column
from inflection_fast.timeline.means import finite_mean
from inflection_fast.timeline.tail import TimelineTail
from inflection_fast.timeline.timeline import FILE_NAME

__all__ = ["Content", "Measured", "Series", "timeline_of"]

MAP_COLUMNS = (256, 1024)  # minimum and maximum columns of a map of layers and steps
MAP_CELLS = 2**16  # cells of such a map, within these limits
HEAD_COLUMNS = (16, 1024)  # the same for maps of heads
HEAD_CELLS = 2**18  # of the maps of heads of all layers together
MOST_ALERTS = 2000  # shown alerts: the first and the last half of more
PAIRS = ("layer", "other_layer")  # axes of columns that are drawn as matrices
_ERROR = "_se"  # what the name of a column of standard errors ends in


@dataclass(frozen=True)
class Measured:
    """The parts of a timeline that the words of a report need."""

    steps: np.ndarray
    missing_ranks: np.ndarray
    measure_ms: np.ndarray
    padded_rows: np.ndarray
    layers: list[str]
    heads: int
    meta: dict
    truncated: bool


@dataclass
class Series:
    """One column of the timeline, reduced."""

    column: Column
    places: Buckets  # by layer where there is one, over everything else
    parts: Buckets | None = None  # by all its axes, where there are more


@dataclass
class Content:
    """A run folder, or a folder with a timeline alone, in its present state. `update` reads on."""

    folder: Path
    run: run_files.Run = field(init=False)
    series: dict[str, Series] = field(init=False, default_factory=dict)
    version: int = field(init=False, default=0)  # goes up with every change

    def __post_init__(self):
        self.folder = Path(self.folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a run folder: there is no such folder.")
        self._stamps: Any = None
        self._tail: TimelineTail | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.series = {}
        self.alerts: list[Alert] = []
        self.alerts_in_all = 0
        self._watch = AlertWatch()
        self._steps: list[int] = []
        self._raw: dict[str, list[float]] = {"missing_ranks": [], "measure_ms": [], "padded_rows": []}
        self._restarts = 0

    # ---- reading -----------------------------------------------------------------------------------------------------

    def update(self) -> bool:
        """Read new data; returns whether there is any. `ValueError` names a file that cannot be read."""
        changed = self._read_files()
        changed |= self._read_timeline()
        if changed or not self.version:
            # `Measured` has all attributes of a timeline that words need.
            self.run = dataclasses.replace(self._facts, timeline=cast("Timeline | None", self.measured))
            self.version += 1
        return changed

    def _read_files(self) -> bool:
        files = ("run.json", "plan.json", "config.yaml")
        paths = [*(self.folder / name for name in files), *sorted(self.folder.glob("*/stage.json"))]
        stamps = [(path, found.st_mtime_ns, found.st_size) for path in paths if (found := _stat(path))]
        if stamps == self._stamps:
            return False
        if (self.folder / "run.json").is_file():
            self._facts = run_files.read(self.folder, timeline=False)
        else:
            self._facts = _bare(self.folder)
        self._stamps = stamps
        return True

    def _read_timeline(self) -> bool:
        path = timeline_of(self.folder)
        if self._tail is None or self._tail.path != path:
            self._tail = TimelineTail(path)
            self._start_over()
        before, torn = len(self._steps), self._tail.torn
        for step, values in self._tail.rows():
            if self._tail.restarts != self._restarts:
                self._start_over()
                self._restarts, before = self._tail.restarts, -1
            self._add(step, values)
        if self._tail.restarts != self._restarts:  # replaced by one without a row
            self._start_over()
            self._restarts, before = self._tail.restarts, -1
        return len(self._steps) != before or torn != self._tail.torn

    def _add(self, step: int, values: dict[str, np.ndarray]) -> None:
        if not self.series:
            columns = columns_in((self._tail.meta if self._tail is not None else None) or {})
            self._watch = AlertWatch(columns=columns)
            for name, column in columns.items():
                if name in values and column.drawn != "none":
                    self.series[name] = self._series(name, column, np.shape(values[name]))
        self._steps.append(step)
        for name, kept in self._raw.items():
            kept.append(float(np.ma.filled(values.get(name, np.nan), np.nan)))
        found = self._watch.push(step, values)
        self.alerts_in_all += len(found)
        self.alerts += found
        if len(self.alerts) > MOST_ALERTS:
            half = MOST_ALERTS // 2
            del self.alerts[half : len(self.alerts) - half]
        for name, series in self.series.items():
            if name in values:
                _push(series, step, np.ma.filled(np.ma.array(values[name], np.float64), np.nan))  # masked: not measured

    def _series(self, name: str, column: Column, shape: tuple[int, ...]) -> Series:
        if column.axes[:1] != ("layer",):
            return Series(column, Buckets((), MAP_COLUMNS[1]))
        places = Buckets(shape[:1], _even(MAP_CELLS // shape[0], MAP_COLUMNS))
        if len(shape) == 1 or name.endswith(_ERROR):
            return Series(column, places)
        return Series(column, places, Buckets(shape, _even(HEAD_CELLS // int(np.prod(shape)), HEAD_COLUMNS)))

    # ---- what was read -----------------------------------------------------------------------------------------------

    @property
    def measured(self) -> Measured | None:
        """The parts of the timeline that words need; None while there is none."""
        if self._tail is None or self._tail.meta is None:
            return None
        meta = self._tail.meta
        numbers = {name: np.array(kept, np.float64) for name, kept in self._raw.items()}
        steps = np.array(self._steps, np.int64)
        return Measured(
            steps, **numbers, layers=meta["layers"], heads=meta["heads"], meta=meta, truncated=self._tail.torn
        )


def timeline_of(folder: Path) -> Path:
    """The path of the timeline of a run folder, which need not exist yet, or of a folder with a timeline alone."""
    inside = folder / "measure" / FILE_NAME
    return inside if inside.exists() or (folder / "run.json").exists() else folder / FILE_NAME


def _bare(folder: Path) -> run_files.Run:
    """The `out` folder of a Monitor: a timeline, and a plan if there is one."""
    plan = folder / "plan.json"
    return run_files.Run(folder, (), {}, None, None, plan=Plan.load(plan) if plan.is_file() else None)


def _push(series: Series, step: int, values: np.ndarray) -> None:
    """Add one step to the buckets by layer, over all other axes, and to those by all axes."""
    kept = len(series.places.shape)
    if values.ndim == kept:
        series.places.push(step, values)
        return
    if series.parts is not None:
        series.parts.push(step, values)
    flat = values.reshape(*values.shape[:kept], -1)
    finite = np.isfinite(flat)
    low, high = np.where(finite, flat, np.inf).min(-1), np.where(finite, flat, -np.inf).max(-1)
    series.places.push(step, finite_mean(flat, -1), finite.sum(-1), low, high)


def _even(wanted: int, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], wanted)) // 2 * 2


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
