"""Everything that is attached to a model while it is measured, and nothing while it is not.

A measured optimizer step has one or more micro-batches, each a forward pass of the model under autograd and the
backward pass that follows. Only such forwards count: evaluations in between, and the recomputations of activation
checkpointing, run without autograd or outside the model's forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..blocks import Block
from .accumulators import MOST_LISTS, GradientNorms, HeadMeans
from .arguments import loss_of, named_inputs, requiring_grad, tensors_of
from .attention import AttentionCall
from .attention_taps import AttentionTaps
from .distributed import Layout, is_sharded, local_of
from .eagerly import eagerly
from .gradients import gradients_of
from .micro_batch import MicroBatch
from .packet import Packet
from .recent import Recent
from .rows import ValidRows

__all__ = ["Taps"]

logger = logging.getLogger(__name__)


def _forgiving(hook):
    """A hook that fails costs the step its values. Before a first step was measured, it is an error of the set-up."""

    @wraps(hook)
    def forgiving(self: Taps, *args):
        if self.failure is not None:
            return None
        try:
            return hook(self, *args)
        except Exception as error:
            if not self.forgives:
                raise
            self.failure = error
            return None

    return forgiving


class Taps:
    """The hooks on a model and the accumulators they fill during one measured step. Reused from step to step."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], signals: Sequence[str], rows: int | None, seed: int):
        self._model, self._blocks, self._signals = model, blocks, signals
        self.device = next(blocks[0].module.parameters(), torch.empty(0)).device
        self._attention: AttentionTaps | None = None
        if "attention" in signals:
            self._attention = AttentionTaps(model, blocks, rows, seed, self.device, self.allocate)
        self._marks: dict[frozenset[int], Tensor] = Recent(MOST_LISTS)
        self._attached = ExitStack()  # hooks, for the length of a step
        self._listening = ExitStack()  # attention, for the length of a forward
        self._current: MicroBatch | None = None  # inside a training forward
        self._micro_batches: list[MicroBatch] = []
        self._layer: int | None = None  # of the block that is running
        self._layout = Layout()
        self.sharded_outputs: set[int] = set()  # layers whose output the ranks of one batch have split
        self.packet: Packet | None = None  # made when the first call tells how many heads there are
        self.probe = False  # the packet has room for the sums over a probe set
        self.activations = GradientNorms(len(blocks), self.device)
        self.parameter_squares: Tensor | None = None  # [<= L], of the last backward pass
        self.losses: list[Tensor] = []  # what the model returned under the name "loss", per micro-batch
        self.seconds = 0.0  # host time spent in here since `attach`
        self.forgives = False  # what a hook raises is kept as `failure` and does not reach the training
        self.failure: Exception | None = None  # why this step has no values

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks."""
        self._layout = layout
        if self._attention is not None:
            self._attention.share(layout)

    # ---- the length of a step ----------------------------------------------------------------------------------------

    def attach(self, step: int) -> None:
        """Install the hooks and forget the step before."""
        self.reset()
        if self._attention is not None:
            self._attention.begin(step)
        self._attached.callback(self._stop_listening)
        add = self._attached.enter_context
        add(eagerly())
        add(_removed(self._model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)))
        add(_removed(self._model.register_forward_hook(self._forward_ends, always_call=True)))
        for block in self._blocks:
            begins, ends = partial(self._block_begins, block.index), partial(self._block_ends, block.index)
            add(_removed(block.module.register_forward_pre_hook(begins, with_kwargs=True)))
            add(_removed(block.module.register_forward_hook(ends, always_call=True)))

    def __deepcopy__(self, memo: dict) -> Taps:
        """Itself: a copy of a measured model (an average of its weights) carries hooks along, which then do nothing."""
        return self

    def __reduce__(self) -> tuple:
        """Nothing attached: so a model can be saved as a whole while it is measured."""
        return _Nothing, ()

    def detach(self) -> None:
        """Remove the hooks. What was accumulated stays; graphs that are still alive write no more. Safe to repeat."""
        for micro_batch in self._micro_batches:
            micro_batch.live = False
        self._attached.close()

    def forget_model(self) -> None:
        """Hold nothing of the model any more: these taps are not attached again."""
        self.reset()
        self._model, self._blocks = None, []
        if self._attention is not None:
            self._attention.forget_model()

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._micro_batches = []
        self._current = self._layer = self.parameter_squares = None
        self.activations.reset()
        self.losses = []
        self.seconds, self.failure = 0.0, None
        if self.packet is not None:
            self.packet.reset()

    @property
    def forwards(self) -> int:
        """How many training forwards there were."""
        return len(self._micro_batches)

    @property
    def backwards(self) -> int:
        """How many of them were followed by a backward pass that was seen."""
        return sum(micro_batch.went_back for micro_batch in self._micro_batches)

    @property
    def unreached(self) -> list[int]:
        """Layers that ran and whose output no gradient has reached."""
        entered = set().union(*(micro_batch.entered for micro_batch in self._micro_batches))
        return sorted(entered - self.activations.seen)

    # ---- the length of a forward -------------------------------------------------------------------------------------

    @_forgiving
    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled() or self._current is not None or model is not self._model:
            return
        started = perf_counter()
        self._current = MicroBatch(len(self._micro_batches), ValidRows(named_inputs(model, args, kwargs)))
        self._micro_batches.append(self._current)
        if self._attention is not None:
            self._listening.enter_context(self._attention.seeing(self._see))
        self.seconds += perf_counter() - started

    def _forward_ends(self, model: nn.Module, args: tuple, output: object) -> None:
        if model is not self._model:
            return
        self._stop_listening()
        micro_batch, self._current = self._current, None
        if micro_batch is None:
            return
        if output is None:  # the forward raised: whoever catches that may try again
            self._micro_batches.remove(micro_batch)
            if micro_batch.added and self.failure is None:
                self.failure = RuntimeError("a forward pass raised when a part of it had been added up")
            return
        self._forward_ended(micro_batch, output)
        micro_batch.end_forward()

    @_forgiving
    def _forward_ended(self, micro_batch: MicroBatch, output: object) -> None:
        started = perf_counter()
        if self._attention is not None:
            self._attention.refuse_unseen(micro_batch)
            self._attention.add_up(micro_batch)
        if "parameter_grad" in self._signals or "activation_grad" in self._signals:
            for tensor in tensors_of(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._backward_begins, micro_batch))
        loss = loss_of(output)
        if loss is not None:
            self.losses.append(loss.detach())
        self.seconds += perf_counter() - started

    def _stop_listening(self) -> None:
        self._listening.close()
        self._layer = None

    def _is_own(self, layer: int, block: nn.Module) -> bool:
        """Whether `block` is of the model that is measured, not of a copy, which may outlive the measuring."""
        return layer < len(self._blocks) and block is self._blocks[layer].module

    def _block_begins(self, layer: int, block: nn.Module, args: tuple, kwargs: dict):
        if not self._is_own(layer, block):
            return None
        self._block_entered(layer)
        if "activation_grad" in self._signals and torch.is_grad_enabled():
            return requiring_grad(args, kwargs)  # whatever failed before: recomputing must meet the same graph
        return None

    @_forgiving
    def _block_entered(self, layer: int) -> None:
        self._layer = layer
        if self._current is None:
            return
        if layer in self._current.entered:
            raise ValueError(
                f"block {self._blocks[layer].name!r} runs more than once in one forward pass (layers that share "
                "their weights), so it has no single value per step; measure other blocks (MonitorConfig.blocks)"
            )
        self._current.entered.add(layer)

    @_forgiving
    def _block_ends(self, layer: int, block: nn.Module, args: tuple, output: object) -> None:
        if not self._is_own(layer, block):
            return
        self._layer = None
        if "activation_grad" not in self._signals or not torch.is_grad_enabled():
            return
        hidden = next(tensors_of(output), None)
        if hidden is None or not hidden.requires_grad:
            return
        micro_batch = self._current
        if micro_batch is None:
            # A block that is recomputed inside backward. Where its output had no graph the first time (reentrant
            # checkpointing), this is the one that gradients go through; otherwise they go through the first.
            micro_batch = self._recomputed(layer)
            if micro_batch is None:
                return
        micro_batch.awaits_gradient.add(layer)
        hidden.register_hook(partial(self._gradient_arrives, micro_batch, layer))

    def _recomputed(self, layer: int) -> MicroBatch | None:
        # Backward passes visit micro-batches in any order; recomputing visits each layer once per micro-batch.
        return next((m for m in self._micro_batches if layer in m.entered and layer not in m.awaits_gradient), None)

    # ---- attention ---------------------------------------------------------------------------------------------------

    @_forgiving
    def _see(self, module: nn.Module | None, read: Callable[[], AttentionCall]) -> None:
        if self._current is not None:
            started = perf_counter()
            self._attention.see(self._current, self._layer, module, read(), may_wait=not self.forgives)
            self.seconds += perf_counter() - started

    def allocate(self, heads: int) -> None:
        """Make the packet, for blocks of so many heads on all ranks together."""
        self.packet = Packet(len(self._blocks), heads, self.device, probe=self.probe)
        names = ("attention", "attention_parts", "max_logit")
        self._write_attention_into(self.packet, names)

    def write_probe_into(self, packet: Packet) -> None:
        """Add the entropies up in the part of another's packet that is for a probe set."""
        self._write_attention_into(packet, ("probe_attention",))

    def _write_attention_into(self, packet: Packet, names: Sequence[str]) -> None:
        if self._attention is not None:
            means_of = lambda part: HeadMeans(*(packet[name][..., part] for name in names))  # noqa: E731
            self._attention.write_into(packet.heads, means_of)

    # ---- backward ----------------------------------------------------------------------------------------------------

    @_forgiving
    def _gradient_arrives(self, micro_batch: MicroBatch, layer: int, gradient: Tensor) -> None:
        if micro_batch.live:
            started = perf_counter()
            if self._layout.tensor > 1 and self._is_part(gradient, micro_batch.positions.get(layer)):
                self.sharded_outputs.add(layer)
            with torch.no_grad():
                self.activations.push(micro_batch.index, layer, local_of(gradient))
            self.seconds += perf_counter() - started
        self._backward_begins(micro_batch, gradient)  # for a loss that is computed from something else than the outputs

    @_forgiving
    def _is_part(self, gradient: Tensor, positions: int | None) -> bool:
        """Whether the ranks of one batch have split the output of a block: it has fewer positions than queries."""
        split = gradient.shape[:2].numel() * self._layout.tensor == positions
        return is_sharded(gradient) or (gradient.dim() > 2 and split)

    def _backward_begins(self, micro_batch: MicroBatch, gradient: Tensor) -> None:
        # The outputs of the model are where its backward pass begins, also under checkpointing, whose blocks run
        # backward passes of their own inside it.
        micro_batch.went_back = True
        if micro_batch.live and "parameter_grad" in self._signals and not micro_batch.reads_parameters:
            micro_batch.reads_parameters = True
            # Queued from inside a callback, it runs after those that others (DDP's reduction) queue meanwhile.
            Variable._execution_engine.queue_callback(
                lambda: Variable._execution_engine.queue_callback(partial(self._read_parameters, micro_batch))
            )

    @_forgiving
    def _read_parameters(self, micro_batch: MicroBatch) -> None:
        micro_batch.reads_parameters = False
        started = perf_counter()
        gradients, groups = [], []
        for block in self._blocks:
            for gradient in gradients_of(block.module.parameters()):
                gradients.append(gradient)
                groups.append(block.index)
        if gradients:
            # Gradients add up over micro-batches, so the last backward pass of a step has them whole.
            self.parameter_squares = self._layout.parameter_squares(gradients, groups)
        self.seconds += perf_counter() - started

    # ---- the end of a step -------------------------------------------------------------------------------------------

    def gather(self, loss_scale: float | Tensor) -> None:
        """Write the sums that were kept elsewhere until now into the packet."""
        packet = self.packet
        packet["activation_squares"].copy_(self.activations.squares() / loss_scale**2)
        packet["activation_count"].copy_(self.activation_counts())
        if self.parameter_squares is not None:
            squares = self.parameter_squares / loss_scale**2
            packet["parameter_squares"][: len(squares)] = squares
            trained = [b.index for b in self._blocks if any(p.requires_grad for p in b.module.parameters())]
            packet["parameter_count"].copy_(self._marked(trained))

    def activation_counts(self) -> Tensor:
        """[L] float64: 1 for a layer whose output a gradient has reached, else 0."""
        return self._marked(self.activations.seen)

    def _marked(self, layers: Iterable[int]) -> Tensor:
        """[L] float64, 1 at `layers`. Kept for the next step, because a copy from the host takes its time."""
        key = frozenset(layers)
        if key not in self._marks:
            marks = [float(layer in key) for layer in range(len(self._blocks))]
            self._marks[key] = torch.tensor(marks, dtype=torch.float64).to(self.device, non_blocking=True)
        return self._marks[key]


class _Nothing:
    """What taps are to a model that was read from a file: hooks that do nothing."""

    def _do_nothing(self, *args) -> None:
        pass

    _forward_begins = _forward_ends = _block_begins = _block_ends = _do_nothing


@contextmanager
def _removed(handle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
