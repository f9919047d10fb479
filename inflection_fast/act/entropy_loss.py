"""A penalty on attention entropy: heads are kept above a floor, or near a target, while a model trains.

For every chosen head, h is the mean entropy of a sample of its query rows, padding left out. The penalty is the mean
over heads of max(0, target - h)^2 ("floor") or of (h - target)^2 ("near"), times a weight. Gradients go to queries and
keys through the package's own operator, which stores no matrix of scores: beyond them it needs memory in proportion to
the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..decide import Plan
from ..measure.attention_call import AttentionCall, SequenceStarts
from ..measure.attention_observer import FunctionMode, call_of, interfaces_of
from ..measure.attention_places import AttentionPlaces
from ..measure.micro_batch import ValidRows, decoder_layers, named_inputs
from ..measure.schedule import RowSampler, Strata
from .handle import Scheduled, check_steps
from .heads import heads_by_layer
from .interface import InterfaceCall, change_queries

__all__ = ["AttentionEntropyLoss", "attention_entropy_loss"]

_MODES = ("floor", "near")


@dataclass(frozen=True, eq=False)
class _Seen:
    layer: int
    entropy: Tensor  # [B, H, R] float32, of the chosen heads
    counted: Tensor | None  # [B, R] bool; None: all
    weights: Tensor  # [R]

    def by_head(self) -> Tensor:
        """[H]: means over the rows that count; 0 where there are none."""
        weights = self.weights.to(self.entropy)
        if self.counted is not None:
            weights = weights * self.counted
        weights = weights.expand(len(self.entropy), -1)[:, None]
        # A row weighs at least 1, so this divides by something else than the sum only where no row counts.
        return (self.entropy * weights).sum((0, 2)) / weights.sum().clamp(min=1.0)


class AttentionEntropyLoss(Scheduled):
    """The penalty of the chosen blocks, forward pass by forward pass."""

    name = "attention entropy loss"

    def __init__(
        self,
        model: nn.Module,
        where: Plan | Sequence[int] | int | None,
        target: float,
        mode: str,
        heads: Sequence[int] | Mapping[int, Sequence[int]] | None,
        weight: float,
        rows: int | None,
        add_to_loss: bool,
        seed: int,
    ):
        if not _is_number(target) or not 0 < target < float("inf"):
            raise ValueError(f"target: expected a number of nats > 0, got {target!r}")
        if not _is_number(weight) or not 0 <= weight < float("inf"):
            raise ValueError(f"weight: expected a number >= 0, got {weight!r}")
        if mode not in _MODES:
            raise ValueError(f"mode: expected one of {list(_MODES)}, got {mode!r}")
        if rows is not None:
            check_steps("rows", rows)
        check_steps("seed", seed, 0)
        super().__init__(model, where)
        self.target, self.mode, self.weight, self.rows, self.seed = float(target), mode, float(weight), rows, seed
        self.heads = heads_by_layer(self.blocks, where, heads)
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
        self._attached = ExitStack()
        try:
            self._attach()
            self._update()
        except BaseException:
            self._attached.close()
            raise
        self._hold()

    # ---- seeing ------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        add, inside = self._attached.callback, {id(module) for module in self._owners}
        for interface in {id(one): one for block in self.blocks for one in interfaces_of(block.module)}.values():
            # After a temperature, if there is one: the entropy is that of the attention that runs.
            add(change_queries(interface, inside, self._of_interface, last=True))
        if self._places.unnamed or not all(map(interfaces_of, self._places.innermost)):
            self._attached.enter_context(self._places.followed())
            for block in self.blocks:
                add(block.module.register_forward_pre_hook(self._block_begins, prepend=True).remove)
                add(block.module.register_forward_hook(self._block_ends, always_call=True).remove)
        add(self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True).remove)
        add(self.model.register_forward_hook(self._forward_ends, always_call=True).remove)

    @torch.compiler.disable
    def _of_interface(self, call: InterfaceCall) -> Tensor:
        if torch.is_grad_enabled() and (self._places.of(call.module).kind or "self") == "self":
            read = call_of(
                call.name,
                call.attend,
                call.module,
                call.query,
                call.key,
                call.mask,
                call.args,
                call.kwargs,
                self._starts,
            )
            self._take(self._owners[call.module], read)
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
        if module not in self._owners:  # of a copy of the model, which has the hooks too
            return
        # Around the block, not around the model: so that checkpointing, which runs blocks again, meets the same.
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
        self._starts = SequenceStarts()  # those of the forward before may have been written over
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
                "attention_entropy_loss: the model returned no loss to add to; give it labels, or use "
                "add_to_loss=False and add loss() of the handle to your own loss"
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
        if self._valid is not None:  # else a block that checkpointing runs again, for what the operator has to keep
            valid = self._valid.of(call, rows, layer in self._decoders)
            self._seen.append(_Seen(layer, entropy, valid, strata.weights.to(entropy.device)))

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The weighted penalty [] float32 of the last forward pass, to be added to the loss of that pass.

        `RuntimeError` where no attention was seen, or none that depends on a parameter that trains.
        """
        if not any(seen.entropy.requires_grad for seen in self._seen):
            raise RuntimeError(
                "attention_entropy_loss: no attention with gradients was seen; call loss() after a training forward of "
                "the very model that was given, train something before its queries and keys, and checkpoint with "
                "use_reentrant=False"
            )
        by_head = [seen.by_head() for seen in self._seen]
        self.entropies = {seen.layer: means.detach() for seen, means in zip(self._seen, by_head, strict=True)}
        differences = self.target - torch.cat(by_head)
        if self.mode == "floor":
            differences = differences.relu()
        return self.weight * differences.square().mean()

    def _update(self) -> None:
        # Rows are those of the optimizer step: recomputed activations meet the same ones, and so does a resumed run.
        self._sampler.begin(self.steps_done)
        self._strata.clear()

    def _settings(self) -> dict:
        heads = {str(layer): some for layer, some in self.heads.items() if some is not None}
        return {
            "target": self.target, "mode": self.mode, "heads": heads, "weight": self.weight, "rows": self.rows,
            "seed": self.seed,
        }  # fmt: skip

    def _words(self) -> str:
        aim = "above" if self.mode == "floor" else "near"
        return (
            f"Heads of blocks {', '.join(map(str, self.layers))} are kept {aim} {self.target:g} nats of attention "
            f"entropy (weight {self.weight:g})."
        )

    def _remove(self) -> None:
        self._attached.close()
        self._seen.clear()


