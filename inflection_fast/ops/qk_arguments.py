"""What the operators on queries and keys have in common: their arguments, checked and as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

__all__ = ["PackedSequences"]


class PackedSequences:
    """Where packed sequences begin and end, made ready for the operators once: the layers of a forward can share it.

    Args:
        cu_seqlens: int32 or int64 ``[S + 1]``, numbers in ``[0, length]`` that never fall. Read when this is made.
        length: the number of queries, and of keys.

    Raises:
        TypeError, ValueError: `cu_seqlens` is not that; its values are looked at on the CPU only.
    """

    def __init__(self, cu_seqlens: Tensor, length: int):
        self.cu_seqlens = checks.cu_seqlens(cu_seqlens, length)
        self.key_bounds = key_bounds(cu_seqlens, length)

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """int64 ``[Q, 2]``, the bounds; ValueError where they are not for as many queries and keys, or elsewhere."""
        checks.packed_lengths(query, key, len(self.key_bounds))
        checks.same_device(self.key_bounds, "cu_seqlens", query, "query")
        return self.key_bounds


def qk_arguments(query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens) -> tuple:
    """The leading arguments of the operators: query, key, attn_mask, five numbers; then rows and key bounds."""
    query, key = checks.query_key(query, key)
    batch, heads, queries, depth = query.shape
    attn_mask = checks.attn_mask(attn_mask, (batch, heads, queries, key.shape[2]), query, "query")
    checks.flag(is_causal, "is_causal")
    scale = depth**-0.5 if scale is None else checks.finite(scale, "scale")
    left, right = checks.window(window)
    softcap = 0.0 if softcap is None else checks.positive(softcap, "softcap")
    rows = None if rows is None else checks.rows(rows, queries, query).contiguous()
    bounds = None
    if cu_seqlens is not None:
        checks.packed_lengths(query, key, queries)
        packed = cu_seqlens if isinstance(cu_seqlens, PackedSequences) else PackedSequences(cu_seqlens, queries)
        bounds = packed.of(query, key)
    return query, key, attn_mask, is_causal, scale, left, right, softcap, rows, bounds


def key_bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """int64 ``[length, 2]``: where the sequence of a position begins and ends, both 0 where it is in none."""
    position = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # By the number of starts up to a position. Few operators: each of them is a kernel launch.
    bounds = torch.nn.functional.pad(torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], -1).long(), (0, 0, 1, 1))
    return bounds.index_select(0, torch.searchsorted(cu_seqlens, position, right=True))
