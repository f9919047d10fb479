"""What the operators on queries and keys have in common: their arguments, checked and as the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


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
    bounds = None if cu_seqlens is None else key_bounds(checks.cu_seqlens(cu_seqlens, query, key), queries)
    return query, key, attn_mask, is_causal, scale, left, right, softcap, rows, bounds


def key_bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """int64 ``[length, 2]``: where the sequence of a position begins and ends, both 0 where it is in none."""
    position = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # By the number of starts up to a position. Few operators: each of them is a kernel launch.
    bounds = torch.nn.functional.pad(torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], -1).long(), (0, 0, 1, 1))
    return bounds.index_select(0, torch.searchsorted(cu_seqlens, position, right=True))
