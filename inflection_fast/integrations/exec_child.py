"""Runs in every Python process under `inflection-fast exec`: waits for a training, and measures it."""

from __future__ import annotations

import atexit
import functools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from inflection_fast.integrations.after_import import when_imported

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inflection_fast.integrations.loops import LoopMonitor
    from inflection_fast.measure import MonitorConfig

__all__ = ["VARIABLE", "start"]

VARIABLE = "INFLECTION_FAST_EXEC"  # JSON: every, out, notes
_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def start() -> None:
    """Patch what trains when the process imports it. Nothing is imported here."""
    try:
        settings = json.loads(os.environ[VARIABLE])
    except (KeyError, ValueError):
        return
    child = _Child(**settings)
    when_imported("torch", child.watch_loops)
    when_imported("transformers.trainer", child.watch_trainer)
    for namespace in _NAMESPACES:
        when_imported(f"{namespace}.trainer.trainer", functools.partial(child.watch_lightning, namespace=namespace))


class _Child:
    """The trainings of one process.

    Args:
        every: as in `MonitorConfig`.
        out: folder of the first timeline; later ones are beside it.
        notes: folder for messages to the process that prints the verdict.
    """

    def __init__(self, every: int, out: str, notes: str):
        self._every, self._out, self._notes = every, out, Path(notes)
        self._loops: LoopMonitor | None = None

    def _config(self) -> MonitorConfig:
        from inflection_fast.measure import MonitorConfig

        return MonitorConfig(every=self._every)

    def say(self, why: str) -> None:
        """Write a message for the process that prints the verdict: why something was not measured."""
        with open(self._notes / f"{os.getpid()}.txt", "a", encoding="utf-8") as file:
            file.write(" ".join(why.split()) + "\n")

    def watch_loops(self, torch: ModuleType) -> None:
        """Measure any loop with an optimizer of torch."""
        from inflection_fast.integrations.loops import LoopMonitor

        self._loops = LoopMonitor(self._config(), self._out, report=self.say)
        self._loops.start()
        atexit.register(self._loops.close)

    @contextmanager
    def _measured_by(self, kind: type, callbacks: list[Any], known: type) -> Iterator[None]:
        """Train with a callback of class `kind`, unless one of class `known` measures; the loop monitor pauses."""
        with ExitStack() as stack:
            if self._loops is not None:
                stack.enter_context(self._loops.suspended())
            if not any(isinstance(callback, known) for callback in callbacks):
                ours = fail_safe(kind, self.say)(self._config(), self._out, if_exists="new")
                callbacks.append(ours)
                stack.callback(callbacks.remove, ours)
                stack.callback(ours.close)
            yield

    def watch_trainer(self, module: ModuleType) -> None:
        """Measure `Trainer.train` of Transformers, which the trainers of TRL use too."""
        train = module.Trainer.train

        @functools.wraps(train)
        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            from inflection_fast.integrations.callback import InflectionCallback

            with self._measured_by(InflectionCallback, trainer.callback_handler.callbacks, InflectionCallback):
                return train(trainer, *args, **kwargs)

        module.Trainer.train = measured

    def watch_lightning(self, module: ModuleType, namespace: str) -> None:
        """Measure `Trainer.fit` of Lightning."""
        fit = module.Trainer.fit

        @functools.wraps(fit)
        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            from inflection_fast.integrations.lightning import LightningMonitoring, callback_class

            with self._measured_by(callback_class(namespace), trainer.callbacks, LightningMonitoring):
                return fit(trainer, *args, **kwargs)

        module.Trainer.fit = measured


def fail_safe(kind: type, report: Callable[[str], None]) -> type:
    """A class of callbacks that raises no exception: it reports the first one, and does nothing afterwards."""

    def guarded(name: str) -> Callable[..., None]:
        method = getattr(kind, name)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            if self.failed:
                return
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.failed = True
                report(f"measuring failed: {error}")
                self.close()

        return call

    ours = [one for one in kind.__mro__ if one.__module__.startswith("inflection_fast.")]
    events = {name for one in ours for name in vars(one) if name.startswith("on_")}
    return type(kind.__name__, (kind,), {"failed": False, **{name: guarded(name) for name in events}})
