"""The stack that layers are chosen from: those of a vision tower and a decoder are not ranked against each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..timeline import Timeline

__all__ = ["Stack", "stack_in"]


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers of one stack of a model, in their order."""

    layers: np.ndarray  # [N] indices
    name: str | None = None  # None: the only one, or those of a timeline that does not tell stacks apart
    words: str = ""  # which one was chosen and why, where there are several

    def as_dict(self) -> dict:
        """As it stands in `Plan.model`."""
        return {"name": self.name, "layers": self.layers.tolist()}


def stack_in(timeline: Timeline, name: str | None) -> Stack:
    """The stack `name`; None: the one with most parameters that train or, where none trains, most parameters.

    `ValueError` where the timeline has no such stack, or does not say which stacks there are.
    """
    known = timeline.meta.get("stacks") or []
    names = [one["name"] for one in known]
    if name is not None and not known:
        raise ValueError(
            f"stack: this timeline does not say which stacks its blocks are in, so {name!r} cannot be found; it was "
            "written by an earlier version: leave stack out, or measure again"
        )
    if name is not None and name not in names:
        raise ValueError(f"stack: this timeline has no stack {name!r}; it has {', '.join(names)}")
    if len(known) < 2:
        return Stack(np.arange(len(timeline.layers)))
    trains = any(one["trainable"] for one in known)
    size = "trainable" if trains else "parameters"
    chosen = known[names.index(name)] if name is not None else max(known, key=lambda one: one[size])
    why = "as asked for" if name is not None else f"the one with most {'trainable ' if trains else ''}parameters"
    words = f" Chosen within the stack {chosen['name']} ({why}) of {', '.join(names)}."
    return Stack(np.array(chosen["layers"], int), chosen["name"], words)
