"""Taps that are compiled with a model: one graph, measured or not.

Dynamo traces hooks that stand on the modules when it compiles. These hooks call two operators, `tap_attention` and
`tap_gradient`, which return where a flag on the device is down, and write sums of fixed shape to slots where it is up.
So what is compiled is the same at every step and for every batch of a shape: a measured step changes the numbers in a
few tensors, and nothing that a guard or a captured CUDA graph looks at.

Both operators write to an input (`mutates_args`), so no compiler may drop them although nobody uses a result, and
what they write is theirs alone, so nothing has to be copied. A tap of attention replaces what its slot held: where
activation checkpointing runs a block again, nothing counts twice. Gradients are seen by an identity whose backward
pass calls the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..ops.tap_attention import ATTENTION_SUMS, tap_attention
from ..ops.tap_gradient import GRADIENT_SUMS, listened_to
from ..quantities.activation_grad import ActivationGrad
from ..quantities.attention import Attention, CrossAttention
from ..quantities.quantity import Quantity
from .attention_call import AttentionCall
from .attention_sight import AttentionSight, traced_call
from .hooks import Nothing, replaced
from .micro_batch import decoder_layers, valid_rows
from .packet import Piece
from .placements import is_dtensor
from .schedule import RowSampler

__all__ = ["GraphSlots", "TracedTaps", "compiled_part", "in_graph", "refusal", "sums_attention"]

_CALLS, _ROWS, _ENTROPY, _PARTS, _MAX_LOGIT = 0, 1, 2, slice(3, 8), 8
assert ATTENTION_SUMS[_PARTS] == Attention.axes["part"]


# ---- which models and quantities -------------------------------------------------------------------------------------


def compiled_part(model: nn.Module) -> nn.Module | None:
    """What is compiled of a model: the module that `torch.compile` or `Module.compile` was given; None: nothing.

    Of several that lie beside each other the first.
    """
    for module in model.modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            return module._orig_mod
        if module._compiled_call_impl is not None:
            return module
    return None


def refusal(model: nn.Module, part: nn.Module, blocks: Sequence[Block], heads: int | None) -> str | None:
    """Why a compiled model cannot be measured inside its graph, in words; None: it can."""
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


_INSIDE = ("on_attention", "on_cross_attention", "on_attention_call", "on_block", "on_submodule", "on_output_gradient")


def sums_attention(quantity: Quantity) -> bool:
    """Whether what `tap_attention` sums up is what a quantity declares."""
    return type(quantity) in (Attention, CrossAttention)


def in_graph(quantity: Quantity) -> bool:
    """Whether a quantity of the training listens to nothing inside the model, but around it."""
    return all(getattr(type(quantity), tap) is getattr(Quantity, tap) for tap in _INSIDE)


_SHARED = "another model of its kind that was compiled after the monitor was entered and before this one's first step"
_OTHERWISE = "measure it as it is written, by MonitorConfig(compiled='eager')"


# ---- the taps --------------------------------------------------------------------------------------------------------


class GraphSlots:
    """The tensors that a graph with taps reads and writes: flags, draws of rows, and slots of sums.

    A graph keeps some of them for its backward pass, and autograd refuses one whose tensors were written to in between.
    Here that is meant: another forward may come before the backward pass of the first. So what stands around the graph
    writes through `data`, which autograd does not count.
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
            if tensor is not None:  # or a CUDA graph would copy it to an address of its own
                torch._dynamo.mark_static_address(tensor)

    def lower(self) -> None:
        """Nothing is measured from here on."""
        self.lower_attention()
        self.measures_gradients.data.zero_()

    def lower_attention(self) -> None:
        """No attention is measured from here on."""
        self.measures_attention.data.zero_()

    def forget_gradients(self) -> None:
        """Those of the step before."""
        self.gradients.data.zero_()

    def begin_forward(self, attention: bool, gradients: bool, sampler: RowSampler) -> None:
        """The next forward is measured."""
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
        """Add what was found to the accumulators of a micro-batch."""
        layers = len(self.gradients)
        for quantity in quantities:
            if isinstance(quantity, (Attention, CrossAttention)):
                first = 0 if type(quantity) is Attention else layers
                _add_attention(piece[quantity.name], self.attention[first : first + layers])

    def refuse_missing_attention(self, names: Sequence[str]) -> None:
        """An error if the graph that ran has no taps of attention, or attends several times in a block."""
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
        """`RuntimeError` if the graph that ran has no taps of gradients."""
        if not any(self.gradients[:, 0].tolist()):
            raise RuntimeError(
                f"the compiled graph saw no gradient at any block: it was captured without the taps, as that of "
                f"{_SHARED}; {_OTHERWISE}"
            )

    def end_backward(self, piece: Piece, quantities: Sequence[Quantity]) -> None:
        """Write what has arrived to the accumulators of a micro-batch, and forget it."""
        for quantity in quantities:
            if isinstance(quantity, ActivationGrad):
                sums = piece[quantity.name]
                sums["squares"].copy_(self.gradients[:, 1])
                sums["count"].copy_(self.gradients[:, 0].clamp(max=1))
        self.forget_gradients()