def attention_entropy_loss(
    model: nn.Module,
    target: float,
    layers: Plan | Sequence[int] | int | None = None,
    *,
    mode: str = "floor",
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
    weight: float = 1e-3,
    rows: int | None = 64,
    add_to_loss: bool = False,
    seed: int = 0,
) -> AttentionEntropyLoss:
    """Penalise self-attention entropy below `target` nats, or away from it, in the training of `model`.

    ::

        with attention_entropy_loss(model, 1.0, plan) as entropy:
            for batch in loader:
                loss = model(**batch).loss + entropy.loss()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                entropy.step()

    `loss()` is that of the last forward pass, so with accumulation it is asked for after each of them and divided as
    the loss is. With the Trainer use `add_to_loss=True`, which adds it to the `loss` that the model returns, and pass
    `callback()`; where the Trainer hands the number of tokens to the model, the penalty counts once for each
    micro-batch. `step()` draws other query rows. Compiled models break the graph at every attention; checkpointing
    needs `use_reentrant=False`. Biases and masks that are added to the scores get no gradient.

    Args:
        model: the object that the loop calls; under DDP the wrapped one.
        target: nats per query row; log(T) is the most that a row with T keys can have.
        layers: a plan or indices of blocks; None: all. The heads of a plan ("collapsed") are taken over.
        mode: "floor" penalises what is below, "near" also what is above.
        heads: indices for all of these blocks, or by block; None: all.
        weight: of the penalty in the loss.
        rows: query rows per sequence that are looked at, spread over the positions; None: all.
        seed: of the draw of rows.

    Raises:
        ValueError: numbers out of range, a head or block that does not exist, or a second loss on the same blocks.
    """
    return AttentionEntropyLoss(model, layers, target, mode, heads, weight, rows, add_to_loss, seed)


# ---- the entropy of some rows and heads, with gradients --------------------------------------------------------------


def _entropy_of(call: AttentionCall, rows: Tensor | None, heads: list[int] | None) -> Tensor:
    """[B, H, R] float32: stats_of measures the same without gradients."""
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
            "attention_entropy_loss: FlexAttention with functions for masks or scores cannot be differentiated here; "
            "use model.set_attn_implementation('sdpa')"
        )
    if sinks is not None and sinks.dim() > 1:
        raise TypeError("attention_entropy_loss: attention with a sink for every query is not supported; leave it out")
    if bias is not None:
        bias = _rows(bias, rows)
        if call.is_causal or call.window is not None:
            raise TypeError(
                "attention_entropy_loss: a bias beside a causal mask or a window is not supported; use "
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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
