"""A penalty on attention entropy, which keeps heads above a floor or near a target while a model trains.

For every chosen head, h is the mean entropy of a sample of its query rows, without padding. The penalty is the mean
over heads of max(0, target - h)^2 ("floor") or of (h - target)^2 ("near"), times a weight. Gradients go to queries and
keys through the package's own operator, which stores no matrix of scores: it needs memory in proportion to the length
of the sequence.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..measure.attention_call import AttentionCall, SequenceStarts
from ..measure.attention_observer import FunctionMode, call_of, interfaces_of
from ..measure.attention_places import AttentionPlaces
from ..measure.micro_batch import ValidRows, decoder_layers, named_inputs
from ..measure.schedule import RowSampler, Strata
from .handle import Scheduled, check_integer, check_number
from .heads import Heads, as_setting, heads_by_layer
from .interface import InterfaceCall, change_queries
from .planned import Layers

__all__ = ["AttentionEntropyLoss", "attention_entropy_loss"]

_MODES = ("floor", "near")


@dataclass(frozen=True, eq=False)
class _Seen:
    layer: int
    entropy: Tensor  # [B, H, R] float32, of the chosen heads
    counted: Tensor | None  # [B, R] bool; None: all
    weights: Tensor  # [R]

    def by_head(self) -> Tensor:
        """[H]: means over the rows that count; 0 without such rows."""
        weights = self.weights.to(self.entropy)
        if self.counted is not None:
            weights = weights * self.counted
        weights = weights.expand(len(self.entropy), -1)[:, None]
        # A row that counts weighs at least 1, so the minimum only matters if no row counts.
        return (self.entropy * weights).sum((0, 2)) / weights.sum().clamp(min=1.0)


class AttentionEntropyLoss(Scheduled):
    """Penalise self-attention entropy below `target` nats, or away from it, in the training of `model`.

    ::

        with attention_entropy_loss(model, 1.0, plan) as entropy:
            for batch in loader:
                loss = model(**batch).loss + entropy.loss()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                entropy.step()

    `loss()` is the penalty of the last forward pass. With gradient accumulation, call it after each forward pass and
    divide it as the loss. With the Trainer use `add_to_loss=True`, which adds it to the `loss` that the model returns,
    and pass `callback()`; if the Trainer passes the number of tokens to the model, the penalty counts once for each
    micro-batch. `step()` draws other query rows. Compiled models break the graph at every attention; checkpointing
    needs `use_reentrant=False`. Biases and masks that are added to the scores get no gradient.

    Args:
        model: the object that the loop calls; with DDP the wrapped one.
        target: nats per query row. The maximum of a row with T keys is log(T).
        layers: a plan or indices of blocks; None: all. With a plan of heads ("collapsed"), only its heads.
        mode: "floor" penalises entropy below the target, "near" also entropy above.
        heads: indices for all of these blocks, or by block; None: all.
        weight: of the penalty in the loss.
        rows: number of query rows per sequence, spread over the positions; None: all.
        add_to_loss: add the penalty to the loss that the model returns.
        seed: of the draw of rows.

    Raises:
        ValueError: numbers out of range, a head or block that does not exist, or a second loss on the same blocks.
    """

    name = "attention entropy loss"

    def __init__(
        self,
        model: nn.Module,
        target: float,
        layers: Layers = None,
        *,
        mode: str = "floor",
        heads: Heads = None,
        weight: float = 1e-3,
        rows: int | None = 64,
        add_to_loss: bool = False,
        seed: int = 0,
    ):
        check_number("target", target, "> 0")
        check_number("weight", weight, ">= 0")
        if mode not in _MODES:
            raise ValueError(f"mode: expected one of {list(_MODES)}, got {mode!r}")
        if rows is not None:
            check_integer("rows", rows)
        check_integer("seed", seed, 0)
        super().__init__(model, layers)
        self.target, self.mode, self.weight, self.rows, self.seed = float(target), mode, float(weight), rows, seed
        self.heads = heads_by_layer(self.blocks, layers, heads)
        self.entropies: dict[int, Tensor] = {}  # layer -> [H] detached means of the last forward pass
        self._add = add_to_loss
        self._seen: list[_Seen] = []
        self._valid: ValidRows | None = None  # while a forward pass of the model with gradients is running
        self._sampler = RowSampler(rows, seed, next(model.parameters()).device)
        self._strata: dict[int, Strata] = {}
        self._starts = SequenceStarts()
        self._decoders = decoder_layers(model, self.blocks)
        self._owners: dict[nn.Module, int] = {}
        for block in reversed(self.blocks):
            self._owners |= dict.fromkeys(block.module.modules(), block.index)
        self._places = AttentionPlaces(self.blocks)
        self._modes: list[FunctionMode] = []
        with ExitStack() as attached:
            self._attach(attached)
            self._update()
            self._attached = attached.pop_all()
        self._hold()

    # ---- reading attention -------------------------------------------------------------------------------------------

    def _attach(self, attached: ExitStack) -> None:
        add, inside = attached.callback, {id(module) for module in self._owners}
        for interface in {id(one): one for block in self.blocks for one in interfaces_of(block.module)}.values():
            # After an attention temperature, if any, for the entropy of the attention that runs.
            add(change_queries(interface, inside, self._of_interface, last=True))
        if self._places.unnamed or not all(map(interfaces_of, self._places.innermost)):
            attached.enter_context(self._places.followed())
            for block in self.blocks:
                add(block.module.register_forward_pre_hook(self._block_begins, prepend=True).remove)
                add(block.module.register_forward_hook(self._block_ends, always_call=True).remove)
        add(self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True).remove)
        add(self.model.register_forward_hook(self._forward_ends, always_call=True).remove)

    @torch.compiler.disable
    def _of_interface(self, call: InterfaceCall) -> Tensor:
        if torch.is_grad_enabled() and (self._places.of(call.module).kind or "self") == "self":
            self._take(self._owners[call.module], call_of(call, self._starts))
        return call.query

    def _of_function(self, module: nn.Module | None, read) -> None:
        if module is None or not torch.is_grad_enabled() or interfaces_of(module):
            return
        layer = self._owners.get(module)
        call = read()
        if layer is not None and call.kind == "self":
            self._take(layer, call)

    @torch.compiler.disable
    def _block_begins(self, module: nn.Module, args: tuple) -> None:
        if module not in self._owners:  # a copy of the model has the hooks, too
            return
        # Around the block, not the model, because activation checkpointing runs blocks again.
        self._modes.append(FunctionMode(self._places, self._of_function).__enter__())

    @torch.compiler.disable
    def _block_ends(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._modes and module in self._owners:
            self._modes.pop().__exit__(None, None, None)

    @torch.compiler.disable
    def _forward_begins(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model is not self.model:
            return
        self._seen.clear()
        self._starts = SequenceStarts()  # those of the last forward pass may have been overwritten
        if torch.is_grad_enabled():
            self._valid = ValidRows(named_inputs(model, args, kwargs))

    @torch.compiler.disable
    def _forward_ends(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if model is not self.model:
            return None
        counted, self._valid = self._valid is not None, None
        if not (counted and self._add) or output is None:
            return None
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            raise RuntimeError(
                "attention_entropy_loss: the model returned no loss; give it labels, or use add_to_loss=False and add "
                "loss() of the handle to your own loss"
            )
        output["loss"] = loss + self.loss().to(loss.dtype)
        return output

    def _take(self, layer: int, call: AttentionCall) -> None:
        strata = self._strata.get(call.query.shape[2])
        if strata is None:
            strata = self._strata[call.query.shape[2]] = self._sampler.draw(call.query.shape[2])
        rows, heads = strata.rows, self.heads[layer]
        rows = None if rows is None else rows.to(call.query.device)
        if heads is not None and max(heads) >= call.query.shape[1]:
            raise ValueError(f"heads: block {layer} attends with {call.query.shape[1]} heads, got {heads}")
        entropy = _entropy_of(call, rows, heads)
        if self._valid is not None:  # None: checkpointing runs the block again, for the backward pass
            valid = self._valid.of(call, rows, layer in self._decoders)
            self._seen.append(_Seen(layer, entropy, valid, strata.weights.to(entropy.device)))

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The weighted penalty of the last forward pass, float32 [], to be added to the loss of that pass.

        `RuntimeError` if no attention was seen, or none that depends on a trainable parameter.
        """
        if not any(seen.entropy.requires_grad for seen in self._seen):
            raise RuntimeError(
                "attention_entropy_loss: no attention with gradients was seen; call loss() after a forward pass in "
                "training of the model that was given, train parameters that its queries and keys depend on, and use "
                "checkpointing with use_reentrant=False"
            )
        by_head = [seen.by_head() for seen in self._seen]
        self.entropies = {seen.layer: means.detach() for seen, means in zip(self._seen, by_head, strict=True)}
        differences = self.target - torch.cat(by_head)
        if self.mode == "floor":
            differences = differences.relu()
        return self.weight * differences.square().mean()

    def _update(self) -> None:
        # The rows depend on the optimizer step, so that recomputed activations and resumed runs use the same rows.
        self._sampler.begin(self.steps_done)
        self._strata.clear()

    def _settings(self) -> dict:
        settings = {"target": self.target, "mode": self.mode, "heads": as_setting(self.heads)}
        return settings | {"weight": self.weight, "rows": self.rows, "seed": self.seed}

    def _words(self) -> str:
        relation = "above" if self.mode == "floor" else "near"
        return (
            f"Heads of blocks {', '.join(map(str, self.layers))} are kept {relation} {self.target:g} nats of attention "
            f"entropy (weight {self.weight:g})."
        )

    def _remove(self) -> None:
        super()._remove()
        self._seen.clear()


