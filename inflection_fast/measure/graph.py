"""Taps that are compiled with a model: one graph, measured or not.

Dynamo traces the hooks that modules have at compilation. These hooks call two operators, `tap_attention` and
`tap_gradient`. With a flag on the device at 0 they return at once; at 1 they write sums of fixed shape to slots. So the
compiled code is the same in every step: a measured step changes values in a few tensors, and nothing that a guard or a
captured CUDA graph depends on.

Both operators write to an input (`mutates_args`), so compilers keep them though no result is used. An attention tap
overwrites its slot, so a block that activation checkpointing runs again counts once. An identity whose backward pass
calls the operator observes gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..ops.tap_attention import ATTENTION_SUMS, tap_attention
from ..ops.tap_gradient import GRADIENT_SUMS, gradient_tap
from ..quantities.activation_grad import ActivationGrad
from ..quantities.attention import Attention, CrossAttention
from ..quantities.calls import combined_mask
from ..quantities.dtensors import is_dtensor
from ..quantities.quantity import Quantity
from .attention_call import AttentionCall
from .attention_observer import AttentionObserver, InterfaceCall, traced_call
from .hooks import HookOwner, patched
from .micro_batch import decoder_layers, valid_rows
from .packet import Piece
from .schedule import RowSampler

__all__ = ["GraphSlots", "TracedTaps", "compiled_part", "refusal", "sums_attention"]

_CALLS, _ROWS, _ENTROPY, _PARTS, _MAX_LOGIT = 0, 1, 2, slice(3, 8), 8
assert ATTENTION_SUMS[_PARTS] == Attention.axes["part"]


# ---- which models and quantities -------------------------------------------------------------------------------------


def compiled_part(model: nn.Module) -> nn.Module | None:
    """The first module of a model that `torch.compile` or `Module.compile` was applied to; None: there is none."""
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            return module._orig_mod
        if module._compiled_call_impl is not None:
            return module
    return None


def refusal(model: nn.Module, part: nn.Module, blocks: Sequence[Block], heads: int | None) -> str | None:
    """Why a compiled model cannot be measured inside its graph; None: it can."""
    modules = [block.module for block in blocks]
    inside = set(part.modules())
    if not all(module in inside for module in modules) or part in modules:
        return "its blocks are compiled one by one"
    if len(set(modules)) < len(modules):
        return "a block runs several times in one forward"
    if heads is None:
        return "its blocks do not state their number of heads"
    parameters = list(model.parameters())
    if any(parameter.dtype == torch.float64 for parameter in parameters):
        return "it is in float64"
    if any(map(is_dtensor, parameters)):
        return "its parameters are DTensors"
    if len({parameter.device for module in modules for parameter in module.parameters()}) > 1:
        return "its blocks are on several devices"
    return None


def sums_attention(quantity: Quantity) -> bool:
    """Whether the sums of `tap_attention` are the accumulators of a quantity."""
    return type(quantity) in (Attention, CrossAttention)


_SHARED = "another model of its class that was compiled after the monitor was entered and before this one's first step"
_OTHERWISE = "measure it uncompiled, by MonitorConfig(compiled='eager')"


# ---- the taps --------------------------------------------------------------------------------------------------------


class GraphSlots:
    """The tensors that a graph with taps reads and writes: flags, random row positions, and slots of sums.

    A graph saves some of them for its backward pass, and autograd raises if they were written to in between. Here they
    are: another forward may run before the backward pass of the first. So code outside the graph writes through `data`,
    whose writes autograd does not count.
    """

    def __init__(self, layers: int, heads: int, rows: int | None, device: torch.device):
        self.measures_attention, self.measures_gradients = (
            torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)
        )
        # Self-attention of all layers, then cross attention.
        self.attention = torch.zeros(2 * layers, len(ATTENTION_SUMS), heads, dtype=torch.float64, device=device)
        self.gradients = torch.zeros(layers, len(GRADIENT_SUMS), dtype=torch.float64, device=device)
        self.draws = None if rows is None else torch.zeros(rows, dtype=torch.float64, device=device)
        for tensor in (self.measures_attention, self.measures_gradients, self.attention, self.gradients, self.draws):
            if tensor is not None:  # otherwise a CUDA graph copies it to another address
                torch._dynamo.mark_static_address(tensor)

    def lower(self) -> None:
        """Set all flags to 0."""
        self.measures_attention.data.zero_()
        self.measures_gradients.data.zero_()

    def begin_forward(self, attention: bool, gradients: bool, sampler: RowSampler) -> None:
        """Set the flags, and prepare the slots for the next forward."""
        if attention:
            if self.draws is not None:
                self.draws.data.copy_(sampler.uniform(), non_blocking=True)
            slots = self.attention.data
            slots.zero_()
            slots[:, _MAX_LOGIT].fill_(-torch.inf)
            self.measures_attention.data.fill_(1)
        if gradients:
            self.measures_gradients.data.fill_(1)

    def end_forward(self, piece: Piece, quantities: Sequence[Quantity]) -> None:
        """Add the sums of attention to the accumulators of a micro-batch."""
        layers = len(self.gradients)
        for quantity in quantities:
            if isinstance(quantity, (Attention, CrossAttention)):
                first = 0 if type(quantity) is Attention else layers
                _add_attention(piece[quantity.name], self.attention[first : first + layers])

    def refuse_missing_attention(self, names: Sequence[str]) -> None:
        """Raise if the graph has no attention taps, or a block attends several times."""
        calls = self.attention[:, _CALLS, 0].tolist()
        if not any(calls):
            raise RuntimeError(
                f"the compiled graph saw no attention: it was captured without the taps, as that of {_SHARED}, or its "
                f"attention cannot be measured in a graph (packed sequences, FlexAttention); {_OTHERWISE}"
            )
        several = [names[i % len(names)] for i, count in enumerate(calls) if count > 1]
        if several:
            raise ValueError(f"the blocks {several} attend several times in one forward; {_OTHERWISE}")

    def refuse_missing_gradients(self) -> None:
        """`RuntimeError` if the graph has no gradient taps."""
        if not any(self.gradients[:, 0].tolist()):
            raise RuntimeError(
                f"the compiled graph saw no gradient at any block: it was captured without the taps, as that of "
                f"{_SHARED}; {_OTHERWISE}"
            )

    def end_backward(self, piece: Piece, quantities: Sequence[Quantity]) -> None:
        """Move the sums of gradients to the accumulators of a micro-batch."""
        for quantity in quantities:
            if isinstance(quantity, ActivationGrad):
                sums = piece[quantity.name]
                sums["squares"].copy_(self.gradients[:, 1])
                sums["count"].copy_(self.gradients[:, 0].clamp(max=1))
        self.gradients.data.zero_()


def _add_attention(sums, slots: Tensor) -> None:
    heads = min(slots.shape[2], sums["rows"].shape[1])
    # After several calls in one layer the slot has those of the last call alone.
    slots = slots[..., :heads].masked_fill(slots[:, :1, :heads] > 1, torch.nan)
    sums["rows"][:, :heads] += slots[:, _ROWS]
    sums["entropy"][:, :heads] += slots[:, _ENTROPY]
    sums["parts"][..., :heads] += slots[:, _PARTS]
    highest = sums["max_logit"][:, :heads]
    torch.maximum(highest, slots[:, _MAX_LOGIT].float(), out=highest)


class TracedTaps(HookOwner):
    """The hooks on a compiled model, as long as its monitor is open.

    Args:
        part: the compiled module.
        blocks: inside it.
        slots: arguments of the operators.
    """

    def __init__(self, part: nn.Module, blocks: Sequence[Block], slots: GraphSlots):
        self.slots, self._part = slots, part
        self._layers = {block.module: block.index for block in blocks}
        self._decoders = decoder_layers(part, blocks)
        self._observer = AttentionObserver(blocks)
        self._inputs: dict = {}  # arguments of the forward under way by name
        self._places: dict[nn.Module, tuple[int, int]] = {}  # module that attends -> slot, layer
        for block in blocks:
            for module in block.module.modules():
                kind = self._observer.places.of(module).kind or "self"
                if kind != "other":
                    self._places[module] = (block.index + (kind == "cross") * len(blocks), block.index)

    @property
    def sees_attention(self) -> bool:
        """Whether all attention goes through Transformers' interfaces, as observing it in a graph needs."""
        return bool(self._observer.interfaces) and not self._observer.needs_functions

    @contextmanager
    def attached(self, *, attention: bool, gradients: bool) -> Iterator[TracedTaps]:
        """Install the hooks while the context is open."""
        with ExitStack() as stack:
            if attention:
                begins = self._part.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
                stack.callback(begins.remove)
                stack.callback(self._part.register_forward_hook(self._forward_ends).remove)
                for interface in self._observer.interfaces:
                    stack.enter_context(patched(interface, "get_interface", self._tapped))
            if gradients:
                for module, layer in self._layers.items():
                    stack.callback(module.register_forward_hook(partial(self._block_ends, layer)).remove)
            yield self

    # ---- traced by dynamo --------------------------------------------------------------------------------------------

    def _forward_begins(self, part: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs = kwargs

    def _forward_ends(self, part: nn.Module, args: tuple, output: object) -> None:
        self._inputs = {}  # otherwise the batch would stay in memory until the next one

    def _block_ends(self, layer: int, block: nn.Module, args: tuple, output: object) -> object:
        if block not in self._layers or not torch.is_grad_enabled():
            return None
        slots = self.slots
        if isinstance(output, Tensor):
            if not output.requires_grad:
                return None
            return gradient_tap(output, slots.gradients, layer, flag=slots.measures_gradients)
        if isinstance(output, tuple):
            for i, value in enumerate(output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    if not value.requires_grad:
                        return None
                    value = gradient_tap(value, slots.gradients, layer, flag=slots.measures_gradients)
                    return (*output[:i], value, *output[i + 1 :])
        return None

    def _tapped(self, original: Callable) -> Callable:
        def get_interface(name, default):
            attend = original(name, default)

            def tapped_attend(module, query, key, value, attention_mask, *args, **kwargs):
                place = self._places.get(module)
                if place is not None and torch.is_grad_enabled():
                    call = traced_call(InterfaceCall(name, attend, module, query, key, attention_mask, args, kwargs))
                    if call is not None:
                        self._tap(call, *place)
                return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return tapped_attend

        return get_interface

    def _tap(self, call: AttentionCall, slot: int, layer: int) -> None:
        mask, slots = combined_mask(call), self.slots
        tap_attention(
            call.query,
            call.key,
            slots.attention,
            slot,
            flag=slots.measures_attention,
            draws=slots.draws,
            tokens=valid_rows(self._inputs, call, layer in self._decoders),
            attn_mask=None if mask is None else mask.detach(),
            is_causal=call.is_causal,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
