"""Our rows in the log of transformers.Trainer: `log_history`, and the reporters of `report_to`."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from inflection_fast.integrations.scalars import Scalars
from inflection_fast.integrations.trackers import FailSafe, heat_maps, tracker_of
from inflection_fast.measure import Row
from inflection_fast.timeline import Timeline

__all__ = ["TrainerLog"]

_WRITERS = ("tb_writer", "_wandb", "_trackio", "_ml_flow")  # attributes of Transformers' reporters


class TrainerLog:
    """Logs finished rows as the Trainer logs its own: into `log_history`, then to the other callbacks' `on_log`.

    A row has the `global_step` after its step, as the Trainer's loss of that step. Callbacks that only print are left
    out. A callback does not know the others, so `listen` takes the callback handler from its next event.

    Args:
        owner: the callback that logs. Its own `on_log` is not called.
        keys: patterns of further scalars; see `Scalars`.
    """

    def __init__(self, owner: object, keys: Iterable[str]):
        self._owner, self._scalars = owner, Scalars(keys)
        self._rows: deque[Row] = deque()
        self._epochs: dict[int, float] = {}
        self._handler: Any = None
        self._stop: Callable[[], None] | None = None
        self._safely = FailSafe()

    def listen(self) -> None:
        """Take the callback handler from the next event."""
        patched: Any = CallbackHandler
        original = patched.call_event

        def stop() -> None:
            if patched.call_event is listened:  # else a later replacement calls ours
                patched.call_event = original
            self._stop = None

        def listened(handler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._handler is None and any(one is self._owner for one in handler.callbacks):
                self._handler = handler
                stop()
            return original(handler, *args, **kwargs)

        self._stop = stop
        patched.call_event = listened

    def close(self) -> None:
        """Stop listening."""
        if self._stop is not None:
            self._stop()
        self._handler = None

    def take(self, row: Row) -> None:
        """Keep a finished row for the next `write`."""
        self._rows.append(row)

    def measured(self, step: int, epoch: float | None) -> None:
        """Note the epoch of a measured step."""
        if epoch is not None:
            self._epochs[step] = epoch

    def write(self, args: Any, state: Any, control: Any) -> None:
        """Log the rows that `take` has kept."""
        while self._rows:
            row = self._rows.popleft()
            logs = self._scalars.of(row)
            epoch = self._epochs.pop(row.step, None)
            if epoch is not None:
                logs["epoch"] = epoch
            of_row = copy.copy(state)
            of_row.global_step = row.step + 1
            state.log_history.append({**logs, "step": row.step + 1})
            for callback in self._others():
                options = {"logs": dict(logs), **self._known()}
                self._safely(type(callback).__name__, callback.on_log, args, of_row, control, **options)

    def draw(self, timeline: Timeline) -> None:
        """Log one heat map per signal to the reporters that take images."""
        found = [(type(one).__name__, getattr(one, name, None)) for one in self._others() for name in _WRITERS]
        trackers = [(name, self._safely(name, tracker_of, writer)) for name, writer in found if writer is not None]
        if not trackers or not len(timeline.steps):
            return
        for key, figure in heat_maps(timeline):
            for name, tracker in trackers:
                if tracker is not None:
                    self._safely(name, tracker.image, key, figure, int(timeline.steps[-1]) + 1)

    def _others(self) -> list[Any]:
        callbacks = [] if self._handler is None else self._handler.callbacks
        prints = (PrinterCallback, ProgressCallback)
        return [one for one in callbacks if one is not self._owner and not isinstance(one, prints)]

    def _known(self) -> dict[str, Any]:
        names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        return {name: getattr(self._handler, name, None) for name in names}
