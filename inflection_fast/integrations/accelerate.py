"""The monitor as a tracker of Accelerate: an argument of the Accelerator, without changes in the loop."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from accelerate.tracking import GeneralTracker

from inflection_fast.integrations.loops import LoopMonitor
from inflection_fast.integrations.scalars import Scalars
from inflection_fast.integrations.trackers import FailSafe
from inflection_fast.measure import Monitor, MonitorConfig, Row
from inflection_fast.timeline import Timeline

__all__ = ["InflectionTracker"]


class InflectionTracker(GeneralTracker):
    """Measures the model of a training loop of Accelerate, from `init_trackers` to `end_training`.

    ```python
    accelerator = Accelerator(log_with=[InflectionTracker(MonitorConfig(every=10), out="runs/a"), "tensorboard"])
    accelerator.init_trackers("my project")
    ...
    accelerator.end_training()
    ```

    The model is found at its first call in training. A step ends when the optimizer steps, which is right with
    `accumulate`, clipping and mixed precision (`inflection_fast.integrations.loops`). Make the optimizer and call
    `init_trackers` before the first forward pass, in either order. Scalars go to the other trackers of the Accelerator.
    Put this tracker first in `log_with`: then the last scalars are logged before the others are closed.

    Args:
        config: what is measured, and when.
        out: folder of the timeline; if it holds one, a new folder beside it is used.
        keys: patterns of further scalars; see `inflection_fast.integrations.scalars`.
    """

    name = "inflection"
    requires_logging_directory = False
    main_process_only = False

    def __init__(
        self,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008  frozen
        out: str | os.PathLike | None = None,
        *,
        keys: Iterable[str] = (),
    ):
        super().__init__()
        self._scalars, self._safely = Scalars(keys), FailSafe()
        self._loops = LoopMonitor(config, out, on_row=self._log)

    @property
    def tracker(self) -> Monitor | None:
        """The monitor; None before the first forward pass."""
        return self._loops.monitor

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before the first forward pass."""
        if self._loops.monitor is None:
            raise RuntimeError(
                "InflectionTracker.timeline: nothing was measured yet; call init_trackers before the first forward pass"
            )
        return self._loops.monitor.timeline

    def start(self) -> None:
        """Begin to watch the loop. Accelerate calls this in `init_trackers`."""
        self._loops.start()

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """Ignore what the loop logs."""

    def finish(self) -> None:
        """Detach. Accelerate calls this in `end_training`."""
        self._loops.close()

    def _log(self, row: Row) -> None:
        scalars = self._scalars.of(row)
        for tracker in getattr(self._loops.accelerator, "trackers", ()):
            if tracker is not self:
                self._safely(tracker.name, tracker.log, scalars, step=row.step)
