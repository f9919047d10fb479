"""One forward pass of a measured step and the backward pass that follows: what goes in and out, and what is padding."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..quantities.quantity import BlockForward, ModelOutput
from .attention_call import AttentionCall
from .packet import Piece
from .placements import local_of
from .schedule import Strata

if TYPE_CHECKING:
    from .frozen import Chain

__all__ = [
    "MicroBatch",
    "ValidRows",
    "decoder_layers",
    "hidden_of",
    "loss_of",
    "named_inputs",
    "requiring_grad",
    "tensors_of",
    "token_mask",
    "valid_rows",
    "version_of",
]


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
        self.strata: dict[tuple[int, int], Strata] = {}  # (query length, number of the call) -> sampled positions
        # and with the id of the starts of packed sequences, which are kept, too
        self.packed_strata: dict[tuple[int, int, int], tuple[Tensor, Strata]] = {}
        self.positions: Counter = Counter()  # layer -> queries of a head, of all rows of the batch
        self.awaits_gradient: set[int] = set()  # layers whose output has a hook
        self.reached: set[int] = set()  # layers whose output a gradient has reached
        self.went_back = False  # a backward pass went through it
        self.reads_parameters = False  # an engine callback is on its way
        self.chain: Chain | None = None  # of its frozen blocks
        self._tokens: dict[bool, Tensor | None] = {}

    def tokens(self, shape: tuple[int, ...], decoder: bool) -> Tensor | None:
        """[B, T] bool, True at tokens, for a tensor [B, T, ...]; None: all, or nobody knows."""
        if decoder not in self._tokens:
            mask = token_mask(self.inputs or {}, decoder)
            self._tokens[decoder] = None if mask is None else mask.bool()
        mask = self._tokens[decoder]
        return mask if mask is not None and mask.shape == shape[:2] else None

    def valid_rows(self, call: AttentionCall, rows: Tensor | None, decoder: bool) -> Tensor | None:
        """[B, R] bool; see `ValidRows.of`."""
        return None if self.valid is None else self.valid.of(call, rows, decoder)

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
        inputs = self.inputs or {}
        logits, labels = (x if isinstance(x, Tensor) else None for x in (logits, inputs.get("labels")))
        tokens = self.tokens_of(logits, decoder)
        untold = self.valid is not None and self.valid.untold
        return ModelOutput(inputs, output, logits, labels, loss_of(output), tokens, self.index, untold)

    def end_forward(self) -> None:
        """Let go of what only the forward needs: among it are the masks of the batch, which may be large."""
        self.inputs = self.valid = None
        self._tokens.clear()
        self.strata.clear()
        self.packed_strata.clear()
        self.waiting.clear()


def version_of(tensor: Tensor | None) -> int | None:
    """A number that changes when a tensor is written to in place; None where nobody counts."""
    return None if tensor is None or tensor.is_inference() else tensor._version


# ---- what goes into a module and what comes out of it ----------------------------------------------------------------


def hidden_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The hidden state that a block is given: its first floating-point tensor."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def requiring_grad(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments of a block with a hidden state that autograd follows, if it did not: so gradients reach the block.

    A clone, not the tensor itself: the model may go on to change it in place, which a leaf would not allow, and nobody
    else's tensor is touched. The same happens when checkpointing runs the block again, or its graphs would differ.
    """
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else ((*args[:i], _followed(value), *args[i + 1 :]), kwargs)
    for name in sorted(kwargs, key=lambda name: name != "hidden_states"):  # before a mask, which is a float as well
        value = kwargs[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else (args, kwargs | {name: _followed(value)})
    return None


def _followed(hidden: Tensor) -> Tensor:
    return hidden.detach().requires_grad_().clone()


def loss_of(output: object) -> Tensor | None:
    """What a model returned under the name "loss"."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def tensors_of(output: object) -> Iterator[Tensor]:
    """Floating-point tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)


