"""Arguments of the operators on queries and keys: their checks, and their form for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

__all__ = ["PackedSequences"]


class PackedSequences:
    """Bounds of packed sequences, computed once. All layers of a forward pass can share one object.

    Args:
        cu_seqlens: int32 or int64 ``[S + 1]``, non-decreasing numbers in ``[0, length]``, as in flash-attention.
        length: number of queries, and of keys.

    Raises:
        TypeError, ValueError: `cu_seqlens` has another dtype or shape, or, on the CPU, other values.
    """

    def __init__(self, cu_seqlens: Tensor, length: int):
        self.cu_seqlens = checks.cu_seqlens(cu_seqlens, length)
        self.key_bounds = key_bounds(cu_seqlens, length)

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """The bounds, int64 ``[Q, 2]``. ValueError if they are for another length or on another device."""
        checks.packed_lengths(query, key, len(self.key_bounds))
        checks.same_device(self.key_bounds, "cu_seqlens", query, "query")
        return self.key_bounds


def qk_arguments(query, key, attn_mask, is_causal, scale, window, softcap, rows, cu_seqlens) -> tuple:
    """The first arguments of the operators: query, key, attn_mask, five numbers, rows and key bounds."""
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
    """int64 ``[length, 2]``: begin and end of the sequence of each position; both 0 for a position in no sequence."""
    position = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # Indexed by the number of starts up to a position. Every operator here is a kernel launch, so there are few.
    bounds = torch.nn.functional.pad(torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], -1).long(), (0, 0, 1, 1))
    return bounds.index_select(0, torch.searchsorted(cu_seqlens, position, right=True))
