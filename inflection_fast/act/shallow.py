"""Shallow unfreezing: only the last blocks and the head train."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..blocks import Block

__all__ = ["unfreeze_top"]


def unfreeze_top(model: nn.Module, blocks: Sequence[Block], top: int, head: Sequence[str] | None = None) -> list[str]:
    """Make the last `top` of `blocks` and the head trainable, freeze all else, and return the trainable names.

    `head` are full names of modules or parameters; None: every parameter that the model registers after its last block.
    A weight shared with the embeddings counts as an embedding, and is frozen. `ValueError` for more blocks than there
    are, a name without parameters, or nothing to train; the model is then unchanged.
    """
    if not 0 <= top <= len(blocks):
        raise ValueError(f"top: expected 0 to {len(blocks)}, the number of blocks, got {top}")
    named = dict(model.named_parameters())
    order = list(named)
    inside = {id(p): block.index for block in blocks for p in block.module.parameters()}
    last = max(i for i, name in enumerate(order) if id(named[name]) in inside)
    for prefix in head or ():
        if not any(f"{name}.".startswith(f"{prefix}.") for name in order):
            raise ValueError(f"head: the model has no parameters under {prefix!r}")
    trains = {}
    for i, (name, parameter) in enumerate(named.items()):
        if id(parameter) in inside:
            chosen = inside[id(parameter)] >= len(blocks) - top
        elif head is None:
            chosen = i > last
        else:
            chosen = any(f"{name}.".startswith(f"{prefix}.") for prefix in head)
        trains[name] = chosen and parameter.is_floating_point()
    if not any(trains.values()):
        raise ValueError("top: it is 0 and the model has no separate head, so nothing would be trained")
    for name, parameter in named.items():
        parameter.requires_grad_(trains[name])
    return [name for name in order if trains[name]]
