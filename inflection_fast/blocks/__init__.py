"""Which modules of a model are its blocks, in the order in which they run."""

from .blocks import Block, find_blocks, is_linear_attention, is_named_attention

__all__ = ["Block", "find_blocks", "is_linear_attention", "is_named_attention"]
