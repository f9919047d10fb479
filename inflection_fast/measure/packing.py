"""Sequences that are packed into one row, and where each of them begins, as Transformers' flash attention finds it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FOREIGN_KEYS", "VARLEN", "Starts", "as_packed", "takes_flash_masks"]

FOREIGN_KEYS = (
    "attention gets packed sequences whose keys are not those of its queries (cu_seq_lens_q and cu_seq_lens_k differ, "
    "or keys of a cache stand before them), which cannot be measured"
)
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # what tells of packing, or position_ids


def takes_flash_masks(name: str) -> bool:
    """Whether the implementation `name` gets masks as flash kernels do, or none: without packing in them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    return ALL_MASK_ATTENTION_FUNCTIONS.get(name, flash_attention_mask) is flash_attention_mask


class Starts:
    """Where the sequences of a row begin, by the positions in it; the layers of one forward share both."""

    def __init__(self):
        self._positions = self._cu_seqlens = None

    def of(self, positions: Tensor) -> Tensor:
        """[T + 1] int64, the starts first and T in all other places, for positions [1, T].

        Sequences begin where the lowest position stands, as in `prepare_fa_kwargs_from_position_ids` of Transformers.
        Only the device knows how many there are, so there is room for T of them, of which the last ones are empty.
        """
        if positions is not self._positions:
            flat = positions.flatten()
            index = torch.arange(len(flat) + 1, device=flat.device)
            starts = torch.where(flat == flat.min(), index[:-1], len(flat)).sort().values
            self._positions, self._cu_seqlens = positions, torch.cat([starts, index[-1:]])
        return self._cu_seqlens


def as_packed(
    query: Tensor, key: Tensor, settings: dict, starts: Starts
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What `_flash_attention_forward` of Transformers makes of a call without a mask.

    The four `VARLEN` arguments count where all are given: they are about the rows of the batch one after the other.
    Else positions that do not go up by one tell of packing in a batch of one row, and of nothing in any other batch.

    Returns:
        query and key, [1, H, B * T, D] for `VARLEN`; `cu_seqlens` [S + 1], None where nothing is packed; and [] bool,
        whether the keys are others than those of the queries' own sequences, None where they are not.

    Raises:
        ValueError: they are others, as shapes tell.
    """
    cu_seqlens, of_keys, *_ = varlen = [settings.get(name) for name in VARLEN]
    if all(value is not None for value in varlen):
        if cu_seqlens.shape != of_keys.shape or query.shape[2] != key.shape[2]:
            raise ValueError(FOREIGN_KEYS)
        foreign_keys = None if cu_seqlens is of_keys else (cu_seqlens != of_keys).any()
        return _one_row(query), _one_row(key), cu_seqlens, foreign_keys
    positions = settings.get("position_ids")
    if positions is None or len(query) != 1 or positions.dim() != 2 or len(positions) != 1 or positions.numel() == 1:
        return query, key, None, None
    if query.shape[2] != key.shape[2]:
        return query, key, None, (positions.diff() != 1).any()
    return query, key, starts.of(positions), None


def _one_row(heads: Tensor) -> Tensor:
    return heads if len(heads) == 1 else heads.transpose(0, 1).flatten(1, 2)[None]
