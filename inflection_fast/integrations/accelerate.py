"""The monitor as a tracker of Accelerate: one argument of the Accelerator, and no line in the loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from accelerate.tracking import GeneralTracker

from inflection_fast.integrations.loops import LoopMonitor
from inflection_fast.integrations.scalars import Scalars
from inflection_fast.measure import Monitor, MonitorConfig, Row
from inflection_fast.timeline import Timeline

__all__ = ["InflectionTracker"]

logger = logging.getLogger(__name__)


class InflectionTracker(GeneralTracker):
    """Measures the model of a training loop of Accelerate, from `init_trackers` to `end_training`.

    ```python
    accelerator = Accelerator(log_with=[InflectionTracker(MonitorConfig(every=10), out="runs/a"), "tensorboard"])
    accelerator.init_trackers("my project")
    ...
    accelerator.end_training()
    ```

    The model is found when it is first called for training, and a step ends where the optimizer steps, so that
    `accumulate`, clipping and mixed precision count as they should (`inflection_fast.integrations.loops`). Make the
    optimizer and call `init_trackers` before the first forward pass, in either order. Scalars go to the other trackers
    of the Accelerator; it comes first in `log_with`, so that the last ones are logged before those are closed.

    Args:
        config: what and when.
        out: folder of the timeline; a timeline that is there is kept, and a new folder beside it is taken.
        keys: patterns of scalars beside the dozen; see `inflection_fast.integrations.scalars`.
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
        self._scalars, self._told = Scalars(keys), set[str]()
        self._loops = LoopMonitor(config, out, on_row=self._log)

    @property
    def tracker(self) -> Monitor | None:
        """The monitor; None before the first forward pass."""
        return self._loops.monitor

    @property
    def timeline(self) -> Timeline:
        """What was measured so far. `RuntimeError` before anything was."""
        if self._loops.monitor is None:
            raise RuntimeError(
                "InflectionTracker.timeline before a model was trained: nothing was measured; call init_trackers before"
                " the first forward pass"
            )
        return self._loops.monitor.timeline

    def start(self) -> None:
        """Accelerate calls it in `init_trackers`."""
        self._loops.start()

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        """What the loop logs is nothing to measure."""

    def finish(self) -> None:
        """Accelerate calls it in `end_training`."""
        self._loops.close()

    def _log(self, row: Row) -> None:
        scalars = self._scalars.of(row)
        for one in getattr(self._loops.accelerator, "trackers", ()):
            if one is not self:
                try:
                    one.log(scalars, step=row.step)
                except Exception as error:
                    if one.name not in self._told:
                        self._told.add(one.name)
                        logger.warning("%s did not take what was measured: %r; the training goes on", one.name, error)
