"""What runs in every Python process under `inflection-fast exec`: it waits for a training, and measures it."""

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
    """Nothing is imported here: what trains is changed when the process imports it."""
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
        out: folder of the first timeline; the next ones go beside it.
        notes: folder in which a file tells why something was not measured.
    """

    def __init__(self, every: int, out: str, notes: str):
        self._every, self._out, self._notes = every, out, Path(notes)
        self._loops: LoopMonitor | None = None

    def _config(self) -> MonitorConfig:
        from inflection_fast.measure import MonitorConfig

        return MonitorConfig(every=self._every)

    def say(self, why: str) -> None:
        """Leave a sentence for the process that prints the verdict."""
        with open(self._notes / f"{os.getpid()}.txt", "a", encoding="utf-8") as file:
            file.write(" ".join(why.split()) + "\n")

    def watch_loops(self, torch: ModuleType) -> None:
        """Any loop with an optimizer of torch."""
        from inflection_fast.integrations.loops import LoopMonitor

        self._loops = LoopMonitor(self._config(), self._out, said=self.say)
        self._loops.start()
        atexit.register(self._loops.close)

    @contextmanager
    def _instead_of_loops(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._loops is not None:
                stack.enter_context(self._loops.suspended())
            yield

    def watch_trainer(self, module: ModuleType) -> None:
        """`Trainer.train` of Transformers, and so the trainers of TRL."""
        child, train = self, module.Trainer.train

        @functools.wraps(train)
        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            from inflection_fast.integrations.callback import InflectionCallback

            with child._instead_of_loops():
                if any(isinstance(one, InflectionCallback) for one in trainer.callback_handler.callbacks):
                    return train(trainer, *args, **kwargs)
                callback = forgiving(InflectionCallback, child.say)(child._config(), child._out, if_exists="new")
                trainer.add_callback(callback)
                try:
                    return train(trainer, *args, **kwargs)
                finally:
                    callback.close()
                    trainer.remove_callback(callback)

        module.Trainer.train = measured

    def watch_lightning(self, module: ModuleType, namespace: str) -> None:
        """`Trainer.fit` of Lightning."""
        child, fit = self, module.Trainer.fit

        @functools.wraps(fit)
        def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            from inflection_fast.integrations.lightning import LightningMonitoring, callback_class

            with child._instead_of_loops():
                if any(isinstance(one, LightningMonitoring) for one in trainer.callbacks):
                    return fit(trainer, *args, **kwargs)
                kind = forgiving(callback_class(namespace), child.say)
                callback = kind(child._config(), child._out, if_exists="new")
                trainer.callbacks.append(callback)
                try:
                    return fit(trainer, *args, **kwargs)
                finally:
                    callback.close()
                    trainer.callbacks.remove(callback)

        module.Trainer.fit = measured


def forgiving(kind: type, said: Callable[[str], None]) -> type:
    """A class of callbacks that lets no exception of its own through: it tells the first, and does nothing more."""

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
                said(f"measuring failed: {error}")
                self.close()

        return call

    ours = [one for one in kind.__mro__ if one.__module__.startswith("inflection_fast.")]
    events = {name for one in ours for name in vars(one) if name.startswith("on_")}
    return type(kind.__name__, (kind,), {"failed": False, **{name: guarded(name) for name in events}})
