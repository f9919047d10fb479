"""Which query rows are tokens and which are padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import Block
from .attention_call import AttentionCall

__all__ = ["ValidRows", "decoder_layers", "token_mask"]


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

    def of(self, call: AttentionCall, rows: Tensor | None, decoder: bool) -> Tensor | None:
        """[B, R] bool of the query rows `rows` (None: all); None where every row is valid.

        From what the model was called with, if its shape is that of the queries (a speech model's mask counts samples
        where its attention counts frames). Otherwise from the attention mask: a position that no query may attend to
        is padding. Where neither tells, all rows count.
        """
        batch, length = call.query.shape[0], call.query.shape[2]
        if decoder not in self._tokens:
            self._tokens[decoder] = token_mask(self._inputs, decoder)
        tokens = self._tokens[decoder]
        if tokens is not None and tokens.shape != (batch, length):
            tokens = None
        source = tokens
        if tokens is None and not call.sparse:
            source = call.mask if call.logits is None else call.logits
        # The source is kept beside the answer: an id is unique only as long as its object lives.
        key = (id(source), batch, length)
        if key not in self._known:
            self._known[key] = (source, self._valid(tokens, source, batch, length, rows))
        return self._known[key][1]

    def _valid(self, tokens, source, batch: int, length: int, rows: Tensor | None) -> Tensor | None:
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
