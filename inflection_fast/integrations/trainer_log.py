"""Rows of our own in the log of transformers.Trainer: `log_history`, and whatever `report_to` names."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from inflection_fast.integrations.scalars import Scalars
from inflection_fast.integrations.trackers import heat_maps, tracker_of
from inflection_fast.measure import Row
from inflection_fast.timeline import Timeline

__all__ = ["TrainerLog"]

logger = logging.getLogger(__name__)

_WRITERS = ("tb_writer", "_wandb", "_trackio", "_ml_flow")  # where Transformers' reporters keep what they log with


class TrainerLog:
    """Logs finished rows as the Trainer logs its own: into `log_history`, then to the other callbacks' `on_log`.

    A row stands under the `global_step` that its step led to, as the Trainer's loss of that step does. Callbacks that
    only print are left out. The Trainer tells no callback of the others, so the first event that goes through its
    handler after `listen` is listened to.

    Args:
        owner: the callback that logs, which is not called itself.
        keys: patterns of what is logged beside the dozen; see `Scalars`.
    """

    def __init__(self, owner: object, keys: Iterable[str]):
        self._owner, self._scalars = owner, Scalars(keys)
        self._rows: deque[Row] = deque()
        self._epochs: dict[int, float] = {}
        self._handler: Any = None
        self._stop: Callable[[], None] | None = None
        self._failed: set[str] = set()

    def listen(self) -> None:
        """Learn the handler of the callbacks from the next event."""
        patched: Any = CallbackHandler
        original = patched.call_event

        def stop() -> None:
            if patched.call_event is listened:  # else somebody has replaced it after us, and calls us
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
        """Listen no more."""
        if self._stop is not None:
            self._stop()
        self._handler = None

    def take(self, row: Row) -> None:
        """Keep a finished row for the next `write`."""
        self._rows.append(row)

    def measured(self, step: int, epoch: float | None) -> None:
        """A step was measured, in that epoch."""
        if epoch is not None:
            self._epochs[step] = epoch

    def write(self, args: Any, state: Any, control: Any) -> None:
        """Log the rows that were taken."""
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
                self._guarded(callback, callback.on_log, args, of_row, control, logs=dict(logs), **self._known())

    def draw(self, timeline: Timeline) -> None:
        """Log one heat map per signal to the reporters that take images."""
        found = [(callback, getattr(callback, name, None)) for callback in self._others() for name in _WRITERS]
        writers = [(callback, writer) for callback, writer in found if writer is not None]
        if not writers or not len(timeline.steps):
            return
        trackers = [(one, self._guarded(one, tracker_of, writer)) for one, writer in writers]
        for name, figure in heat_maps(timeline):
            for callback, tracker in trackers:
                if tracker is not None:
                    self._guarded(callback, tracker.image, name, figure, int(timeline.steps[-1]) + 1)

    def _others(self) -> list[Any]:
        callbacks = [] if self._handler is None else self._handler.callbacks
        return [one for one in callbacks if one is not self._owner and not _only_prints(one)]

    def _known(self) -> dict[str, Any]:
        names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        return {name: getattr(self._handler, name, None) for name in names}

    def _guarded(self, callback: object, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = type(callback).__name__
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("%s did not take what was measured: %r; the training goes on", name, error)
            return None


def _only_prints(callback: object) -> bool:
    return isinstance(callback, (PrinterCallback, ProgressCallback))
