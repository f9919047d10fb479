"""One attention call as quantities get it, and the settings that they use."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .dtensors import local_of

__all__ = ["FOREIGN_KEYS", "AttentionCall", "Settings", "add_mask", "combined_mask"]

_HEADS, _POSITIONS = 1, 2  # dimensions of queries [B, H, Tq, D]
FOREIGN_KEYS = (
    "attention gets packed sequences whose keys are not those of its queries (cu_seq_lens_q and cu_seq_lens_k differ, "
    "or keys of a cache stand before them), which cannot be measured"
)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, as the model's implementation computes it."""

    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    mask: Tensor | None = None  # bool (True: attend) or additive, broadcastable to [B, H, Tq, Tk]
    bias: Tensor | None = None  # additive, broadcastable to [B, H, Tq, Tk], in addition to the mask
    scale: float | None = None  # None: D ** -0.5
    is_causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [H], or [B, H, Tq, 1]: one per query
    logits: Tensor | None = None  # [B, H, Tq, Tk], final scores, if known; key is then unused
    cu_seqlens: Tensor | None = None  # [S + 1], starts of sequences that are packed into one row, without a mask
    packed: ops.PackedSequences | None = None  # derived from them for the operators, once for all layers
    # Functions of FlexAttention, of (scores, b, h, q, k) and of (b, h, q, k), for tensors that broadcast.
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    kind: str = "self"  # or "cross"
    sparse: bool = False  # the mask also excludes tokens that an indexer did not choose, so it does not show padding
    foreign_keys: Tensor | None = None  # [] bool: keys of packed sequences are not those of the queries; None: they are

    @property
    def sequences(self) -> Tensor | ops.PackedSequences | None:
        """The starts of packed sequences, in the form that the operators take."""
        return self.cu_seqlens if self.packed is None else self.packed

    def refuse_foreign_keys(self) -> None:
        """`ValueError` for packed sequences that attend to others. Waits for the device."""
        if self.foreign_keys is not None and bool(self.foreign_keys):
            raise ValueError(FOREIGN_KEYS)

    def here(self, *, shares_sequences: bool = False) -> AttentionCall:
        """This rank's part of a call on DTensors. `ValueError` unless they are sharded by heads.

        With `shares_sequences` they may be sharded by positions too.
        """
        if type(self.query) is Tensor or not hasattr(self.query, "placements"):
            return self
        dims = (_HEADS, _POSITIONS) if shares_sequences else (_HEADS,)
        if any(place.is_partial() or (place.is_shard() and place.dim not in dims) for place in self.query.placements):
            raise ValueError(
                f"attention on queries placed as {self.query.placements} over ranks cannot be measured: heads may be "
                "sharded, sequences where the monitor is told of it (Monitor(model, context=mesh)), batches may not"
            )
        call = copy(self)
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                object.__setattr__(call, field.name, local_of(value))
        return call


def combined_mask(call: AttentionCall) -> Tensor | None:
    """Mask and bias of a call as one mask, as in `AttentionCall`."""
    if call.bias is None or call.mask is None:
        return call.mask if call.bias is None else call.bias.detach()
    return add_mask(call.bias.detach(), call.mask)


def add_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """An additive `bias` with a mask, bool (True: attend) or additive."""
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


class Settings(Protocol):
    """The settings of a MonitorConfig that quantities use."""

    @property
    def cka_rank(self) -> int | None: ...  # noqa: D102

    @property
    def cka_debiased(self) -> bool: ...  # noqa: D102

    @property
    def cka_se(self) -> bool: ...  # noqa: D102
