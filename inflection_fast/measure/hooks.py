"""Hooks that cost a step its values and not the training, and that go again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter

__all__ = ["Nothing", "forgiving", "removed"]


def forgiving(hook):
    """A hook that fails costs the step its values. Before a first step was measured, it is an error of the set-up."""

    @wraps(hook)
    def guarded(self, *args):
        if self.failure is not None:
            return None
        started = perf_counter()
        try:
            return hook(self, *args)
        except Exception as error:
            if not self.forgives:
                raise
            self.failure = error
            return None
        finally:
            self.seconds += perf_counter() - started

    return guarded


class Nothing:
    """What taps are to a model that was read from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _forward_begins = _forward_ends = _block_begins = _block_ends = _do_nothing
    _submodule_ends = _parameter_gradient = _do_nothing


@contextmanager
def removed(handle) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        handle.remove()