attention_entropy_loss = AttentionEntropyLoss


# ---- the entropy of some rows and heads, with gradients --------------------------------------------------------------


def _entropy_of(call: AttentionCall, rows: Tensor | None, heads: list[int] | None) -> Tensor:
    """[B, H, R] float32, with gradients; `stats_of` of a monitor measures the same without gradients."""
    if call.query.dtype == torch.float64:
        raise TypeError("attention_entropy_loss: attention is in float64; train in float32 or 16 bits")
    query, key, sinks = call.query, call.key, call.sinks
    bias = None if call.bias is None else call.bias.detach()
    mask = None if call.mask is None else call.mask.detach()
    logits = call.logits
    if heads is not None:
        index = torch.tensor(heads, device=query.device)
        group = query.shape[1] // key.shape[1]
        query, key = query.index_select(1, index), key.index_select(1, index // group)
        bias, mask, logits = (_heads(one, index) for one in (bias, mask, logits))
        sinks = None if sinks is None else sinks.index_select(0 if sinks.dim() == 1 else 1, index)
    if logits is not None:
        return ops.attention_entropy(_rows(logits, rows).contiguous())
    if call.mask_mod is not None or call.score_mod is not None:
        raise TypeError(
            "attention_entropy_loss: FlexAttention with functions for masks or scores is not supported; use "
            "model.set_attn_implementation('sdpa')"
        )
    if sinks is not None and sinks.dim() > 1:
        raise TypeError(
            "attention_entropy_loss: attention with a sink for every query is not supported; omit these blocks"
        )
    if bias is not None:
        bias = _rows(bias, rows)
        if call.is_causal or call.window is not None:
            raise TypeError(
                "attention_entropy_loss: a bias with a causal mask or a window is not supported; use "
                "model.set_attn_implementation('eager')"
            )
        if mask is not None:
            mask = _rows(mask, rows)
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        query, mask, rows = _rows(query, rows), bias, None
    return ops.attention_entropy_qk(
        query, key, attn_mask=mask, is_causal=call.is_causal, scale=call.scale, window=call.window,
        softcap=call.softcap, sinks=sinks, rows=rows, cu_seqlens=call.sequences,
    )  # fmt: skip


def _heads(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    if tensor is None or tensor.dim() < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor.index_select(-3, index)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None or tensor.shape[-2] == 1 else tensor.index_select(-2, rows)