def _add_attention(sums, slots: Tensor) -> None:
    heads = min(slots.shape[2], sums["rows"].shape[1])
    # Of several calls in one layer the last has replaced the others: no number is right then.
    slots = slots[..., :heads].masked_fill(slots[:, :1, :heads] > 1, torch.nan)
    sums["rows"][:, :heads] += slots[:, _ROWS]
    sums["entropy"][:, :heads] += slots[:, _ENTROPY]
    sums["parts"][..., :heads] += slots[:, _PARTS]
    highest = sums["max_logit"][:, :heads]
    torch.maximum(highest, slots[:, _MAX_LOGIT].float(), out=highest)


class TracedTaps:
    """The hooks on a compiled model, from entering a monitor to leaving it.

    Args:
        part: what is compiled.
        blocks: inside it.
        slots: what the hooks hand to the operators.
    """

    def __init__(self, part: nn.Module, blocks: Sequence[Block], slots: GraphSlots):
        self.slots, self._part = slots, part
        self._layers = {block.module: block.index for block in blocks}
        self._decoders = decoder_layers(part, blocks)
        self._sight = AttentionSight(blocks)
        self._inputs: dict = {}  # arguments of the forward under way by name
        self._places: dict[nn.Module, tuple[int, int]] = {}  # module that attends -> slot, layer
        for block in blocks:
            for module in block.module.modules():
                kind = self._sight.places.of(module).kind or "self"
                if kind != "other":
                    self._places[module] = (block.index + (kind == "cross") * len(blocks), block.index)

    @property
    def sees_attention(self) -> bool:
        """Whether all attention goes through Transformers' interfaces, the one way in which it is seen in a graph."""
        return bool(self._sight.interfaces) and not self._sight.needs_functions

    @contextmanager
    def attached(self, *, attention: bool, gradients: bool) -> Iterator[TracedTaps]:
        """Hooks stand on the model while the context is open."""
        with ExitStack() as stack:
            if attention:
                begins = self._part.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
                stack.callback(begins.remove)
                stack.callback(self._part.register_forward_hook(self._forward_ends).remove)
                for interface in self._sight.interfaces:
                    stack.enter_context(replaced(interface, "get_interface", self._tapped))
            if gradients:
                for module, layer in self._layers.items():
                    stack.callback(module.register_forward_hook(partial(self._block_ends, layer)).remove)
            yield self

    def __deepcopy__(self, memo: dict) -> TracedTaps:
        """Itself: a copy of a measured model carries hooks along, which then do nothing."""
        return self

    def __reduce__(self) -> tuple:
        """Nothing attached: so a model can be saved as a whole while it is measured."""
        return Nothing, ()

    # ---- what dynamo traces ------------------------------------------------------------------------------------------

    def _forward_begins(self, part: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs = kwargs

    def _forward_ends(self, part: nn.Module, args: tuple, output: object) -> None:
        self._inputs = {}  # or a batch would live until the next one: what the graph leaves in attributes stays there

    def _block_ends(self, layer: int, block: nn.Module, args: tuple, output: object) -> object:
        if block not in self._layers or not torch.is_grad_enabled():
            return None
        slots = self.slots
        if isinstance(output, Tensor):
            if not output.requires_grad:
                return None
            return listened_to(output, slots.gradients, layer, flag=slots.measures_gradients)
        if isinstance(output, tuple):
            for i, value in enumerate(output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    if not value.requires_grad:
                        return None
                    value = listened_to(value, slots.gradients, layer, flag=slots.measures_gradients)
                    return (*output[:i], value, *output[i + 1 :])
        return None

    def _tapped(self, original: Callable) -> Callable:
        def get_interface(name, default):
            attend = original(name, default)

            def tapped_attend(module, query, key, value, attention_mask, *args, **kwargs):
                place = self._places.get(module)
                if place is not None and torch.is_grad_enabled():
                    call = traced_call(name, attend, module, query, key, attention_mask, args, kwargs)
                    if call is not None:
                        self._tap(call, *place)
                return attend(module, query, key, value, attention_mask, *args, **kwargs)

            return tapped_attend

        return get_interface

    def _tap(self, call: AttentionCall, slot: int, layer: int) -> None:
        mask = call.mask if call.bias is None else call.bias
        if call.bias is not None and call.mask is not None:
            added = call.mask.dtype != torch.bool
            mask = call.bias + call.mask if added else call.bias.masked_fill(~call.mask, -torch.inf)
        slots = self.slots
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
