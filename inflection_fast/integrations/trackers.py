"""What is measured goes to a tracker: TensorBoard, Weights & Biases, trackio, MLflow, or any `log(dict, step)`.

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

__all__ = ["Track", "Tracker", "heat_maps", "track", "tracker_of"]

logger = logging.getLogger(__name__)


class Tracker:
    """Somewhere to log to: anything that is called with a dict and a step."""

    def __init__(self, target: Any):
        self._log: Callable[..., object] = getattr(target, "log", target)
        self.name = getattr(target, "__name__", type(target).__name__)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Log the numbers of an optimizer step."""
        self._log(scalars, step=step)

    def image(self, name: str, figure: Figure, step: int) -> None:
        """Log a figure; nothing where the tracker takes none."""


class _TensorBoard(Tracker):
    def __init__(self, writer: Any):
        self._writer, self.name = writer, "TensorBoard"

    def log(self, scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def image(self, name: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(name, figure, step)


class _Wandb(Tracker):
    """A run of Weights & Biases, whose own step belongs to whoever logs the training: ours is `inflection/step`."""

    def __init__(self, target: Any):
        run = getattr(target, "run", None) if hasattr(target, "init") else target
        if run is None:
            raise ValueError("track: there is no run of Weights & Biases: call wandb.init first, or pass the run")
        self._run, self.name, self._open_at = run, "Weights & Biases", -1
        run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self._open_at == self._run.step:  # nobody else has logged since: ours would be overwritten
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
    """How to log to `target`; see `track`. `TypeError` if there is no way."""
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
    """Logs every row that it is called with to its trackers; see `track`."""

    def __init__(self, trackers: Iterable[Tracker], keys: Iterable[str] = ()):
        self._trackers, self._scalars = list(trackers), Scalars(keys)
        self._failed: set[str] = set()

    def __call__(self, row: Row) -> None:
        """Log the scalars of a row."""
        scalars = self._scalars.of(row)
        for tracker in self._trackers:
            self._guarded(tracker, tracker.log, scalars, row.step)

    def heat_maps(self, timeline: Timeline) -> None:
        """Log one image per signal, layers by steps; call it when the training has ended. Needs matplotlib."""
        for name, figure in heat_maps(timeline):
            for tracker in self._trackers:
                self._guarded(tracker, tracker.image, name, figure, int(timeline.steps[-1]))

    def _guarded(self, tracker: Tracker, log: Callable[..., None], *values: object) -> None:
        try:
            log(*values)
        except Exception as error:
            if tracker.name not in self._failed:
                self._failed.add(tracker.name)
                logger.warning("%s did not take what was measured: %r; the training goes on", tracker.name, error)


def track(*targets: object, keys: Iterable[str] = ()) -> Track:
    """What `Monitor(on_row=...)` takes, to log every measured step to `targets`.

    ```python
    with Monitor(model, config, out="runs/a", on_row=track(writer, keys=("entropy/layer_07",))) as monitor:
    ```

    Args:
        targets: a `SummaryWriter`; `wandb` or its run; `trackio` or its run; `mlflow` with a run that is active; or
            anything with `log(dict, step=...)`, or that is called so: other trackers, an Accelerator, a function.
        keys: patterns of what is logged beside the dozen keys that always are; see `Scalars`.

    A tracker that raises is told in one warning, and the training goes on. A row is logged some steps after it was
    measured, by the thread of the training, under its own step; Weights & Biases, whose steps only grow, gets it as
    `inflection/step`.

    Raises:
        TypeError: a target that nothing can be logged to, or `keys` that are no strings.
        ValueError: no target, or `wandb` without a run.
    """
    if not targets:
        raise ValueError("track: expected at least one tracker, got none")
    return Track([tracker_of(target) for target in targets], keys)


def heat_maps(timeline: Timeline) -> Iterator[tuple[str, Figure]]:
    """(key, figure) of every signal that has values, layers by steps. Nothing where matplotlib is not installed."""
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
    """[height, width, 3] uint8 of what a figure shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
