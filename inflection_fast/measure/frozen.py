"""Gradients below the lowest trainable block, for a sample of the sequences of a batch.

Frozen blocks run without a graph, as in a step that is not measured. When a gradient arrives at the output of the
lowest trainable block, this block and the frozen ones below run again on the sampled sequences, from the top down, and
the gradient goes through them. The outputs of linear layers, most of the work, and dropout masks are those of the first
run. So the second run draws no random number and has the activations of the first; the training is equal to the bit.

Sequences must be independent, and blocks must pass on one hidden state [B, T, D]. If a model is known not to be like
that, gradients are exact, with a graph of all sequences. If it shows only at run time, one step has no values, a
warning is logged, and later steps are exact.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import Block
from .attention_call import VARLEN
from .frozen_functions import CannotReplay, RecordedCalls, RecordFunctions, ReplayFunctions
from .micro_batch import MicroBatch, decoder_layers, hidden_of, version_of
from .panel import Panel
from .placements import is_fully_sharded
from .ranks import Layout
from .schedule import seed_of

__all__ = ["Chain", "FrozenBlocks"]

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


# By the first block of a model: the one of several monitors that samples its sequences.
_SAMPLER: WeakKeyDictionary[nn.Module, Callable[[], FrozenBlocks | None]] = WeakKeyDictionary()


@dataclass(eq=False)
class FrozenBlocks:
    """Decides whether gradients of the frozen blocks are those of a sample of the sequences."""

    model: InitVar[nn.Module]  # what the training loop calls
    blocks: InitVar[Sequence[Block]]  # of it
    part: float  # share of the sequences of each micro-batch that is sampled; at least one. 1: all, exactly
    seed: int  # of the sample
    # Called with a micro-batch, a layer, the gradient [n, T, D] at its output, and the number of sequences that it is a
    # sample of.
    notify: Callable[[MicroBatch, int, Tensor, int], None]
    panel: Panel  # the quantities that listen

    def __post_init__(self, model: nn.Module, blocks: Sequence[Block]):
        self._rank = 0
        modules = [block.module for block in blocks]
        self._first = modules[0]
        self.possible = (
            self.part < 1
            and len({block.stack for block in blocks}) == 1
            and not decoder_layers(model, blocks)
            and len(set(modules)) == len(modules)
            and not is_fully_sharded(model)
            and not any(isinstance(part, _BatchNorm) for module in modules for part in module.modules())
        )
        self._random = random.Random()

    def forget_model(self) -> None:
        """Drop all references to the model."""
        self._first, self.possible = nn.Identity(), False

    def share(self, layout: Layout) -> None:
        """Measure as one of several ranks, each of which samples its own batch."""
        self._rank = layout.data_rank
        self.possible &= layout.tensor == layout.stages == 1  # otherwise ranks would have to run blocks together

    def begin(self, step: int) -> None:
        """Seed the samples of `step`: a resumed run has the same ones."""
        self._random.seed(seed_of(step, self.seed) + (self._rank << 32))

    def forward_begins(self, micro_batch: MicroBatch) -> RecordFunctions | None:
        """A forward begins. Returns the function mode that it needs; None: gradients are exact, or all blocks train."""
        listening = self.panel.listening("on_output_gradient")
        if not self.possible or _trains(self._first) or not listening or not all(one.take_samples for one in listening):
            return None
        other = _SAMPLER.get(self._first, lambda: None)()
        if other is not None and other is not self and other.possible:  # two monitors would hide gradients
            return None
        _SAMPLER[self._first] = weakref.ref(self)
        micro_batch.chain = Chain(self._choose)
        return micro_batch.chain.functions

    def block_begins(
        self, of: MicroBatch | list[MicroBatch], layer: int, block: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """The arguments of a block whose gradients are sampled, without a graph; None: it is no such block.

        `of` is the micro-batch of the forward, or all of them where the block is recomputed.
        """
        if not isinstance(of, MicroBatch):
            chains = [one.chain for one in of if one.chain is not None and layer in one.chain.layers]
            return chains[0].detached(args, kwargs) if chains else None
        if of.chain is None or of.chain.closed:
            return None
        try:
            return of.chain.enter(layer, block, args, kwargs)
        except CannotReplay as error:
            self._give_up(of, error)
            return None

    def block_ends(self, micro_batch: MicroBatch | None, layer: int, output: object) -> object:
        """A block ends. Returns its output, with a new graph; None: unchanged."""
        if micro_batch is None or (chain := micro_batch.chain) is None or not chain.runs(layer):
            return None
        try:
            return chain.leave(output)
        except CannotReplay as error:
            self._give_up(micro_batch, error)
            return None

    def is_whole(self, micro_batch: MicroBatch, layer: int) -> bool:
        """Whether a gradient at the output of `layer` is the whole gradient there."""
        chain = micro_batch.chain
        if chain is None or not chain.passes_on(layer):
            return True
        if chain.failure is None:
            self._give_up(
                micro_batch, CannotReplay(f"something beside the next block uses the output of layer {layer}")
            )
        return False

    def walk_down(self, micro_batch: MicroBatch, layer: int, gradient: Tensor) -> None:
        """Propagate the gradient at the output of `layer` through the frozen blocks below, on the sampled sequences."""
        if (chain := micro_batch.chain) is None:
            return
        try:
            for below, of_sample in chain.walk(layer, gradient):
                self.notify(micro_batch, below, of_sample, chain.batch)
        except Exception as error:
            self._give_up(micro_batch, error)

    def _give_up(self, micro_batch: MicroBatch, error: Exception) -> None:
        """Use exact gradients: at once if no block of the chain has run, else from the next measured step on."""
        chain = micro_batch.chain
        if chain is None:
            return
        if not chain.links:
            chain.closed = True
            return
        chain.fail(str(error))
        self.possible = False
        for layer in chain.notified:
            nothing = torch.full((1, 1, 1), torch.nan, device=chain.links[0].hidden.device)
            self.notify(micro_batch, layer, nothing, chain.batch)
        self.panel.warn(
            "frozen",
            f"gradients of frozen blocks cannot be sampled ({error}): in this step they have no values, in later steps "
            "they are exact",
        )

    def _choose(self, batch: int) -> list[int]:
        return sorted(self._random.sample(range(batch), max(1, int(self.part * batch))))


@dataclass(eq=False)
class Link:
    """One block of a chain, with what it needs to run again."""

    layer: int
    block: nn.Module
    args: tuple
    kwargs: dict
    hidden: Tensor  # [n, T, D], the sampled sequences of its input
    autocast: tuple[str, bool, torch.dtype]
    found: RecordedCalls = field(default_factory=deque)
    consumed: bool = False  # its output is the next link's input


class Chain:
    """The frozen blocks of one forward, in order, and the lowest trainable block above them."""

    def __init__(self, choose: Callable[[int], list[int]]):
        self._choose = choose
        self._chosen: list[int] = []
        self.batch = self._length = 0  # sequences of the micro-batch, and positions of each
        self.links: list[Link] = []
        self.closed = False  # no further block belongs to it
        self.failure: str | None = None
        self.notified: list[int] = []  # layers whose gradients were sampled
        # The output of the last link and its version. A weak reference, because autograd keeps its hooks, which refer
        # to this chain, and Python's garbage collector does not find such a cycle.
        self._passed: tuple[weakref.ref[Tensor], int | None] | None = None
        self.functions = RecordFunctions(self.pick)

    @property
    def layers(self) -> set[int]:
        """The layers of all links."""
        return {link.layer for link in self.links}

    def runs(self, layer: int) -> bool:
        """Whether the block of `layer` is the running link."""
        return self.functions.found is not None and self.links[-1].layer == layer

    def passes_on(self, layer: int) -> bool:
        """Whether the output of `layer` is the input of the next link."""
        return any(link.consumed for link in self.links if link.layer == layer)

    def detached(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments of a link that is recomputed, as `enter` made them."""
        hidden = hidden_of(args, kwargs)
        return None if hidden is None else self._without_graph(args, kwargs, hidden)

    @staticmethod
    def _without_graph(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
        return _replaced(args, hidden, hidden.detach()), _replaced(kwargs, hidden, hidden.detach())

    def fail(self, reason: str) -> None:
        """End the chain: there are no values below."""
        self.failure, self.closed = self.failure or reason, True
        self._passed = self.functions.found = None
        for link in self.links:
            link.found.clear()

    def enter(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A block begins. Returns its arguments without a graph; None: it is no link.

        `CannotReplay` if it could not run again.
        """
        hidden = hidden_of(args, kwargs)
        if hidden is None or type(hidden) is not Tensor or hidden.dim() != 3:
            raise CannotReplay("blocks have no input hidden state [B, T, D]")
        if not self.links and hidden.requires_grad:  # something below all blocks trains
            self.closed = True
            return None
        if self.links:
            if self._passed is None or hidden is not self._passed[0]() or version_of(hidden) != self._passed[1]:
                raise CannotReplay("the input of a frozen block is not the output of the block before it")
        else:
            self._begin(hidden, kwargs)
        self._passed = None
        device = hidden.device.type
        autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        cut_args, cut_kwargs = (self._cut(_replaced(value, hidden, _HIDDEN)) for value in (args, kwargs))
        link = Link(layer, block, cut_args, cut_kwargs, self.pick(hidden), autocast)
        if self.links:
            self.links[-1].consumed = True
        self.links.append(link)
        self.functions.found = link.found
        return self._without_graph(args, kwargs, hidden)

    def _begin(self, hidden: Tensor, kwargs: dict) -> None:
        if any(kwargs.get(name) is not None for name in VARLEN):
            raise CannotReplay("sequences are packed into one row")
        self.batch, self._length = hidden.shape[:2]
        self.functions.batch = self.batch
        self._chosen = self._choose(self.batch) if self.batch else []
        if len(self._chosen) >= self.batch:
            raise CannotReplay("there is only one sequence")

    def leave(self, output: object) -> object:
        """A block ends. Returns its output with a new graph; None: it has one already.

        The gradient of the new output is that of all its uses except the next link.
        """
        self.functions.found = None
        rest: tuple = output[1:] if isinstance(output, tuple) else ()
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or type(hidden) is not Tensor:
            raise CannotReplay(f"a frozen block returns a {type(output).__name__}, not a tensor or a tuple of tensors")
        if hidden.requires_grad:  # the lowest trainable block
            self.closed = True
            return None
        passed = hidden.detach().requires_grad_().clone()  # which the model may change in place
        self._passed = weakref.ref(passed), version_of(passed)
        return (passed, *rest) if isinstance(output, tuple) else passed

    def pick(self, tensor: Tensor) -> Tensor:
        """[n, ...]: the sampled sequences of a tensor [B, ...], in new memory."""
        return torch.cat([tensor.detach().narrow(0, place, 1) for place in self._chosen])

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or len(value) != self.batch:
                return value.detach()
            if value.dim() < 3 and self._length == self.batch:
                raise CannotReplay(
                    "there are as many sequences as positions, so the dimension of a tensor is ambiguous"
                )
            return self.pick(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._cut, value)) if type(value) in (tuple, list) else self._refuse(value)
        if isinstance(value, dict) and type(value) is dict:
            return {name: self._cut(one) for name, one in value.items()}
        if isinstance(value, _PLAIN) or value is _HIDDEN:
            return value
        if type(value).__name__ == "DynamicCache" and (self.links or value.get_seq_length() == 0):
            return None  # filled by this forward; it has no earlier keys
        return self._refuse(value)

    def _refuse(self, value: object) -> Any:
        raise CannotReplay(f"frozen blocks have an argument of type {type(value).__name__}")

    def walk(self, layer: int, gradient: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Propagate the gradient at the output of `layer`; yields (layer below, gradient [n, T, D] at its output)."""
        places = [at for at, link in enumerate(self.links) if link.layer == layer]
        if not places or self.failure is not None:
            return
        gradient, at = self.pick(gradient), places[0]
        for below, link in zip(reversed(self.links[:at]), reversed(self.links[1 : at + 1]), strict=True):
            gradient = self._through(link, gradient)
            self.notified.append(below.layer)
            yield below.layer, gradient

    def _through(self, link: Link, gradient: Tensor) -> Tensor:
        """The gradient at the input of a link, from that at its output."""
        hidden = link.hidden.detach().requires_grad_()
        args, kwargs = (_replaced(value, _HIDDEN, hidden) for value in (link.args, link.kwargs))
        device, enabled, dtype = link.autocast
        before = _states(hidden.device)
        again = ReplayFunctions(link.found)
        # In one thread, because a block may recompute itself in its backward pass.
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), again:
            with torch.autocast(device, dtype, enabled):
                output = link.block.forward(*args, **kwargs)  # without hooks, which ran already
            output = output if isinstance(output, Tensor) else output[0]
            again.rewind()
            (found,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
        if not all(map(torch.equal, before, _states(hidden.device))):
            torch.set_rng_state(before[0])
            if len(before) > 1:
                torch.cuda.set_rng_state(before[1], hidden.device)
            raise CannotReplay(f"block {link.layer} draws random numbers that are no observed dropout")
        link.found.clear()
        return found


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _states(device: torch.device) -> list[Tensor]:
    """States of the random generators, on the host."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


# ---- arguments -------------------------------------------------------------------------------------------------------


_HIDDEN = object()  # replaces the hidden state among the saved arguments of a block


def _replaced(value: Any, old: object, new: object) -> Any:
    """Arguments with `new` instead of `old`, at the top level."""
    if isinstance(value, dict):
        return {name: new if one is old else one for name, one in value.items()}
    return tuple(new if one is old else one for one in value)
