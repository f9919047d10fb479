"""Taps on a model that may be compiled: inside its graph, and hooks around it that collect their sums."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..quantities.activation_grad import ActivationGrad
from ..quantities.quantity import Quantity
from .config import MonitorConfig
from .graph import GraphSlots, TracedTaps, compiled_part, refusal, sums_attention
from .hooks import catch_hook_errors, guard_module_hooks, patched
from .micro_batch import MicroBatch
from .panel import overrides
from .taps import Taps

__all__ = ["GraphTaps"]

logger = logging.getLogger(__name__)

_INSIDE = ("on_attention", "on_cross_attention", "on_attention_call", "on_block", "on_submodule", "on_output_gradient")
_AS_WRITTEN = "measured steps of the compiled model run uncompiled, and are slower"


class GraphTaps(Taps):
    """Taps inside the graph of a compiled model, where all due quantities can be measured there.

    Arguments as for `Taps`. Before `open`, and for a model that is not compiled, they work like `Taps`.
    """

    def __init__(self, model: nn.Module, blocks, panel, config: MonitorConfig, **options):
        super().__init__(model, blocks, panel, config, **options)
        self._config = config
        self._around = model  # the module that has the hooks in a step that is measured in the graph
        # If the model is not compiled yet: its heads, and the cadences of the quantities.
        self._waits_for: tuple[int | None, Mapping[str, int]] | None = None
        self._traced: TracedTaps | None = None
        self._opened = ExitStack()
        self._as_written: frozenset[str] = frozenset()  # quantities without taps for a graph
        self._in_graph = False  # the present step is measured in the graph
        self._ending: set[MicroBatch] = set()  # whose backward pass runs

    # ---- the lifetime of the monitor ---------------------------------------------------------------------------------

    def open(self, heads: int | None, every: Mapping[str, int]) -> None:
        """Put taps on the model, if it is compiled and they are possible.

        Args:
            heads: of its widest block, if it states them.
            every: cadences of the quantities.
        """
        if self._config.compiled != "graph":
            return
        part = compiled_part(self._around)
        if part is None:
            self._waits_for = heads, every
            return
        reason = refusal(self._model, part, self._blocks, heads)
        if reason is None and self._layout.tensor > 1:
            reason = "its ranks share one batch"
        if self._layout.stages > 1:
            reason = "it is a stage of a pipeline"
        if self._attention.context is not None:
            reason = "its ranks share sequences"
        if reason is not None:
            logger.warning("%s: %s", _AS_WRITTEN, reason)
            return
        slots = GraphSlots(len(self._blocks), self.sums.heads, self._config.rows, self.device)
        traced = TracedTaps(part, self._blocks, slots)
        trained = [self._panel.quantities[name] for name in every if self._panel.quantities[name].data == "training"]
        attention = traced.sees_attention and any(map(sums_attention, trained))
        gradients = any(isinstance(one, ActivationGrad) for one in trained) and self._reaches_all()
        as_written = [one.name for one in trained if not self._has_tap(one, attention, gradients)]
        if as_written:
            logger.warning("where %s are due, %s: no graph has taps for them", as_written, _AS_WRITTEN)
        rest = [one.name for one in trained if one.name not in as_written]
        if all(any(every[name] % every[other] == 0 for other in as_written) for name in rest):
            return  # no step would be measured in the graph
        # Code compiled so far has no taps, and no guard checks for hooks.
        torch.compiler.reset()
        self._opened.enter_context(guard_module_hooks())
        self._as_written = frozenset(as_written)
        self._traced = self._opened.enter_context(traced.attached(attention=attention, gradients=gradients))

    def _look_again(self) -> None:
        """Put taps on a model that was compiled after `open`; if it has run, it is compiled again."""
        if self._waits_for is None or compiled_part(self._around) is None:
            return
        (heads, every), self._waits_for = self._waits_for, None
        self.open(heads, every)
        if self._traced is not None:
            logger.warning(
                "the model was compiled after the monitor was entered: from here on it is measured in its graph, with "
                "taps that cost one more compilation where it has run; enter the monitor on the compiled model instead"
            )

    def _note_compiler(self) -> None:
        """Find the `OptimizedModule` that `torch.compile(model)` returned: it is on the call stack of the forward."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            caller = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
            if isinstance(caller, torch._dynamo.OptimizedModule) and caller._orig_mod is self._model:
                self._around = caller
                return
            frame = frame.f_back

    def _has_tap(self, quantity: Quantity, attention: bool, gradients: bool) -> bool:
        if sums_attention(quantity):
            return attention
        if isinstance(quantity, ActivationGrad):
            return gradients
        return not any(overrides(quantity, tap) for tap in _INSIDE)

    def _reaches_all(self) -> bool:
        """Whether the first block trains, so that gradients reach the outputs of all blocks."""
        return any(parameter.requires_grad for parameter in self._blocks[0].module.parameters())

    def forget_model(self) -> None:
        """Remove the taps, and drop all references to the model."""
        self._opened.close()
        self._traced = self._waits_for = None
        self._around = nn.Identity()
        super().forget_model()

    # ---- the length of a step ----------------------------------------------------------------------------------------

    def attach(self, step: int, due: Collection[str]) -> None:
        """Prepare a step in the graph, or install hooks and run the model uncompiled, as `due` needs."""
        self._look_again()
        gradients = any(isinstance(self._panel.quantities[name], ActivationGrad) for name in due)
        self._in_graph = self._traced is not None and self._as_written.isdisjoint(due)
        self._in_graph &= self._reaches_all() or not gradients  # blocks may have been frozen meanwhile
        self._ending.clear()
        super().attach(step, due)

    def _attach_to_model(self) -> None:
        if not self._in_graph:
            super()._attach_to_model()
            return
        self._sees_attention = self._wants_gradients = False  # no hooks for these
        self._slots.gradients.data.zero_()
        add = self._attached.enter_context
        if self._around._compiled_call_impl is not None:
            add(_around_compiled(self._around, self._run_begins, self._run_ends))
        else:
            add(self._around.register_forward_pre_hook(self._run_begins, with_kwargs=True))
            add(self._around.register_forward_hook(self._run_ends, always_call=True))

    def detach(self) -> None:
        """Set the flags to 0, and remove the hooks around the graph. Safe to repeat."""
        super().detach()
        if self._traced is not None:
            self._traced.slots.lower()

    @property
    def _slots(self) -> GraphSlots:
        assert self._traced is not None, "used in steps that are measured in the graph"
        return self._traced.slots

    def check_seen(self, step: int, warn: Callable[[str, str], None]) -> None:
        """Warn if the step had no forward or backward pass; raise in the first measured step."""
        missing = self.missing()
        if missing is not None:
            if not self.tolerates_errors:
                raise RuntimeError(f"the first measured step ({step}) saw {missing}")
            warn("unseen", f"measured step {step} saw {missing}; its values are NaN")
        elif step_warning := self.step_warning():
            warn(*step_warning)

    # ---- the length of a forward -------------------------------------------------------------------------------------

    def _run_begins(self, around: nn.Module, args: tuple, kwargs: dict) -> None:
        if around is self._around:  # not a copy of it
            self._forward_begins(self._model, args, kwargs)

    def _run_ends(self, around: nn.Module, args: tuple, output: object) -> None:
        if around is self._around:
            self._forward_ends(self._model, args, output)

    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._waits_for is not None and self._around is self._model:
            self._note_compiler()
        before = self._current
        super()._forward_begins(model, args, kwargs)
        if self._in_graph and self._current is not None and self._current is not before:
            self._raise_flags()

    @catch_hook_errors
    def _raise_flags(self) -> None:
        attention = any(map(self._panel.listening, ("on_attention", "on_cross_attention")))
        gradients = bool(self._panel.listening("on_output_gradient"))
        self._slots.begin_forward(attention, gradients, self._attention.sampler)

    def _forward_ends(self, model: nn.Module, args: tuple, output: object) -> None:
        super()._forward_ends(model, args, output)
        if self._in_graph:
            self._slots.measures_attention.data.zero_()

    def _forward_ended(self, micro_batch: MicroBatch, output: object) -> None:
        if self._in_graph:
            self._add_attention(micro_batch)
        super()._forward_ended(micro_batch, output)

    @catch_hook_errors
    def _add_attention(self, micro_batch: MicroBatch) -> None:
        listening = self._panel.listening("on_attention") + self._panel.listening("on_cross_attention")
        if not listening:
            return
        if not self.tolerates_errors:
            self._slots.refuse_missing_attention([block.name for block in self._blocks])
        self._slots.end_forward(micro_batch.piece, listening)

    # ---- the length of a backward ------------------------------------------------------------------------------------

    def _backward_begins(self, micro_batch: MicroBatch, gradient: Tensor) -> None:
        super()._backward_begins(micro_batch, gradient)
        wanted = self._in_graph and micro_batch.live and self._panel.listening("on_output_gradient")
        if wanted and micro_batch not in self._ending:
            self._ending.add(micro_batch)
            Variable._execution_engine.queue_callback(partial(self._backward_ended, micro_batch))

    @catch_hook_errors
    def _backward_ended(self, micro_batch: MicroBatch) -> None:
        self._ending.discard(micro_batch)
        if not micro_batch.live:
            return
        if not self.tolerates_errors and not self._ending:
            self._slots.refuse_missing_gradients()
        # Of several micro-batches in one backward pass the first gets the sum; they are added later anyway.
        self._slots.end_backward(micro_batch.piece, self._panel.listening("on_output_gradient"))


def _around_compiled(model: nn.Module, begins: Callable, ends: Callable) -> AbstractContextManager[None]:
    """Hooks around a model after `Module.compile()`, whose own hooks are part of the compiled code."""

    def watching(compiled: Callable) -> Callable:
        def watched(*args, **kwargs):
            begins(model, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
                return output
            finally:
                ends(model, args, output)

        return watched

    return patched(model, "_compiled_call_impl", watching)