def named_inputs(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of the model's forward by name, where it has names for them."""
    if len(args) < 2:  # the first is the input itself, masks come later
        return kwargs
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


# ---- which query rows are tokens and which are padding ---------------------------------------------------------------


def decoder_layers(model: nn.Module, blocks: Sequence[Block]) -> frozenset[int]:
    """Layers of the decoder of an encoder-decoder: those below a "decoder" that has an "encoder" beside it."""
    modules = {name for name, _ in model.named_modules()}
    found = set()
    for block in blocks:
        parts = block.path.split(".")
        if "decoder" in parts:
            at = parts.index("decoder")
            if ".".join([*parts[:at], "encoder"]) in modules:
                found.add(block.index)
    return frozenset(found)


_IGNORED = -100  # labels of padding, in Transformers and torch


def token_mask(inputs: dict, decoder: bool) -> Tensor | None:
    """The [B, T] mask of tokens among the inputs of a model, nonzero at tokens; None if nothing tells.

    Encoder-decoders take the encoder's under `attention_mask` and the decoder's under a name of its own. The usual
    collators give labels alone, which the model shifts to the right into its decoder's inputs, so that a row predicts
    the label at its own position: the rows up to the last label that counts are tokens.
    """
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    labels = inputs.get("labels") if decoder else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return (labels != _IGNORED).flip(1).cumsum(1).flip(1) > 0
    return None


class ValidRows:
    """Finds the valid query rows of the attention calls of one forward; layers that share a mask share the answer."""

    def __init__(self, inputs: dict):
        self._inputs = inputs
        self._tokens: dict[bool, Tensor | None] = {}
        self._known: dict[tuple, tuple[object, Tensor | None]] = {}
        self.untold = False  # the model was given a mask of tokens, and of some call nobody knows which rows they are

    def of(self, call: AttentionCall, rows: Tensor | None, decoder: bool) -> Tensor | None:
        """[B, R] bool of the query rows `rows` (None: all); None where every row is valid.

        From what the model was called with, if its shape is that of the queries (a speech model's mask counts samples
        where its attention counts frames). Otherwise from the attention mask: a position that no query may attend to
        is padding. Where neither tells, all rows count.
        """
        batch, length = call.query.shape[0], call.query.shape[2]
        if decoder not in self._tokens:
            self._tokens[decoder] = token_mask(self._inputs, decoder)
        given = self._tokens[decoder]
        tokens, source = _source(given, call)
        # The source is kept beside the answer: an id is unique only as long as its object lives.
        key = (id(source), batch, length)
        if key not in self._known:
            self._known[key] = (source, _valid(tokens, source, batch, length, rows))
        self.untold |= given is not None and tokens is None and self._known[key][1] is None
        return self._known[key][1]


def valid_rows(inputs: dict, call: AttentionCall, decoder: bool) -> Tensor | None:
    """[B, Tq] as `ValidRows.of` finds it for all rows, for compilers that trace it: nothing is kept."""
    tokens, source = _source(token_mask(inputs, decoder), call)
    return _valid(tokens, source, call.query.shape[0], call.query.shape[2], None)


def _source(tokens: Tensor | None, call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """The mask of tokens, if it is about the queries, and what tells which rows are valid."""
    if tokens is not None and tokens.shape != (call.query.shape[0], call.query.shape[2]):
        tokens = None
    if tokens is not None or call.sparse:
        return tokens, tokens
    return None, call.mask if call.logits is None else call.logits


def _valid(tokens: Tensor | None, source: Tensor | None, batch: int, length: int, rows: Tensor | None) -> Tensor | None:
    if tokens is not None:
        valid = tokens.bool()
    elif source is None:
        return None
    else:
        valid = _attended(source)
        if valid.shape[-1] != length:  # keys are other positions than queries: nothing to learn about rows
            return None
        valid = valid.expand(batch, length)
    return valid if rows is None else valid.index_select(1, rows.to(valid.device))


def _attended(mask: Tensor) -> Tensor:
    """[B or 1, Tk] bool: keys that some query of some head may attend to."""
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2  # what models write for minus infinity
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.any(1).any(1)
