"""Attention that calls torch's functions: scaled_dot_product_attention, multi_head_attention_forward, FlexAttention,
and the softmax of attention that is written by hand.

While such functions are watched, every call of a torch function takes a detour of about a microsecond, in measured
steps alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention_call import AttentionCall
from .attention_places import AttentionPlaces

__all__ = ["See", "heads_first", "seeing_functions"]

# Takes the attention module, where it is known, and what reads its call: reading may fail, and is for `see` to forgive.
See = Callable[[nn.Module | None, Callable[[], AttentionCall]], None]

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}
_SOFTMAX |= {torch.log_softmax, F.log_softmax, Tensor.log_softmax, torch.special.log_softmax}
_BY_HAND_KINDS = ("self", "cross")


@contextmanager
def seeing_functions(places: AttentionPlaces, see: See) -> Iterator[None]:
    """Hand every attention that ends in one of torch's functions to `see`, and then let the function run.

    A softmax over the last dimension counts as attention if it runs inside a module that is called attention (or in a
    block that has none such), and if one of the other dimensions is that of the module's heads. So a router, a pooling
    and a vocabulary are none.
    """
    with places.followed(), _FunctionMode(places, see):
        yield


class _FunctionMode(TorchFunctionMode):
    # A mode is off inside its own handler: what a function that was seen calls in turn is not seen a second time.
    def __init__(self, places: AttentionPlaces, see: See):
        super().__init__()
        self._places, self._see = places, see
        self._flex = _flex_attention()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            self._see_softmax(*args, **kwargs)
        elif func is F.scaled_dot_product_attention:
            return _seen_sdpa(self._see_here)(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            return _seen_multi_head(self._see_here, *args, **kwargs)
        elif func is self._flex:
            self._see_flex(*args, **kwargs)
        return func(*args, **kwargs)

    def _see_here(self, read: Callable[[], AttentionCall]) -> None:
        place = self._places.running
        if place is None:  # outside of all blocks, or seen already
            return
        kind = place.kind or "self"
        if kind in _BY_HAND_KINDS:
            self._see(self._places.module, lambda: replace(read(), kind=kind))

    def _see_softmax(self, input=None, dim=None, *args, **kwargs) -> None:
        place = self._places.running
        if place is None or place.kind not in _BY_HAND_KINDS or not isinstance(input, Tensor):
            return
        if dim not in (-1, input.dim() - 1) or not input.is_floating_point():
            return
        logits = heads_first(input, place.heads, self._places.sizes)
        if logits is not None:
            self._see_here(lambda: AttentionCall(logits, logits, logits=logits))

    def _see_flex(self, query, key, value, score_mod, block_mask, scale, *args, **kwargs) -> None:
        mask_mod = block_mask[-1] if isinstance(block_mask, tuple) else None
        self._see_here(lambda: AttentionCall(query, key, scale=scale, score_mod=score_mod, mask_mod=mask_mod))


def _flex_attention() -> object:
    """The operator that `flex_attention` ends in. `None`: this build of torch has none."""
    return getattr(torch.ops.higher_order, "flex_attention", None)


# ---- softmax ---------------------------------------------------------------------------------------------------------


def heads_first(logits: Tensor, heads: int | None, sizes: tuple[int, ...] = ()) -> Tensor | None:
    """Scores before a softmax as [B, H, Q, K]; None where no dimension is that of the `heads` (None: not known).

    `sizes` are the leading ones of the hidden state, batch and length in either order, where they are known.

    Dimensions before the queries that are not the heads (windows, blocks of a sequence) join the batch. Known forms
    are [B, H, Q, K], [B * H, Q, K], [B, Q, H, K], [H, B, Q, K], and with windows W, [B, W, H, Q, K] and the like; for
    grouped queries also [B, Hkv, H / Hkv, Q, K].
    """
    dims = logits.dim()
    if dims < 3:
        return None
    if dims == 3:
        heads = heads or 1
        batches = [size * heads for size in sizes] or [heads]
        return logits.unflatten(0, (-1, heads)) if any(len(logits) % size == 0 for size in batches if size) else None
    if heads is None:
        return logits if dims == 4 else None
    # The usual place first, then before the queries, then behind them, then at the front.
    for at in (1, *range(dims - 3, 1, -1), dims - 2, 0):
        if logits.shape[at] == heads:
            return logits.movedim(at, dims - 3).flatten(0, dims - 4)
    if dims == 5 and logits.shape[1] * logits.shape[2] == heads:
        return logits.flatten(1, 2)
    return None


# ---- torch's own attention -------------------------------------------------------------------------------------------


def _seen_sdpa(see: Callable) -> Callable:
    def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        see(lambda: AttentionCall(query, key, attn_mask, scale=kwargs.get("scale"), is_causal=is_causal))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    return scaled_dot_product_attention


_MULTI_HEAD_NAMES = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def _seen_multi_head(see: Callable, *args, **kwargs):
    # A function mode is off inside its own handler, so the inner call of SDPA would go by unseen, and calling again
    # with the mode on would come straight back here. The same code with two names looked up elsewhere sees it, without
    # touching torch's own namespace: SDPA, and the softmax that stands in its place when weights are asked for.
    heads = (dict(zip(_MULTI_HEAD_NAMES, args, strict=False)) | kwargs)["num_heads"]

    def softmax(logits, dim):
        scores = logits.unflatten(0, (-1, heads))  # [B * H, Tq, Tk]
        see(lambda: AttentionCall(scores, scores, logits=scores))
        return F.softmax(logits, dim=dim)

    original = F.multi_head_attention_forward
    names = {**original.__globals__, "scaled_dot_product_attention": _seen_sdpa(see), "softmax": softmax}
    twin = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    twin.__kwdefaults__ = original.__kwdefaults__
    names[original.__name__] = twin  # what the function hands to other function modes, if there are any
    return twin(*args, **kwargs)
