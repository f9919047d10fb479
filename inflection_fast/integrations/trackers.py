"""Logging to a tracker: TensorBoard, Weights & Biases, trackio, MLflow, or anything with `log(dict, step)`.

with Monitor(model, config, out="runs/a", on_row=track(SummaryWriter())) as monitor:
    ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from inflection_fast.integrations.scalars import PREFIX, Scalars, headlines
from inflection_fast.measure import Row
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FailSafe", "Track", "Tracker", "heat_maps", "track", "tracker_of"]

logger = logging.getLogger(__name__)


class FailSafe:
    """Calls trackers without raising: the first exception of each tracker is logged as a warning."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def __call__(self, name: str, log: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of `log(*args, **kwargs)` of the tracker `name`; None if it raised."""
        try:
            return log(*args, **kwargs)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("%s did not take what was measured: %r; the training goes on", name, error)
            return None


class Tracker:
    """A tracker that is called with a dict and a step."""

    def __init__(self, target: Any):
        self._log: Callable[..., object] = getattr(target, "log", target)
        self.name = getattr(target, "__name__", type(target).__name__)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Log the scalars of an optimizer step."""
        self._log(scalars, step=step)

    def image(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure, if the tracker takes images."""


class _TensorBoard(Tracker):
    def __init__(self, writer: Any):
        self._writer, self.name = writer, "TensorBoard"

    def log(self, scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def image(self, name: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(name, figure, step)


class _Wandb(Tracker):
    """A run of Weights & Biases. Its step counts the logs of the training; ours is in `inflection/step`."""

    def __init__(self, target: Any):
        run = getattr(target, "run", None) if hasattr(target, "init") else target
        if run is None:
            raise ValueError("track: there is no run of Weights & Biases: call wandb.init first, or pass the run")
        self._run, self.name, self._open_at = run, "Weights & Biases", -1
        run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self._open_at == self._run.step:  # without another log since, ours would be overwritten
            self._run.log({}, commit=True)
        self._run.log({**scalars, f"{PREFIX}step": step}, commit=False)
        self._open_at = self._run.step

    def image(self, name: str, figure: Figure, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(_pixels(figure))}, commit=False)


class _Trackio(Tracker):
    def __init__(self, target: Any):
        super().__init__(target)
        self.name = "trackio"

    def image(self, name: str, figure: Figure, step: int) -> None:
        import trackio

        self._log({name: trackio.Image(_pixels(figure))}, step=step)


class _Mlflow(Tracker):
    def __init__(self, module: Any):
        self._module, self.name = module, "MLflow"

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._module.log_metrics(scalars, step=step)

    def image(self, name: str, figure: Figure, step: int) -> None:
        self._module.log_figure(figure, f"{name}.png")


_BY_PACKAGE = {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}


def tracker_of(target: object) -> Tracker:
    """The Tracker of `target`; see `track`. `TypeError` for a target that is not a tracker."""
    if hasattr(target, "add_scalar"):
        return _TensorBoard(target)
    package = (getattr(target, "__name__", None) or type(target).__module__).partition(".")[0]
    if package in _BY_PACKAGE:
        return _BY_PACKAGE[package](target)
    if not callable(getattr(target, "log", target)):
        raise TypeError(
            "track: expected a SummaryWriter, wandb, trackio, mlflow or a run of theirs, or anything that takes"
            f" log(dict, step=...), got {type(target).__name__}"
        )
    return Tracker(target)


class Track:
    """Logs rows to trackers when it is called; see `track`."""

    def __init__(self, trackers: Iterable[Tracker], keys: Iterable[str] = ()):
        self._trackers, self._scalars = list(trackers), Scalars(keys)
        self._safely = FailSafe()

    def __call__(self, row: Row) -> None:
        """Log the scalars of a row."""
        scalars = self._scalars.of(row)
        for tracker in self._trackers:
            self._safely(tracker.name, tracker.log, scalars, row.step)

    def heat_maps(self, timeline: Timeline) -> None:
        """Log one image per signal, layers by steps. Call it after the training. Needs matplotlib."""
        for name, figure in heat_maps(timeline):
            for tracker in self._trackers:
                self._safely(tracker.name, tracker.image, name, figure, int(timeline.steps[-1]))


def track(*targets: object, keys: Iterable[str] = ()) -> Track:
    """An argument for `Monitor(on_row=...)` that logs every measured step to `targets`.

    ```python
    with Monitor(model, config, out="runs/a", on_row=track(writer, keys=("entropy/layer_07",))) as monitor:
    ```

    Args:
        targets: a `SummaryWriter`; `wandb` or its run; `trackio` or its run; `mlflow` with an active run; or anything
            with `log(dict, step=...)`, or a function with these arguments: other trackers, an Accelerator.
        keys: patterns of further scalars; see `Scalars`.

    If a tracker raises, one warning is logged, and the training goes on. A row is logged some steps after it was
    measured, in the thread of the training, with its own step. Weights & Biases, whose steps only increase, gets this
    step as `inflection/step`.

    Raises:
        TypeError: a target that is not a tracker, or `keys` that are not strings.
        ValueError: no target, or `wandb` without a run.
    """
    if not targets:
        raise ValueError("track: expected at least one tracker, got none")
    return Track([tracker_of(target) for target in targets], keys)


def heat_maps(timeline: Timeline) -> Iterator[tuple[str, Figure]]:
    """(key, figure) of every signal with values, layers by steps. Without matplotlib: a warning and no figures."""
    if find_spec("matplotlib") is None:
        logger.warning("no heat maps are logged, because matplotlib is not installed: pip install matplotlib")
        return
    from inflection_fast.report import signal_map

    for name in headlines(timeline.columns):
        if np.isfinite(getattr(timeline, name)).any():
            figure = signal_map(timeline, name).get_figure(root=True)
            if figure is not None:
                yield f"{PREFIX}{name}/map", figure


def _pixels(figure: Figure) -> np.ndarray:
    """The pixels of a figure, uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
