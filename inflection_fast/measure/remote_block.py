"""Placeholder for a block that another process holds."""

from __future__ import annotations

from torch import nn

__all__ = ["RemoteBlock"]


class RemoteBlock(nn.Module):
    """A block of another pipeline stage, without parameters here; it never runs.

    Args:
        parameters: number of its parameters on its own rank.
        trainable: how many of them train.
    """

    def __init__(self, parameters: int, trainable: int):
        super().__init__()
        self.held = parameters, trainable
