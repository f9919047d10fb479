"""A micro-batch, one forward pass and the backward pass that follows: its inputs, outputs and padding."""

from __future__ import annotations

import dis
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..blocks import Block
from ..quantities.dtensors import local_of
from ..quantities.quantity import BlockForward, ModelOutput
from .attention_call import AttentionCall
from .packet import Piece
from .schedule import Strata

if TYPE_CHECKING:
    from .frozen import Chain

__all__ = [
    "MicroBatch", "ValidRows", "decoder_layers", "hidden_of", "loss_of", "named_inputs", "output_of",
    "requiring_grad", "tensors_of", "token_mask", "valid_rows", "version_of",
]  # fmt: skip


class MicroBatch:
    """The state of one training forward and its backward pass."""

    def __init__(self, index: int, inputs: dict, piece: Piece):
        self.index, self.piece = index, piece
        self.inputs: dict | None = inputs  # arguments of the model's forward by name
        self.valid: ValidRows | None = ValidRows(inputs)
        self.live = True  # False when its step is over: hooks of a longer-lived graph must not write
        self.entered: set[int] = set()  # layers whose block ran
        self.visits: Counter = Counter()  # number of runs by module
        self.attended: Counter = Counter()  # number of observed attention calls by layer
        # (layer, statistics [B, H, R], valid rows [B, R], strata, number of earlier calls of the layer)
        self.waiting: list[tuple] = []
        self.waiting_bytes = 0
        self.strata: dict[tuple[int, int], Strata] = {}  # (query length, number of the call) -> sampled positions
        # also by the id of the starts of packed sequences, which are kept
        self.packed_strata: dict[tuple[int, int, int], tuple[Tensor, Strata]] = {}
        self.positions: Counter = Counter()  # queries of one head over the batch, by layer
        self.awaits_gradient: set[int] = set()  # layers whose output has a hook
        self.reached: set[int] = set()  # layers whose output a gradient has reached
        self.went_back = False  # a backward pass went through it
        self.reads_parameters = False  # an engine callback is queued
        self.chain: Chain | None = None  # of its frozen blocks
        self._tokens: dict[bool, Tensor | None] = {}

    def tokens(self, shape: tuple[int, ...], decoder: bool) -> Tensor | None:
        """[B, T] bool, True at tokens, for a tensor [B, T, ...]; None: all, or not known."""
        if decoder not in self._tokens:
            mask = token_mask(self.inputs or {}, decoder)
            self._tokens[decoder] = None if mask is None else mask.bool()
        mask = self._tokens[decoder]
        return mask if mask is not None and mask.shape == shape[:2] else None

    def tokens_of(self, tensor: Tensor | None, decoder: bool) -> Tensor | None:
        """As `tokens`, of a tensor or None."""
        return None if tensor is None else self.tokens(tensor.shape, decoder)

    def block(self, layer: int, module: nn.Module, entered: tuple, hidden: Tensor, decoder: bool) -> BlockForward:
        """The event of a block for taps. `entered` is its input with the version at entry."""
        before, version = entered
        # An input that was changed in place is not known any more.
        unchanged = before is not None and version_of(before) == version
        output = local_of(hidden.detach())
        before = local_of(before.detach()) if unchanged else None
        return BlockForward(layer, before, output, self.tokens_of(output, decoder), module, self.index)

    def output(self, output: object, decoder: bool) -> ModelOutput:
        """The event of the model's output for taps."""
        logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
        inputs = self.inputs or {}
        logits, labels = (x if isinstance(x, Tensor) else None for x in (logits, inputs.get("labels")))
        tokens = self.tokens_of(logits, decoder)
        untold = self.valid is not None and self.valid.untold
        return ModelOutput(inputs, output, logits, labels, loss_of(output), tokens, self.index, untold)

    def end_forward(self) -> None:
        """Free what only the forward needs, such as the masks of the batch, which may be large."""
        self.inputs = self.valid = None
        self._tokens.clear()
        self.strata.clear()
        self.packed_strata.clear()
        self.waiting.clear()


def version_of(tensor: Tensor | None) -> int | None:
    """The version of a tensor, which changes with a write in place; None for inference tensors."""
    return None if tensor is None or tensor.is_inference() else tensor._version


# ---- inputs and outputs of modules -----------------------------------------------------------------------------------


