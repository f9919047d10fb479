"""What is attached to a model that may be compiled: taps inside its graph, and around it what sums them up."""

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
from .graph import GraphSlots, TracedTaps, compiled_part, in_graph, refusal, sums_attention
from .hooks import forgiving, hooks_guarded, removed, replaced
from .micro_batch import MicroBatch
from .taps import Taps

__all__ = ["GraphTaps"]

logger = logging.getLogger(__name__)

_AS_WRITTEN = "measured steps of the compiled model run as it is written, which costs its speed"


class GraphTaps(Taps):
    """Taps that leave a compiled model compiled while they measure, where all that is due can be seen in its graph.

    Arguments are those of `Taps`. Until `open`, and of a model that is not compiled, they do what `Taps` do.
    """

    def __init__(self, model: nn.Module, blocks, panel, config: MonitorConfig, **options):
        super().__init__(model, blocks, panel, config, **options)
        self._config = config
        self._around = model  # what hooks stand around in a step that is measured in the graph
        # Where the model may be compiled later: its heads, and the cadences of the quantities.
        self._waits_for: tuple[int | None, Mapping[str, int]] | None = None
        self._traced: TracedTaps | None = None
        self._opened = ExitStack()
        self._as_written: frozenset[str] = frozenset()  # quantities that no graph has taps for
        self._in_graph = False  # the step under way is measured in the graph
        self._ending: set[MicroBatch] = set()  # whose backward pass is under way

    # ---- as long as the monitor --------------------------------------------------------------------------------------

    def open(self, heads: int | None, every: Mapping[str, int]) -> None:
        """Put taps on the model, if it is compiled and wants them.

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
            return  # no step is left that is measured in a graph
        # What was compiled has no taps, and no guard that would notice: hooks are not looked at.
        torch.compiler.reset()
        self._opened.enter_context(hooks_guarded())
        self._as_written = frozenset(as_written)
        self._traced = self._opened.enter_context(traced.attached(attention=attention, gradients=gradients))

    def _look_again(self) -> None:
        """Put taps on a model that was compiled after `open`. It is compiled once more where it has run so."""
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
        """What `torch.compile` has made of the model knows it, and not the other way round: it is on the stack."""
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
        return gradients if isinstance(quantity, ActivationGrad) else in_graph(quantity)

    def _reaches_all(self) -> bool:
        """Whether the first block trains: then gradients reach the outputs of all."""
        return any(parameter.requires_grad for parameter in self._blocks[0].module.parameters())

    def forget_model(self) -> None:
        """Take the taps off the model, and hold nothing of it any more."""
        self._opened.close()
        self._traced = self._waits_for = None
        self._around = nn.Identity()
        super().forget_model()

    # ---- the length of a step ----------------------------------------------------------------------------------------

    def attach(self, step: int, due: Collection[str]) -> None:
        """Raise flags in the graph, or install hooks and run the model as it is written, whatever `due` needs."""
        self._look_again()
        gradients = any(isinstance(self._panel.quantities[name], ActivationGrad) for name in due)
        self._in_graph = self._traced is not None and self._as_written.isdisjoint(due)
        self._in_graph &= self._reaches_all() or not gradients  # blocks may have been frozen since
        self._ending.clear()
        super().attach(step, due)

    def _attach_to_model(self) -> None:
        if not self._in_graph:
            super()._attach_to_model()
            return
        self._sees_attention = self._wants_gradients = False  # by hooks
        self._slots.forget_gradients()
        add = self._attached.enter_context
        if self._around._compiled_call_impl is not None:
            add(_around_compiled(self._around, self._run_begins, self._run_ends))
        else:
            add(removed(self._around.register_forward_pre_hook(self._run_begins, with_kwargs=True)))
            add(removed(self._around.register_forward_hook(self._run_ends, always_call=True)))

    def detach(self) -> None:
        """Lower the flags, and remove what stands around the graph. Safe to repeat."""
        super().detach()
        if self._traced is not None:
            self._traced.slots.lower()

    @property
    def _slots(self) -> GraphSlots:
        assert self._traced is not None, "only steps that are measured in a graph ask"
        return self._traced.slots

    def check_seen(self, step: int, warn: Callable[[str, str], None]) -> None:
        """A step whose forward or backward went by unseen must not pass for one that was measured."""
        missing = self.missing()
        if missing is not None:
            if not self.forgives:
                raise RuntimeError(f"the first measured step ({step}) saw {missing}")
            warn("unseen", f"measured step {step} saw {missing}; its values are NaN")
        elif complaint := self.complaint():
            warn(*complaint)

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

    @forgiving
    def _raise_flags(self) -> None:
        attention = any(map(self._panel.listening, ("on_attention", "on_cross_attention")))
        gradients = bool(self._panel.listening("on_output_gradient"))
        self._slots.begin_forward(attention, gradients, self._attention.sampler)

    def _forward_ends(self, model: nn.Module, args: tuple, output: object) -> None:
        super()._forward_ends(model, args, output)
        if self._in_graph:
            self._slots.lower_attention()

    def _forward_ended(self, micro_batch: MicroBatch, output: object) -> None:
        if self._in_graph:
            self._add_attention(micro_batch)
        super()._forward_ended(micro_batch, output)

    @forgiving
    def _add_attention(self, micro_batch: MicroBatch) -> None:
        listening = self._panel.listening("on_attention") + self._panel.listening("on_cross_attention")
        if not listening:
            return
        if not self.forgives:
            self._slots.refuse_missing_attention([block.name for block in self._blocks])
        self._slots.end_forward(micro_batch.piece, listening)

    # ---- the length of a backward ------------------------------------------------------------------------------------

    def _backward_begins(self, micro_batch: MicroBatch, gradient: Tensor) -> None:
        super()._backward_begins(micro_batch, gradient)
        wanted = self._in_graph and micro_batch.live and self._panel.listening("on_output_gradient")
        if wanted and micro_batch not in self._ending:
            self._ending.add(micro_batch)
            Variable._execution_engine.queue_callback(partial(self._backward_ended, micro_batch))

    @forgiving
    def _backward_ended(self, micro_batch: MicroBatch) -> None:
        self._ending.discard(micro_batch)
        if not micro_batch.live:
            return
        if not self.forgives and not self._ending:
            self._slots.refuse_missing_gradients()
        # Of several micro-batches in one backward pass the first gets the sum: they are added up later anyhow.
        self._slots.end_backward(micro_batch.piece, self._panel.listening("on_output_gradient"))


def _around_compiled(model: nn.Module, begins: Callable, ends: Callable) -> AbstractContextManager[None]:
    """Hooks on a model that `Module.compile` was called of: its own ones would be compiled with it."""

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

    return replaced(model, "_compiled_call_impl", watching)
