"""One attention call, its packed sequences, and the statistics of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..quantities.calls import FOREIGN_KEYS, AttentionCall, add_mask, combined_mask

__all__ = ["FOREIGN_KEYS", "VARLEN", "AttentionCall", "SequenceStarts", "as_packed", "stats_of", "takes_flash_masks"]


def stats_of(call: AttentionCall, rows: Tensor | None) -> ops.AttentionStats:
    """The statistics of the query rows `rows` (None: all) of a call, [B, H, R] each; NaN for `foreign_keys`."""
    stats = _stats_of(call, rows)
    if call.foreign_keys is not None:
        stats = type(stats)(*(field.masked_fill(call.foreign_keys, torch.nan) for field in stats))
    return stats


def _stats_of(call: AttentionCall, rows: Tensor | None) -> ops.AttentionStats:
    if call.logits is not None:
        return ops.attention_stats(_at(call.logits, rows).detach())
    if call.mask_mod is not None or call.score_mod is not None:
        return _flex_stats(call, rows)
    if call.sinks is not None and call.sinks.dim() > 1:
        return _stats_with_sinks(call, call.sinks.detach(), rows)
    query, mask, bias = call.query.detach(), call.mask, call.bias
    if mask is None or bias is None or call.is_causal or call.window is not None:
        mask = combined_mask(call)
    else:  # nothing else depends on the position of a row
        query, mask, rows = _at(query, rows), add_mask(_at(bias.detach(), rows), _at(mask, rows)), None
    return ops.attention_stats_qk(
        query,
        call.key.detach(),
        attn_mask=mask,
        is_causal=call.is_causal,
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks.detach(),
        rows=rows,
        cu_seqlens=call.sequences,
    )


def _stats_with_sinks(call: AttentionCall, sinks: Tensor, rows: Tensor | None) -> ops.AttentionStats:
    """With a sink for every query, as one more column before its scores."""
    scores = _scores(call, rows)
    for added in (call.bias, call.mask):
        if added is not None:
            scores = add_mask(scores, _at(added.detach(), rows))
    if call.is_causal or call.window is not None:
        queries = torch.arange(call.query.shape[2], device=scores.device)
        ahead = torch.arange(scores.shape[-1], device=scores.device) - _at(queries[:, None], rows)
        left, right = call.window or (len(queries), scores.shape[-1])
        scores = scores.masked_fill((ahead < -left) | (ahead > (0 if call.is_causal else right)), -torch.inf)
    stats = ops.attention_stats(torch.cat([_at(sinks, rows).to(scores), scores], -1))
    return stats._replace(keys=stats.keys - 1)


def _flex_stats(call: AttentionCall, rows: Tensor | None) -> ops.AttentionStats:
    """With the functions of FlexAttention, evaluated for the wanted rows alone."""
    here = call.query.device
    queries = torch.arange(call.query.shape[2], device=here) if rows is None else rows
    batch, heads, keys = (torch.arange(n, device=here) for n in (*call.query.shape[:2], call.key.shape[2]))
    index = batch[:, None, None, None], heads[:, None, None], queries[:, None], keys
    mask = None if call.mask_mod is None else call.mask_mod(*index)
    if call.bias is not None:
        mask = _at(call.bias.detach(), rows) if mask is None else add_mask(_at(call.bias.detach(), rows), mask)
    if call.score_mod is not None:
        return ops.attention_stats(call.score_mod(_scores(call, rows), *index), attn_mask=mask)
    query, sinks = _at(call.query.detach(), rows), None if call.sinks is None else call.sinks.detach()
    return ops.attention_stats_qk(
        query, call.key.detach(), attn_mask=mask, scale=call.scale, softcap=call.softcap, sinks=sinks
    )


def _scores(call: AttentionCall, rows: Tensor | None) -> Tensor:
    """[B, H, R, Tk] float32: scaled scores of the rows, without masks."""
    query, key = _at(call.query.detach(), rows).float(), call.key.detach().float()
    grouped = query.unflatten(1, (key.shape[1], -1)) @ key.mT[:, :, None]  # [B, Hkv, H / Hkv, R, Tk]
    scores = grouped.flatten(1, 2) * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)


def _at(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None or tensor.shape[-2] == 1 else tensor.index_select(-2, rows)


# ---- packed sequences, by the rules of Transformers' flash attention -------------------------------------------------


VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # arguments of packing besides position_ids


def takes_flash_masks(name: str) -> bool:
    """Whether the implementation `name` gets masks in the form for flash kernels, which do not contain packing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    return ALL_MASK_ATTENTION_FUNCTIONS.get(name, flash_attention_mask) is flash_attention_mask


class SequenceStarts:
    """The starts of packed sequences, and what operators derive from them, cached for all layers of one forward."""

    def __init__(self):
        self._positions = self._cu_seqlens = None
        self._packed: ops.PackedSequences | None = None

    def packed(self, cu_seqlens: Tensor, length: int) -> ops.PackedSequences:
        """The `PackedSequences` of starts in a row of `length` positions."""
        known = self._packed
        if known is None or known.cu_seqlens is not cu_seqlens or len(known.key_bounds) != length:
            known = self._packed = ops.PackedSequences(cu_seqlens, length)
        return known

    def of(self, positions: Tensor) -> Tensor:
        """[T + 1] int64, the starts first and T in all other places, for positions [1, T].

        Sequences begin at the lowest position, as in `prepare_fa_kwargs_from_position_ids` of Transformers. Their
        number is known on the device only, so the result has T of them, and the last ones are empty.
        """
        if positions is not self._positions:
            flat = positions.flatten()
            index = torch.arange(len(flat) + 1, device=flat.device)
            starts = torch.where(flat == flat.min(), index[:-1], len(flat)).sort().values
            self._positions, self._cu_seqlens = positions, torch.cat([starts, index[-1:]])
        return self._cu_seqlens


def as_packed(
    query: Tensor, key: Tensor, settings: dict, starts: SequenceStarts
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A call without a mask, as `_flash_attention_forward` of Transformers interprets it.

    The four `VARLEN` arguments count if all are given; they describe the concatenated rows of the batch. Otherwise
    positions that do not increase by one mean packing, in a batch of one row.

    Returns:
        query and key, [1, H, B * T, D] for `VARLEN`; `cu_seqlens` [S + 1], None without packing; and [] bool, whether
        keys are not those of the queries' own sequences, None: they are.

    Raises:
        ValueError: by their shapes they are not.
    """
    varlen = [settings.get(name) for name in VARLEN]
    cu_seqlens, of_keys, *_ = varlen
    if cu_seqlens is not None and of_keys is not None and all(value is not None for value in varlen):
        if cu_seqlens.shape != of_keys.shape or query.shape[2] != key.shape[2]:
            raise ValueError(FOREIGN_KEYS)
        foreign_keys = None if cu_seqlens is of_keys else torch.ne(cu_seqlens, of_keys).any()
        return _one_row(query), _one_row(key), cu_seqlens, foreign_keys
    positions = settings.get("position_ids")
    if positions is None or len(query) != 1 or positions.dim() != 2 or len(positions) != 1 or positions.numel() == 1:
        return query, key, None, None
    if query.shape[2] != key.shape[2]:
        return query, key, None, (positions.diff() != 1).any()
    return query, key, starts.of(positions), None


def _one_row(heads: Tensor) -> Tensor:
    return heads if len(heads) == 1 else heads.transpose(0, 1).flatten(1, 2)[None]
