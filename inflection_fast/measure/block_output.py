"""The hidden state among the outputs of a block."""

from __future__ import annotations

import dis
import inspect
from itertools import pairwise

from torch import Tensor, nn

from .micro_batch import tensors_of

__all__ = ["output_of"]


def output_of(block: nn.Module, output: object) -> Tensor | None:
    """The hidden state that a block passes on: of several tensors the one that its code calls `hidden_states`.

    In blocks with two streams (SD3, Flux) it is that of the image, in any position. If the code has no such name, it is
    the first floating-point tensor.
    """
    cls = type(block)
    if cls not in _PLACES:
        _PLACES[cls] = _place_of_hidden(cls)
    place = _PLACES[cls]
    if place is not None and isinstance(output, (tuple, list)) and place < len(output):
        hidden = output[place]
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            return hidden
    return next(tensors_of(output), None)


_PLACES: dict[type, int | None] = {}  # position of the hidden state by class; cached, because reading code is slow


def _place_of_hidden(cls: type[nn.Module]) -> int | None:
    """The position of `hidden_states` in the tuple that `forward` returns; None: there is no such tuple."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None:
        return None
    steps = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    for at, (one, following) in enumerate(pairwise(steps)):
        if one.opname == "BUILD_TUPLE" and following.opname == "RETURN_VALUE":
            names: list[str] = []
            for loaded in reversed(steps[:at]):
                if len(names) >= one.argval or not loaded.opname.startswith("LOAD_FAST"):
                    break
                several = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
                names[:0] = several
            if len(names) == one.argval and "hidden_states" in names:
                return names.index("hidden_states")
    return None
