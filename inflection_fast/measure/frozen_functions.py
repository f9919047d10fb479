"""Recording and replaying functions of a block: the second run reuses linear outputs and dropout masks of the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["CannotReplay", "RecordFunctions", "RecordedCalls", "ReplayFunctions"]

RecordedCalls = deque[
    tuple[Callable, Tensor | None]
]  # by functions, in the order of their calls; None: to be computed again
_MATH = 0  # of torch.nn.attention.SDPBackend, as a number


class CannotReplay(Exception):
    """A block cannot run again on some of the sequences."""


_METHODS = {F.linear: "_linear", F.dropout: "_dropout", F.scaled_dot_product_attention: "_attention"}


class _Functions(TorchFunctionMode):
    """Redirects linear layers, dropout and attention to methods."""

    found: RecordedCalls | None = None  # None: functions run unchanged

    def __torch_function__(self, func, types, args=(), kwargs=None):
        method = _METHODS.get(func) if self.found is not None else None
        return (func if method is None else getattr(self, method))(*args, **(kwargs or {}))


class RecordFunctions(_Functions):
    """Runs functions unchanged, and records the results for the chosen sequences while `found` is set."""

    def __init__(self, pick: Callable[[Tensor], Tensor]):
        super().__init__()
        self._pick, self.batch = pick, 0

    def _keep(self, func: Callable, of: Callable[[], Tensor] | None) -> None:
        if self.found is not None:
            self.found.append((func, None if of is None else of()))

    def _is_batch(self, tensor: Tensor, dims: int) -> bool:
        return tensor.dim() >= dims and len(tensor) == self.batch

    def _linear(self, input, weight, bias=None):
        output = F.linear(input, weight, bias)
        self._keep(F.linear, (lambda: self._pick(output)) if self._is_batch(input, 3) else None)
        return output

    def _dropout(self, input, p=0.5, training=True, inplace=False):
        if not training or not 0 < p < 1:
            return F.dropout(input, p, training, inplace)
        known = self._is_batch(input, 2)
        zeros = self._pick(input) == 0 if known else None
        output = F.dropout(input, p, training, inplace)
        self._keep(F.dropout, (lambda: (self._pick(output) != 0) | zeros) if known else None)
        return output

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        options = {"scale": scale, **kwargs}
        if dropout_p == 0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        plain = self._is_batch(query, 4) and not options.get("enable_gqa") and 0 < dropout_p < 1
        if plain and attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        chosen = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if not plain or chosen != _MATH:  # a fused kernel does not return its dropout mask
            self._keep(F.scaled_dot_product_attention, None)
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        device = query.device.type
        inputs: list[Tensor | None] = [query, key, value, attn_mask]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            inputs = [x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in inputs]
        with torch.autocast(device, enabled=False):  # as inside of the call
            math = torch.ops.aten._scaled_dot_product_attention_math  # the operator that the call would end in
            output, weights = math(*inputs, dropout_p, is_causal, scale=scale)
        self._keep(F.scaled_dot_product_attention, lambda: self._pick(weights) != 0)
        return output


class ReplayFunctions(_Functions):
    """Uses recorded results for the same calls in the same order."""

    found: RecordedCalls

    def __init__(self, found: RecordedCalls):
        super().__init__()
        self._all = found
        self.rewind()

    def rewind(self) -> None:
        """Start at the first call again."""
        self.found = deque(self._all)

    def _next(self, func: Callable) -> Tensor | None:
        if not self.found or self.found[0][0] is not func:
            raise CannotReplay("a frozen block calls other functions when it runs again")
        return self.found.popleft()[1]

    def _linear(self, input, weight, bias=None):
        known = self._next(F.linear)
        return F.linear(input, weight, bias) if known is None else _KnownLinear.apply(input, weight.detach(), known)

    def _dropout(self, input, p=0.5, training=True, inplace=False):
        if not training or not 0 < p < 1:
            return F.dropout(input, p, training, inplace)
        kept = self._next(F.dropout)
        return F.dropout(input, p, training) if kept is None else input * kept / (1 - p)

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        if dropout_p == 0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, **kwargs)
        kept = self._next(F.scaled_dot_product_attention)
        if kept is None:
            raise CannotReplay("the dropout mask of a fused attention is not known")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return (scores.softmax(-1) * kept / (1 - dropout_p)) @ value


class _KnownLinear(torch.autograd.Function):
    """A linear layer with a known output; the gradient of its input needs the weight alone."""

    @staticmethod
    def forward(ctx, input, weight, known):
        ctx.save_for_backward(weight)
        ctx.dtype = input.dtype
        return known.view_as(known)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None, None
