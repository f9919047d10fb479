"""One forward pass of a measured step and the backward pass that follows it."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from ..quantities.quantity import BlockForward, ModelOutput
from .arguments import loss_of
from .packet import Piece
from .placements import local_of
from .rows import ValidRows, token_mask

__all__ = ["MicroBatch", "version_of"]


class MicroBatch:
    """What one training forward has shown so far, and what its backward pass still has to find."""

    def __init__(self, index: int, inputs: dict, piece: Piece):
        self.index, self.piece = index, piece
        self.inputs: dict | None = inputs  # arguments of the model's forward by name
        self.valid: ValidRows | None = ValidRows(inputs)
        self.live = True  # False once its step is over: hooks of a graph that lives longer must not write
        self.entered: set[int] = set()  # layers whose block ran
        self.visits: Counter = Counter()  # how often a module that is a block has run
        self.attended: Counter = Counter()  # layer -> how many of its attention calls were seen
        # (layer, statistics [B, H, R], valid rows [B, R], strata, how many calls of the layer were before)
        self.waiting: list[tuple] = []
        self.waiting_bytes = 0
        # (query length, number of the call) -> sampled positions, and with the id of starts of packed sequences as well
        self.strata: dict[tuple, object] = {}
        self.positions: Counter = Counter()  # layer -> queries of a head, of all rows of the batch
        self.awaits_gradient: set[int] = set()  # layers whose output has a hook
        self.reached: set[int] = set()  # layers whose output a gradient has reached
        self.went_back = False  # a backward pass went through it
        self.reads_parameters = False  # an engine callback is on its way
        self._tokens: dict[bool, Tensor | None] = {}

    def tokens(self, shape: tuple[int, ...], decoder: bool) -> Tensor | None:
        """[B, T] bool, True at tokens, for a tensor [B, T, ...]; None: all, or nobody knows."""
        if decoder not in self._tokens:
            mask = token_mask(self.inputs, decoder)
            self._tokens[decoder] = None if mask is None else mask.bool()
        mask = self._tokens[decoder]
        return mask if mask is not None and mask.shape == shape[:2] else None

    def tokens_of(self, tensor: Tensor | None, decoder: bool) -> Tensor | None:
        """The same for a tensor that may not be there."""
        return None if tensor is None else self.tokens(tensor.shape, decoder)

    def block(self, layer: int, module: nn.Module, entered: tuple, hidden: Tensor, decoder: bool) -> BlockForward:
        """What went into a block, `entered` as (tensor, its version then), and what came out, for taps."""
        before, version = entered
        # What a block has changed in place is no longer what went in.
        unchanged = before is not None and version_of(before) == version
        output = local_of(hidden.detach())
        before = local_of(before.detach()) if unchanged else None
        return BlockForward(layer, before, output, self.tokens_of(output, decoder), module, self.index)

    def output(self, output: object, decoder: bool) -> ModelOutput:
        """What the model returned, for taps."""
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        logits, labels = (x if isinstance(x, Tensor) else None for x in (logits, self.inputs.get("labels")))
        tokens = self.tokens_of(logits, decoder)
        return ModelOutput(self.inputs, output, logits, labels, loss_of(output), tokens, self.index)

    def end_forward(self) -> None:
        """Let go of what only the forward needs: among it are the masks of the batch, which may be large."""
        self.inputs = self.valid = None
        self._tokens.clear()
        self.strata.clear()
        self.waiting.clear()


def version_of(tensor: Tensor | None) -> int | None:
    """A number that changes when a tensor is written to in place; None where nobody counts."""
    return None if tensor is None or tensor.is_inference() else tensor._version
