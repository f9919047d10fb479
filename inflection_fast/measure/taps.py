"""The hooks on a model in a measured step. In other steps the model has none.

A measured optimizer step has one or more micro-batches, each a forward pass under autograd and the backward pass that
follows. Evaluations and the recomputations of activation checkpointing do not count: they run without autograd or
outside the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..blocks import Block
from ..quantities.dtensors import local_of, sharded_over
from ..quantities.quantity import OutputGradient, ParameterGradient, SubmoduleForward
from .attention import ATTENTION_TAPS, AttentionTaps
from .attention_call import AttentionCall
from .config import MonitorConfig
from .frozen import FrozenBlocks
from .hooks import HookOwner, catch_hook_errors, force_eager
from .micro_batch import (
    MicroBatch,
    decoder_layers,
    hidden_of,
    named_inputs,
    output_of,
    requiring_grad,
    tensors_of,
    version_of,
)
from .packet import StepSums
from .panel import Panel
from .parameters import BlockParameters, observing_parameter_gradients
from .placements import is_part
from .ranks import Layout

__all__ = ["Taps", "device_of"]


def device_of(blocks: Sequence[Block]) -> torch.device:
    """The device of the sums: that of the first parameter of the blocks on this rank."""
    return next((p for block in blocks for p in block.module.parameters()), torch.empty(0)).device


class Taps(HookOwner):
    """The hooks on a model during one measured step, and the sums that quantities fill. Reused from step to step.

    Args:
        model: what the training loop calls.
        blocks: of it.
        panel: the quantities that listen.
        config: settings of the sampled query rows and sequences.
        heads: size of the axis "head" at first.
        counts_all: forwards count without a backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        panel: Panel,
        config: MonitorConfig,
        *,
        heads: int = 1,
        counts_all: bool = False,
    ):
        self._model, self._blocks, self._panel, self._counts_all = model, blocks, panel, counts_all
        self.device = device_of(blocks)
        self._attention = AttentionTaps(model, blocks, panel, config.rows, config.seed, self.device)
        self._sees_attention = False
        self._layers: dict[nn.Module, list[int]] = {}  # several, where a module runs repeatedly
        for block in blocks:
            self._layers.setdefault(block.module, []).append(block.index)
        self._decoders = decoder_layers(model, blocks)
        groups = panel.of_group("forward"), panel.of_group("backward")
        self.sums = StepSums(panel.fields(len(blocks), heads), *groups, self.device)
        self.parameters = BlockParameters(blocks, self.device)
        self._attached = ExitStack()  # hooks, for the length of a step
        self._listening = ExitStack()  # attention, for the length of a forward
        self._current: MicroBatch | None = None  # inside a training forward
        self._going_back: MicroBatch | None = None  # whose backward pass began last
        self.micro_batches: list[MicroBatch] = []
        self._running: list[tuple[int | None, tuple]] = []  # running blocks, innermost last, and their input
        share = 1.0 if panel.probing else config.frozen_share
        self._frozen = FrozenBlocks(model, blocks, share, config.seed, self._notify_gradient, panel)
        self._layout = Layout()
        self.sharded_outputs: set[int] = set()  # layers whose output the ranks of one batch have split
        self.parameters_read = False
        self.stepped_inside = False  # no gradient was left at the end of the backward pass: an optimizer used them
        self.seconds = 0.0  # host time of the hooks since `attach`
        self.tolerates_errors = False  # errors of hooks become `failure` instead of reaching the training
        self.failure: Exception | None = None  # why this step has no values

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks."""
        self._layout = layout
        self._attention.share(layout)
        self._frozen.share(layout)
        self.parameters.share(layout)

    @property
    def widest(self) -> int:
        """Heads of the widest attention so far, over all ranks; 0: none was observed."""
        return self._attention.widest

    def fit_heads(self, of_probe: Taps | None, *, shrinks: bool) -> None:
        """Fix the size of the axis "head" before the first step is recorded, to the observed number of heads."""
        widest = max(self.widest, 0 if of_probe is None else of_probe.widest)
        if shrinks and not self.sums.fixed and 0 < widest < self.sums.heads:
            self.sums.resize(widest)
        self.sums.fixed = True

    # ---- the length of a step ----------------------------------------------------------------------------------------

    def attach(self, step: int, due: Collection[str]) -> None:
        """Install the hooks that the quantities `due` need, and clear the sums."""
        self.reset()
        panel = self._panel
        panel.begin(due, step)
        self._attention.begin(step)
        self.parameters.look()
        self._sees_attention = any(map(panel.listening, ATTENTION_TAPS))
        self._wants_gradients = bool(panel.listening("on_output_gradient"))
        self._frozen.begin(step)
        self._attached.callback(self._stop_listening)
        self._attach_to_model()
        if panel.listening("on_parameter_gradient"):
            heard = observing_parameter_gradients(self._model, self.parameters, self._parameter_gradient)
            self._attached.enter_context(heard)

    def _attach_to_model(self) -> None:
        add = self._attached.enter_context
        add(force_eager())
        add(self._model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
        add(self._model.register_forward_hook(self._forward_ends, always_call=True))
        for module, layers in self._layers.items():
            begins, ends = partial(self._block_begins, layers), partial(self._block_ends, layers)
            add(module.register_forward_pre_hook(begins, with_kwargs=True))
            add(module.register_forward_hook(ends, always_call=True))
            if self._wants_gradients and self._frozen.possible:  # before other hooks on outputs
                add(module.register_forward_hook(self._block_follows, prepend=True))
        for quantity in self._panel.listening("on_submodule"):
            for layers in self._layers.values():
                for name, module in quantity.submodules(self._blocks[layers[0]]).items():
                    ends = partial(self._submodule_ends, quantity, layers, name)
                    add(module.register_forward_hook(ends, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks. The sums stay, and graphs that are still alive no longer change them. Safe to repeat."""
        for micro_batch in self.micro_batches:
            micro_batch.live = False
        self._attached.close()

    def forget_model(self) -> None:
        """Drop all references to the model; these taps are not attached again."""
        self.reset()
        self._model, self._blocks, self._layers = nn.Identity(), [], {}
        self._attention.forget_model()
        self._frozen.forget_model()
        self.parameters = BlockParameters([], self.device)

    def reset(self) -> None:
        """Clear the sums."""
        self.micro_batches = []
        self._current = self._going_back = None
        self._running.clear()
        self.parameters_read = self.stepped_inside = False
        self.sharded_outputs = set()
        self.seconds, self.failure = 0.0, None
        self.sums.begin()

    @property
    def backwards(self) -> list[MicroBatch]:
        """The micro-batches with a backward pass."""
        return [micro_batch for micro_batch in self.micro_batches if micro_batch.went_back]

    def missing(self) -> str | None:
        """What is missing in this step, a forward or a backward pass, in words."""
        by_gradient = map(self._panel.listening, ("on_output_gradient", "on_parameter_gradient", "on_backward_end"))
        if not self.micro_batches:
            return "no training forward of the monitored model: give Monitor the object that the loop calls"
        if not self.backwards and (any(by_gradient) or not self._counts_all):
            return "no backward pass through the model's outputs: call step() after backward()"
        return None

    def step_warning(self) -> tuple[str, str] | None:
        """A warning about gradients that were not observed in a measured step: kind and message."""
        back = self.backwards
        ran, reached = (set().union(*(getattr(one, name) for one in back)) for name in ("entered", "reached"))
        if self.stepped_inside:
            inside = "no parameter has a gradient when the backward pass ends, as with optimizers that step inside it"
            return "stepped", f"{inside}; parameter_grad has no values"
        ran -= set().union(*(one.chain.layers for one in back if one.chain is not None and one.chain.failure))
        if ran - reached and self._panel.listening("on_output_gradient"):
            names = [self._blocks[layer].name for layer in sorted(ran - reached)]
            return "unreached", f"no gradient reached the outputs of {names}; their activation_grad is NaN"
        return None

    # ---- the length of a forward -------------------------------------------------------------------------------------

    @catch_hook_errors
    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled() or self._current is not None or model is not self._model:
            return
        self._current = MicroBatch(len(self.micro_batches), named_inputs(model, args, kwargs), self.sums.piece())
        self.micro_batches.append(self._current)
        self._running.clear()
        if (functions := self._frozen.forward_begins(self._current)) is not None:
            self._listening.enter_context(functions)
        if self._sees_attention:
            self._listening.enter_context(self._attention.observing(self._observe))

    def _forward_ends(self, model: nn.Module, args: tuple, output: object) -> None:
        if model is not self._model:
            return
        self._stop_listening()
        micro_batch, self._current = self._current, None
        if micro_batch is None:
            return
        if output is None:  # the forward raised: whoever catches that may try again
            self.micro_batches.remove(micro_batch)
            self.sums.forget(micro_batch.piece)
            return
        self._forward_ended(micro_batch, output)
        micro_batch.end_forward()

    @catch_hook_errors
    def _forward_ended(self, micro_batch: MicroBatch, output: object) -> None:
        if self._sees_attention:
            with self._attention.costs_attention_only(self.tolerates_errors):
                self._attention.end_forward(micro_batch, self.sums)
        event = micro_batch.output(output, bool(self._decoders))
        self._panel.notify("on_model_output", micro_batch.piece, event)
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward_begins, micro_batch))
        if self._counts_all:
            self.sums.count(micro_batch.piece)

    def _stop_listening(self) -> None:
        self._listening.close()
        self._running.clear()

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _block_begins(self, layers: list[int], block: nn.Module, args: tuple, kwargs: dict):
        if block not in self._layers:  # of a copy of the model
            return None
        self._block_entered(layers, block, args, kwargs)
        if self._wants_gradients and torch.is_grad_enabled():
            # Also after a failure: recomputing needs the same graph.
            of_chain = self._frozen.block_begins(self._current or self.micro_batches, layers[0], block, args, kwargs)
            return of_chain or requiring_grad(args, kwargs)
        return None

    @catch_hook_errors
    def _block_entered(self, layers: list[int], block: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._current is None:
            return
        visit = self._current.visits[block]
        if visit >= len(layers):
            raise ValueError(
                f"block {self._blocks[layers[0]].name!r} runs more than {'once' if len(layers) == 1 else len(layers)} "
                "in one forward pass (layers that share their weights), so it has no single value per step; measure "
                "other blocks (MonitorConfig.blocks)"
            )
        self._current.visits[block] += 1
        self._current.entered.add(layers[visit])
        hidden = hidden_of(args, kwargs) if self._panel.listening("on_block") else None
        self._running.append((layers[visit], (hidden, version_of(hidden))))

    @catch_hook_errors
    def _block_follows(self, block: nn.Module, args: tuple, output: object) -> object:
        layer = self._running[-1][0] if self._running else None
        if layer is None or block not in self._layers:
            return None
        return self._frozen.block_ends(self._current, layer, output)

    @catch_hook_errors
    def _block_ends(self, layers: list[int], block: nn.Module, args: tuple, output: object) -> None:
        if block not in self._layers:
            return
        micro_batch, hidden = self._current, output_of(block, output)
        layer, before = self._running.pop() if micro_batch is not None and self._running else (None, ())
        if hidden is None or not torch.is_grad_enabled():
            return
        if micro_batch is not None and layer is not None and self._panel.listening("on_block"):
            event = micro_batch.block(layer, block, before, hidden, layer in self._decoders)
            self._panel.notify("on_block", micro_batch.piece, event)
        if not self._wants_gradients or not hidden.requires_grad:
            return
        if micro_batch is None:
            # The block is recomputed in the backward pass. If its output had no graph in the forward (reentrant
            # checkpointing), gradients go through this run; otherwise through the first.
            micro_batch, layer = self._recomputed(layers)
        if micro_batch is not None and layer is not None:
            micro_batch.awaits_gradient.add(layer)
            hidden.register_hook(partial(self._gradient_arrives, micro_batch, layer))

    def _recomputed(self, layers: list[int]) -> tuple[MicroBatch | None, int | None]:
        # Backward passes visit micro-batches in any order. Each layer is recomputed once per micro-batch; of a module
        # that ran several times the last run comes first.
        for micro_batch in self.micro_batches:
            for layer in reversed(layers):
                if layer in micro_batch.entered and layer not in micro_batch.awaits_gradient:
                    return micro_batch, layer
        return None, None

    @catch_hook_errors
    def _submodule_ends(
        self, quantity, layers: list[int], name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        layer = self._running[-1][0] if self._running else None
        if self._current is not None and layer in layers and torch.is_grad_enabled():
            tokens = self._current.tokens_of(next(tensors_of(args), None), layer in self._decoders)
            event = SubmoduleForward(layer, name, module, args, kwargs, output, tokens)
            self._panel.notify("on_submodule", self._current.piece, event, [quantity])

    @catch_hook_errors
    def _observe(self, module: nn.Module | None, read: Callable[[], AttentionCall]) -> None:
        if self._current is not None:
            running = self._running[-1][0] if self._running else None
            may_wait = not self.tolerates_errors
            with self._attention.costs_attention_only(self.tolerates_errors):
                self._attention.observe(self._current, self.sums, running, module, read(), may_wait=may_wait)

    # ---- backward ----------------------------------------------------------------------------------------------------

    @catch_hook_errors
    def _gradient_arrives(self, micro_batch: MicroBatch, layer: int, gradient: Tensor) -> None:
        if micro_batch.live:
            if self._layout.tensor > 1 and is_part(gradient, micro_batch.positions.get(layer), self._layout.tensor):
                self.sharded_outputs.add(layer)
            if self._frozen.is_whole(micro_batch, layer):
                self._notify_gradient(micro_batch, layer, local_of(gradient.detach()))
                self._frozen.walk_down(micro_batch, layer, gradient)
        self._backward_begins(micro_batch, gradient)  # if the loss does not depend on the model's outputs

    def _notify_gradient(
        self, micro_batch: MicroBatch, layer: int, gradient: Tensor, sequences: int | None = None
    ) -> None:
        micro_batch.reached.add(layer)
        event = OutputGradient(layer, gradient, micro_batch.index, sequences)
        self._panel.notify("on_output_gradient", micro_batch.piece, event)

    def _backward_begins(self, micro_batch: MicroBatch, gradient: Tensor) -> None:
        # The backward pass begins at the outputs of the model, also under checkpointing, whose blocks run backward
        # passes of their own inside it.
        if not micro_batch.live:
            return
        micro_batch.went_back = True
        self._going_back = micro_batch
        self.sums.count(micro_batch.piece)
        if not micro_batch.reads_parameters and self._panel.listening("on_backward_end"):
            micro_batch.reads_parameters = True
            # Queued from a callback, so that it runs after callbacks of others (DDP's reduction).
            Variable._execution_engine.queue_callback(
                lambda: Variable._execution_engine.queue_callback(partial(self._read_parameters, micro_batch))
            )

    @catch_hook_errors
    def _parameter_gradient(self, layer: int, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        micro_batch = self._going_back
        if micro_batch is not None and micro_batch.live:
            share = sharded_over(gradient) / self._layout.tensor
            event = ParameterGradient(layer, name, parameter, local_of(gradient.detach()), micro_batch.index, share)
            self._panel.notify("on_parameter_gradient", micro_batch.piece, event)

    @catch_hook_errors
    def _read_parameters(self, micro_batch: MicroBatch) -> None:
        micro_batch.reads_parameters = False
        if micro_batch.live:
            self._notify_backward_end()

    def _notify_backward_end(self) -> None:
        self._panel.notify("on_backward_end", self.sums.packet, self.parameters)
        self.parameters_read = True
        self.stepped_inside = self.parameters.lost_gradients

    # ---- the end of a step -------------------------------------------------------------------------------------------

    def gather(self, loss_scale: float | Tensor) -> None:
        """Add the sums of backward passes to the packet, and divide gradients by the loss scale."""
        packet = self.sums.finish()
        if isinstance(loss_scale, Tensor) or loss_scale != 1.0:
            for field in packet.fields.all:
                if field.accumulator.gradient_power and field.quantity in self._panel.due:
                    packet[field.quantity][field.name].div_(loss_scale**field.accumulator.gradient_power)
