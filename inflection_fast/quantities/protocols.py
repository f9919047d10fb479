"""Protocols of objects of `measure` that quantities get: calls of attention, and settings."""

# ruff: noqa: D102  (the docstrings of the classes say what their members are)

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Call", "Settings", "add_mask", "combined_mask"]


class Call(Protocol):
    """What attention is called with; `inflection_fast.measure.attention_call.AttentionCall`.

    query [B, H, T, D], key [B, Hkv, Tk, D]; or `logits` [B, H, T, Tk] alone, where the model has finished scores.
    `mask` is bool (True: attend) or additive, `bias` additive on top. The rest is as in `ops.attention_stats_qk`.
    """

    @property
    def query(self) -> Tensor: ...

    @property
    def key(self) -> Tensor: ...

    @property
    def logits(self) -> Tensor | None: ...

    @property
    def mask(self) -> Tensor | None: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def scale(self) -> float | None: ...

    @property
    def is_causal(self) -> bool: ...

    @property
    def window(self) -> tuple[int, int] | None: ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def sinks(self) -> Tensor | None: ...

    @property
    def cu_seqlens(self) -> Tensor | None: ...


def combined_mask(call: Call) -> Tensor | None:
    """Mask and bias of a call as one mask, as in `Call`."""
    if call.bias is None or call.mask is None:
        return call.mask if call.bias is None else call.bias.detach()
    return add_mask(call.bias.detach(), call.mask)


def add_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """An additive `bias` with a mask, bool (True: attend) or additive."""
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


class Settings(Protocol):
    """The settings of a MonitorConfig that quantities use."""

    @property
    def cka_rank(self) -> int | None: ...

    @property
    def cka_debiased(self) -> bool: ...

    @property
    def cka_se(self) -> bool: ...
