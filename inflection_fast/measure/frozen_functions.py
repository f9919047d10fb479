"""Functions whose results in a second run of a block are known from the first: linear layers, and dropout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Again", "Found", "Unknown", "Watching"]

Found = deque[tuple[Callable, Tensor | None]]  # by functions, in the order of their calls; None: to be computed again
_MATH = 0  # of torch.nn.attention.SDPBackend, as a number


class Unknown(Exception):
    """What a block does cannot be done again on some sequences alone."""


class Watching(TorchFunctionMode):
    """Runs functions as they are and keeps what the chosen sequences need of them, while a link runs."""

    def __init__(self, pick: Callable[[Tensor], Tensor]):
        super().__init__()
        self._pick, self.batch = pick, 0
        self.found: Found | None = None  # of the link that runs; None: none does, and nothing is kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        look = _LOOK.get(func) if self.found is not None else None
        if look is None:
            return func(*args, **kwargs)
        return look(self, *args, **kwargs)

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
        if not plain or chosen != _MATH:  # inside a fused kernel nobody sees what is kept
            self._keep(F.scaled_dot_product_attention, None)
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        device = query.device.type
        inputs: list[Tensor | None] = [query, key, value, attn_mask]
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            inputs = [x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in inputs]
        with torch.autocast(device, enabled=False):  # as inside of the call
            math = torch.ops.aten._scaled_dot_product_attention_math  # what the call would come to
            output, weights = math(*inputs, dropout_p, is_causal, scale=scale)
        self._keep(F.scaled_dot_product_attention, lambda: self._pick(weights) != 0)
        return output


_LOOK = {
    F.linear: Watching._linear,
    F.dropout: Watching._dropout,
    F.scaled_dot_product_attention: Watching._attention,
}


class Again(TorchFunctionMode):
    """Takes what was found for the results of the same calls in the same order."""

    def __init__(self, found: Found):
        super().__init__()
        self._all = found
        self.rewind()

    def rewind(self) -> None:
        """Begin with the first call again."""
        self._found = deque(self._all)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        again = _AGAIN.get(func)
        if again is None:
            return func(*args, **kwargs)
        return again(self, *args, **kwargs)

    def _next(self, func: Callable) -> Tensor | None:
        if not self._found or self._found[0][0] is not func:
            raise Unknown("a frozen block takes another way when it runs again")
        return self._found.popleft()[1]

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
            raise Unknown("dropout inside a fused attention cannot be seen")
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return (scores.softmax(-1) * kept / (1 - dropout_p)) @ value


_AGAIN = {
    F.linear: Again._linear,
    F.dropout: Again._dropout,
    F.scaled_dot_product_attention: Again._attention,
}


class _KnownLinear(torch.autograd.Function):
    """A linear layer whose output is known: its gradient with respect to the input needs nothing else."""

    @staticmethod
    def forward(ctx, input, weight, known):
        ctx.save_for_backward(weight)
        ctx.dtype = input.dtype
        return known.view_as(known)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None, None