def hidden_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The input hidden state of a block: its first floating-point tensor."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def requiring_grad(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments of a block with a hidden state that requires a gradient; None: it does already.

    The hidden state is cloned, because the model may change it in place, which a leaf does not allow. The same happens
    when checkpointing runs the block again, so that both graphs are equal.
    """
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else ((*args[:i], _requiring_grad(value), *args[i + 1 :]), kwargs)
    for name in sorted(kwargs, key=lambda name: name != "hidden_states"):  # before masks, which are floats too
        value = kwargs[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            return None if value.requires_grad else (args, kwargs | {name: _requiring_grad(value)})
    return None


def _requiring_grad(hidden: Tensor) -> Tensor:
    return hidden.detach().requires_grad_().clone()


def loss_of(output: object) -> Tensor | None:
    """The output of a model named "loss"."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def tensors_of(output: object) -> Iterator[Tensor]:
    """The floating-point tensors in the output of a module, in order."""
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
    """The named arguments of the model's forward."""
    if len(args) < 2:  # the first is the input itself; masks follow
        return kwargs
    names = inspect.signature(model.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs


# ---- tokens and padding ----------------------------------------------------------------------------------------------


def decoder_layers(model: nn.Module, blocks: Sequence[Block]) -> frozenset[int]:
    """Layers of the decoder of an encoder-decoder: those below a "decoder" whose parent has an "encoder" too."""
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
    """The [B, T] mask of tokens among the inputs of a model, nonzero at tokens; None: not known.

    For the decoder of an encoder-decoder it is `decoder_attention_mask`, or follows from the labels: the model shifts
    them to the right to make the decoder's inputs, so a row predicts the label at its own position, and rows up to the
    last counted label are tokens.
    """
    mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    labels = inputs.get("labels") if decoder else None
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return (labels != _IGNORED).flip(1).cumsum(1).flip(1) > 0
    return None


class ValidRows:
    """Finds the valid query rows of the attention calls of one forward; cached by mask."""

    def __init__(self, inputs: dict):
        self._inputs = inputs
        self._tokens: dict[bool, Tensor | None] = {}
        self._known: dict[tuple, tuple[object, Tensor | None]] = {}
        self.untold = False  # there was a mask of tokens, and for some call the valid rows are not known

    def of(self, call: AttentionCall, rows: Tensor | None, decoder: bool) -> Tensor | None:
        """[B, R] bool of the query rows `rows` (None: all); None where every row is valid.

        They follow from the model's mask of tokens if it has the shape of the queries (that of a speech model counts
        samples, not frames). Otherwise they follow from the attention mask: a position that no query may attend to is
        padding. Without either, all rows count.
        """
        batch, length = call.query.shape[0], call.query.shape[2]
        if decoder not in self._tokens:
            self._tokens[decoder] = token_mask(self._inputs, decoder)
        given = self._tokens[decoder]
        tokens, source = _source(given, call)
        # The source is kept too: an id is unique only as long as its object lives.
        key = (id(source), batch, length)
        if key not in self._known:
            self._known[key] = (source, _valid(tokens, source, batch, length, rows))
        self.untold |= given is not None and tokens is None and self._known[key][1] is None
        return self._known[key][1]


def valid_rows(inputs: dict, call: AttentionCall, decoder: bool) -> Tensor | None:
    """[B, Tq]: as `ValidRows.of` for all rows, without a cache, for compilers that trace it."""
    tokens, source = _source(token_mask(inputs, decoder), call)
    return _valid(tokens, source, call.query.shape[0], call.query.shape[2], None)


def _source(tokens: Tensor | None, call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    """The mask of tokens, if it has the shape of the queries, and the tensor from which valid rows follow."""
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
        if valid.shape[-1] != length:  # keys are not at the positions of the queries
            return None
        valid = valid.expand(batch, length)
    return valid if rows is None else valid.index_select(1, rows.to(valid.device))


def _attended(mask: Tensor) -> Tensor:
    """[B or 1, Tk] bool: keys that some query of some head may attend to."""
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2  # models use the minimum for minus infinity
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.any(1).any(1)


def output_of(block: nn.Module, output: object) -> Tensor | None:
    """The hidden state that a block passes on: of several tensors the one that its code calls `hidden_states`.

    In blocks with two streams (SD3, Flux) it is that of the image, in any position. If the code has no such name, it is
    the first floating-point tensor.
    """
    cls = type(block)
    if cls not in _PLACES:
        _PLACES[cls] = _place_of_hidden(cls)
    place = _PLACES[cls]
    if place is not None and isinstance(output, (tuple, list)) and place < len(output):
        hidden = output[place]
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            return hidden
    return next(tensors_of(output), None)


_PLACES: dict[type, int | None] = {}  # position of the hidden state by class; cached, because reading code is slow


def _place_of_hidden(cls: type[nn.Module]) -> int | None:
    """The position of `hidden_states` in the tuple that `forward` returns; None: there is no such tuple."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None:
        return None
    steps = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    for at, (one, following) in enumerate(pairwise(steps)):
        if one.opname == "BUILD_TUPLE" and following.opname == "RETURN_VALUE":
            names: list[str] = []
            for loaded in reversed(steps[:at]):
                if len(names) >= one.argval or not loaded.opname.startswith("LOAD_FAST"):
                    break
                several = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
                names[:0] = several
            if len(names) == one.argval and "hidden_states" in names:
                return names.index("hidden_states")
    return None
