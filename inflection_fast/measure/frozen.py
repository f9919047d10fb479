"""Gradients below the lowest trainable block, of some sequences of the batch alone.

Frozen blocks run as in a step that is not measured, without a graph. Where a gradient arrives at the output of the
lowest block that trains, this block and those below run again, from the top down, on the chosen sequences, and the
gradient is sent through them. What the first run has found is not computed again: the outputs of linear layers, which
are most of the work, and which numbers dropout has kept. So the second run draws no random number and sees the
activations of the first, and nothing of the training changes, to the bit.

That needs sequences that know nothing of each other and blocks that pass one hidden state [B, T, D] on. Where a model
is seen at once to be otherwise, its gradients are exact, by a graph of all sequences; what shows only while it runs
costs the values of one step, is told, and all steps after it are exact.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import Block
from .attention_call import VARLEN
from .frozen_functions import Again, Found, Unknown, Watching
from .micro_batch import MicroBatch, decoder_layers, hidden_of, version_of
from .panel import Panel
from .placements import is_fully_sharded
from .ranks import Layout
from .schedule import seed_of

__all__ = ["Chain", "FrozenBlocks"]

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


# By the first block of a model, who takes samples of it: of several monitors one.
_SAMPLER: WeakKeyDictionary[nn.Module, Callable[[], FrozenBlocks | None]] = WeakKeyDictionary()


class FrozenBlocks:
    """Decides whether the frozen blocks of a model are walked back through for a share of the sequences.

    Args:
        model: what the training loop calls.
        blocks: of it.
        share: of the sequences of each micro-batch; at least one. 1: all, exactly.
        seed: of the choice of sequences.
        tell: called with a micro-batch, a layer, the gradient [n, T, D] at its output, and of how many sequences it is.
        panel: the quantities that listen.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        share: float,
        seed: int,
        tell: Callable[[MicroBatch, int, Tensor, int], None],
        panel: Panel,
    ):
        self._share, self._seed, self._rank, self._tell, self._panel = share, seed, 0, tell, panel
        modules = [block.module for block in blocks]
        self._first = modules[0]
        self.possible = (
            share < 1
            and len({block.stack for block in blocks}) == 1
            and not decoder_layers(model, blocks)
            and len(set(modules)) == len(modules)
            and not is_fully_sharded(model)
            and not any(isinstance(part, _BatchNorm) for module in modules for part in module.modules())
        )
        self._random = random.Random()

    def forget_model(self) -> None:
        """Hold nothing of the model any more."""
        self._first, self.possible = nn.Identity(), False

    def share(self, layout: Layout) -> None:
        """Choose as one of several ranks, each among the sequences of its own batch."""
        self._rank = layout.data_rank
        self.possible &= layout.tensor == layout.stages == 1  # else ranks would have to run blocks together

    def forbid(self) -> None:
        """Gradients are exact from now on."""
        self.possible = False

    def begin(self, step: int) -> None:
        """Choose for `step` from now on: a resumed run chooses the same sequences."""
        self._random.seed(seed_of(step, self._seed) + (self._rank << 32))

    def forward_begins(self, micro_batch: MicroBatch) -> Watching | None:
        """A forward begins. Returns what has to watch its functions; None: gradients are exact, or all trains."""
        listening = self._panel.listening("on_output_gradient")
        if not self.possible or _trains(self._first) or not listening or not all(one.take_samples for one in listening):
            return None
        other = _SAMPLER.get(self._first, lambda: None)()
        if other is not None and other is not self and other.possible:  # two would hide gradients from each other
            return None
        _SAMPLER[self._first] = weakref.ref(self)
        micro_batch.chain = Chain(self._choose)
        return micro_batch.chain.functions

    def block_begins(
        self, of: MicroBatch | list[MicroBatch], layer: int, block: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """What a block is called with that runs without a graph, as its gradients are sampled; None: it is none.

        `of` is the micro-batch that goes forward, or all of them where the block is recomputed.
        """
        if not isinstance(of, MicroBatch):
            chains = [one.chain for one in of if one.chain is not None and layer in one.chain.layers]
            return chains[0].detached(args, kwargs) if chains else None
        if of.chain is None or of.chain.closed:
            return None
        try:
            return of.chain.enter(layer, block, args, kwargs)
        except Unknown as error:
            self._give_up(of, error)
            return None

    def block_ends(self, micro_batch: MicroBatch | None, layer: int, output: object) -> object:
        """A block ends: its output, which autograd follows from here on; None: nothing changes."""
        if micro_batch is None or (chain := micro_batch.chain) is None or not chain.runs(layer):
            return None
        try:
            return chain.leave(output)
        except Unknown as error:
            self._give_up(micro_batch, error)
            return None

    def is_whole(self, micro_batch: MicroBatch, layer: int) -> bool:
        """Whether a gradient that arrives at the output of `layer` is all that arrives there."""
        chain = micro_batch.chain
        if chain is None or not chain.passes_on(layer):
            return True
        if chain.failure is None:
            self._give_up(micro_batch, Unknown(f"something beside the next block uses the output of layer {layer}"))
        return False

    def walk_down(self, micro_batch: MicroBatch, layer: int, gradient: Tensor) -> None:
        """Send the gradient at the output of `layer` through the frozen blocks below, for the chosen sequences."""
        if (chain := micro_batch.chain) is None:
            return
        try:
            for below, of_sample in chain.walk(layer, gradient):
                self._tell(micro_batch, below, of_sample, chain.batch)
        except Exception as error:
            self._give_up(micro_batch, error)

    def _give_up(self, micro_batch: MicroBatch, error: Exception) -> None:
        """Exact gradients: at once where no block of the chain has run, else from the next measured step on."""
        chain = micro_batch.chain
        if chain is None:
            return
        if not chain.links:
            chain.closed = True
            return
        chain.fail(str(error))
        self.possible = False
        for layer in chain.told:
            nothing = torch.full((1, 1, 1), torch.nan, device=chain.links[0].hidden.device)
            self._tell(micro_batch, layer, nothing, chain.batch)
        self._panel.warn(
            "frozen",
            f"gradients of frozen blocks cannot be taken of some sequences alone ({error}): in this step those below "
            "have no value, in all later ones they are exact",
        )

    def _choose(self, batch: int) -> list[int]:
        return sorted(self._random.sample(range(batch), max(1, int(self._share * batch))))


@dataclass(eq=False)
class Link:
    """One block of a chain, and what of its run is needed to run it again."""

    layer: int
    block: nn.Module
    args: tuple
    kwargs: dict
    hidden: Tensor  # [n, T, D], the chosen sequences of what went in
    autocast: tuple[str, bool, torch.dtype]
    found: Found = field(default_factory=deque)
    consumed: bool = False  # its output is the next link's input


class Chain:
    """The frozen blocks of one forward, in order, and the lowest block that trains above them."""

    def __init__(self, choose: Callable[[int], list[int]]):
        self._choose = choose
        self._chosen: list[int] = []
        self.batch = self._length = 0  # sequences of the micro-batch, and positions of each
        self.links: list[Link] = []
        self.closed = False  # no further block belongs to it
        self.failure: str | None = None
        self.told: list[int] = []  # layers whose gradients were sampled
        # What the last link returned, and its version then. Weakly, because autograd keeps hooks of it that hold this
        # chain, and Python's garbage collector does not see such a cycle.
        self._passed: tuple[weakref.ref[Tensor], int | None] | None = None
        self.functions = Watching(self.pick)

    @property
    def layers(self) -> set[int]:
        """Those below the lowest block that trains, and that block."""
        return {link.layer for link in self.links}

    def runs(self, layer: int) -> bool:
        """Whether the block of `layer` is the link that runs."""
        return self.functions.found is not None and self.links[-1].layer == layer

    def passes_on(self, layer: int) -> bool:
        """Whether the next link goes on with the output of `layer`."""
        return any(link.consumed for link in self.links if link.layer == layer)

    def detached(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments of a link that is recomputed, as `enter` made them."""
        hidden = hidden_of(args, kwargs)
        return None if hidden is None else self._without_graph(args, kwargs, hidden)

    @staticmethod
    def _without_graph(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
        return _replaced(args, hidden, hidden.detach()), _replaced(kwargs, hidden, hidden.detach())

    def fail(self, reason: str) -> None:
        """There will be no values below; `reason` is told."""
        self.failure, self.closed = self.failure or reason, True
        self._passed = self.functions.found = None
        for link in self.links:
            link.found.clear()

    def enter(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A block begins. Returns what it is called with, of which autograd follows nothing; None: it is no link.

        `Unknown` if it cannot be one.
        """
        hidden = hidden_of(args, kwargs)
        if hidden is None or type(hidden) is not Tensor or hidden.dim() != 3:
            raise Unknown("blocks are given no hidden state [B, T, D]")
        if not self.links and hidden.requires_grad:  # something below all blocks trains
            self.closed = True
            return None
        if self.links:
            if self._passed is None or hidden is not self._passed[0]() or version_of(hidden) != self._passed[1]:
                raise Unknown("what a frozen block is given is not what the one before it has returned")
        else:
            self._begin(hidden, kwargs)
        self._passed = None
        device = hidden.device.type
        autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        cut_args, cut_kwargs = (self._cut(_without(value, hidden)) for value in (args, kwargs))
        link = Link(layer, block, cut_args, cut_kwargs, self.pick(hidden), autocast)
        if self.links:
            self.links[-1].consumed = True
        self.links.append(link)
        self.functions.found = link.found
        return self._without_graph(args, kwargs, hidden)

    def _begin(self, hidden: Tensor, kwargs: dict) -> None:
        if any(kwargs.get(name) is not None for name in VARLEN):
            raise Unknown("sequences are packed into one row")
        self.batch, self._length = hidden.shape[:2]
        self.functions.batch = self.batch
        self._chosen = self._choose(self.batch) if self.batch else []
        if len(self._chosen) >= self.batch:
            raise Unknown("there is only one sequence")

    def leave(self, output: object) -> object:
        """A block ends. Returns its output, which autograd follows from here on; None: it did so before.

        What arrives there comes from all that uses the output, except the next link.
        """
        self.functions.found = None
        rest: tuple = output[1:] if isinstance(output, tuple) else ()
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor) or type(hidden) is not Tensor:
            raise Unknown(f"a frozen block returns a {type(output).__name__}, not a tensor or a tuple of tensors")
        if hidden.requires_grad:  # the lowest block that trains
            self.closed = True
            return None
        passed = hidden.detach().requires_grad_().clone()  # which the model may change in place
        self._passed = weakref.ref(passed), version_of(passed)
        return (passed, *rest) if isinstance(output, tuple) else passed

    def pick(self, tensor: Tensor) -> Tensor:
        """[n, ...]: the chosen sequences of a tensor [B, ...], in new memory."""
        return torch.cat([tensor.detach().narrow(0, place, 1) for place in self._chosen])

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or len(value) != self.batch:
                return value.detach()
            if value.dim() < 3 and self._length == self.batch:
                raise Unknown("there are as many sequences as positions, so nobody knows which of them a tensor has")
            return self.pick(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._cut, value)) if type(value) in (tuple, list) else self._refuse(value)
        if isinstance(value, dict) and type(value) is dict:
            return {name: self._cut(one) for name, one in value.items()}
        if isinstance(value, _PLAIN) or isinstance(value, _Hidden):
            return value
        if type(value).__name__ == "DynamicCache" and (self.links or value.get_seq_length() == 0):
            return None  # which this forward fills: no key stands before those of the batch
        return self._refuse(value)

    def _refuse(self, value: object) -> Any:
        raise Unknown(f"frozen blocks are given a {type(value).__name__}")

    def walk(self, layer: int, gradient: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Send the gradient at the output of `layer` down: (layer below, gradient [n, T, D] at its output), and on."""
        places = [at for at, link in enumerate(self.links) if link.layer == layer]
        if not places or self.failure is not None:
            return
        gradient, at = self.pick(gradient), places[0]
        for below, link in zip(reversed(self.links[:at]), reversed(self.links[1 : at + 1]), strict=True):
            gradient = self._through(link, gradient)
            self.told.append(below.layer)
            yield below.layer, gradient

    def _through(self, link: Link, gradient: Tensor) -> Tensor:
        """The gradient at the input of a link, from that at its output."""
        hidden = link.hidden.detach().requires_grad_()
        args, kwargs = (_filled(value, hidden) for value in (link.args, link.kwargs))
        device, enabled, dtype = link.autocast
        before = _states(hidden.device)
        again = Again(link.found)
        # In this thread, for a block may recompute itself on the way back.
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False), again:
            with torch.autocast(device, dtype, enabled):
                output = link.block.forward(*args, **kwargs)  # without its hooks, which have seen it already
            output = output if isinstance(output, Tensor) else output[0]
            again.rewind()
            (found,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
        if not all(map(torch.equal, before, _states(hidden.device))):
            torch.set_rng_state(before[0])
            if len(before) > 1:
                torch.cuda.set_rng_state(before[1], hidden.device)
            raise Unknown(f"block {link.layer} draws random numbers otherwise than by dropout that can be seen")
        link.found.clear()
        return found


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _states(device: torch.device) -> list[Tensor]:
    """Of the random generators, all of which are kept on the host."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Hidden:
    """Stands where the hidden state was among the arguments of a block."""


_HIDDEN = _Hidden()


def _replaced(value: Any, old: object, new: object) -> Any:
    """Arguments with `new` in the place of the tensor `old`, at the top level."""
    if isinstance(value, dict):
        return {name: new if one is old else one for name, one in value.items()}
    return tuple(new if one is old else one for one in value)


def _without(value: Any, hidden: Tensor) -> Any:
    return _replaced(value, hidden, _HIDDEN)


def _filled(value: Any, hidden: Tensor) -> Any:
    return _replaced(value, _HIDDEN, hidden)
