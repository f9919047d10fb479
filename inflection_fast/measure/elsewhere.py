"""What stands in a list of blocks for a block that another process holds."""

from __future__ import annotations

from torch import nn

__all__ = ["Elsewhere"]


class Elsewhere(nn.Module):
    """A block of another stage of a pipeline. It has no parameters here, and nobody runs it.

    Args:
        parameters: how many the block has there.
        trainable: how many of them train.
    """

    def __init__(self, parameters: int, trainable: int):
        super().__init__()
        self.held = parameters, trainable
