"""A model measured on texts, on the same words in random order, and with random matrices as weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from inflection_fast.blocks import Block, find_blocks
from inflection_fast.checkpoints.findings import Nulls
from inflection_fast.checkpoints.loading import LOSSES, Loaded, halves_loss
from inflection_fast.checkpoints.measuring import Inputs, can_recompute, measure
from inflection_fast.checkpoints.numbers import Numbers, finite_or_none, numbers
from inflection_fast.checkpoints.texts import Batch, batches_of, shuffled, token_budget
from inflection_fast.measure import MonitorConfig
from inflection_fast.measure.micro_batch import loss_of
from inflection_fast.quantities.first_order import FirstOrder, random_share
from inflection_fast.quantities.layer_cka import LayerCka
from inflection_fast.quantities.quantity import Quantity
from inflection_fast.quantities.rank import Rank
from inflection_fast.timeline import Timeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Measured", "Module", "measured"]

NULL_TEXTS = 32  # texts for the nulls
PROBE_TEXTS = 12  # texts of the probe, for features and attention matrices
RANKED = 4  # sequences by batch for the rank of attention: an eigenvalue problem for every head
CKA_ROWS = 1024
ONCE = 2**31  # the cadence of what is measured in the first step alone


@dataclass(frozen=True)
class Module:
    """The first-order gain of a low-rank adapter at one weight matrix."""

    layer: int
    name: str
    gain: float
    share: float | None  # None: there is no gradient
    random_share: float


@dataclass(frozen=True)
class Measured:
    """A model on texts and on both nulls."""

    nulls: Nulls
    about: dict[str, object]  # of the texts
    matrices: dict[str, list[Numbers]]
    modules: list[Module]


def measured(
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    out: str | Path | None,
    rank: int,
    tokens: int,
    seed: int,
    progress: Callable[[str], None],
) -> Measured:
    """Measure a model on texts and on the two nulls; afterwards the matrices of its blocks are random."""
    model = loaded.model
    longest = max(len(tokenizer(text, truncation=True, max_length=tokens)["input_ids"]) for text in texts)
    recomputes = longest > token_budget(loaded) and can_recompute(model)
    budget = token_budget(loaded, recomputes=recomputes)
    batches = batches_of(texts, tokenizer, loaded, tokens=tokens, budget=budget, seed=seed)
    blocks = find_blocks(model)

    def folder(name: str) -> Path | None:
        return None if out is None else Path(out) / name

    def loss(inputs: Inputs, output: object) -> Tensor | None:
        if loaded.task != "embedded":
            return loss_of(output)
        return halves_loss(getattr(output, "last_hidden_state"), inputs["attention_mask"])  # noqa: B009

    progress(f"measuring {sum(batch.texts for batch in batches)} texts")
    first_order = FirstOrder(rank, every=ONCE)
    timeline = measure(
        model,
        [batch.inputs for batch in batches],
        _config("activation_grad", first_order),
        out=folder("texts"),
        probe=_probe(batches, loaded),
        gradients=True,
        loss=loss,
        weights=_matrices(blocks, rank),
        recomputes=recomputes,
    )
    count = _first(batches, NULL_TEXTS)
    null_config = _config()
    progress("measuring them with their words in random order")
    mixed = [shuffled(one, tokenizer.all_special_ids, seed + i) for i, one in enumerate(batches[:count])]
    inputs = [_without_loss(one.inputs, loaded) for one in mixed]
    of_shuffled = measure(model, inputs, null_config, out=folder("shuffled"), probe=_probe(mixed, loaded))
    progress("measuring them with random matrices")
    _randomise(blocks, seed)
    inputs = [_without_loss(one.inputs, loaded) for one in batches[:count]]
    of_random = measure(model, inputs, null_config, out=folder("random"), probe=_probe(batches[:count], loaded))
    about: dict[str, object] = {
        "texts": sum(batch.texts for batch in batches),
        "batches": len(batches),
        "tokens": sum(int(batch.inputs["attention_mask"].sum()) for batch in batches),
        "texts of the nulls": sum(batch.texts for batch in batches[:count]),
        "loss": LOSSES[loaded.task],
        "mean loss": finite_or_none(float(np.nanmean(timeline.loss))),
        "gradients of weights from": f"{batches[0].texts} texts",
        "blocks computed again in the backward pass": recomputes,
    }
    matrices = {"texts": _matrix(timeline), "random": _matrix(of_random)}
    return Measured(Nulls(timeline, of_shuffled, of_random), about, matrices, _modules(timeline, blocks, rank))


def _config(*more: str | Quantity) -> MonitorConfig:
    quantities = ("attention", "residual", Rank(sequences=RANKED, every=ONCE), LayerCka(every=ONCE), *more)
    forwards = "trained" if more else "all"
    return MonitorConfig(
        every=1, rows=None, quantities=quantities, forwards=forwards, cka_rows=CKA_ROWS, cka_reference=None
    )


def _first(batches: Sequence[Batch], texts: int) -> int:
    """The number of batches with the first texts; at least two, to estimate chance."""
    counts = np.cumsum([batch.texts for batch in batches])
    return min(len(batches), max(2, int(np.searchsorted(counts, texts)) + 1))


def _probe(batches: Sequence[Batch], loaded: Loaded) -> list[Inputs]:
    """The first texts without labels, so without gradients; a separate decoder gets the labels as inputs."""
    found: list[Inputs] = []
    for one in batches[: _first(batches, PROBE_TEXTS)]:
        inputs = {name: value for name, value in one.inputs.items() if name != "labels"}
        if loaded.task == "translated":
            prepare = getattr(loaded.model, "prepare_decoder_input_ids_from_labels")  # noqa: B009
            inputs["decoder_input_ids"] = prepare(labels=one.inputs["labels"])
        found.append(_without_loss(inputs, loaded))
    return found


def _without_loss(inputs: Inputs, loaded: Loaded) -> Inputs:
    """Inputs for a forward whose logits are not needed: a decoder computes those of one position."""
    if loaded.task != "causal" or "logits_to_keep" not in inspect.signature(loaded.model.forward).parameters:
        return inputs
    kept = {name: value for name, value in inputs.items() if name != "labels"}
    return {**kept, "logits_to_keep": torch.zeros(1, dtype=torch.long, device=loaded.device)}


def _matrices(blocks: Sequence[Block], rank: int) -> frozenset[nn.Parameter]:
    """The weights whose gradients `FirstOrder` looks at."""
    return frozenset(
        parameter
        for block in blocks
        if block.module is not None
        for parameter in block.module.parameters()
        if parameter.ndim == 2 and min(parameter.shape) > rank and parameter.is_floating_point()
    )


def _randomise(blocks: Sequence[Block], seed: int) -> None:
    """Replace every matrix of the blocks by normal numbers with its mean and standard deviation."""
    done: set[nn.Parameter] = set()
    with torch.no_grad():
        for block in blocks:
            for parameter in () if block.module is None else block.module.parameters():
                if parameter.ndim < 2 or parameter in done:
                    continue
                done.add(parameter)
                generator = torch.Generator(parameter.device).manual_seed(seed + len(done))
                mean, spread = float(parameter.float().mean()), float(parameter.float().std())
                parameter.normal_(mean, spread, generator=generator)


def _matrix(timeline: Timeline) -> list[Numbers]:
    values = np.asarray(timeline.layer_cka, float)  # [S, L, L], measured in the first step
    return [numbers(row) for row in values[0]] if len(values) else []


def _modules(timeline: Timeline, blocks: Sequence[Block], rank: int) -> list[Module]:
    gain, share = np.asarray(timeline.first_order_gain, float)[0], np.asarray(timeline.first_order_share, float)[0]
    names = [str(name) for name in timeline.meta["axes"]["module"]]
    found = []
    for block in blocks:
        shapes = {name: tuple(p.shape) for name, p in block.module.named_parameters()} if block.module else {}
        for place, name in enumerate(names):
            if np.isfinite(gain[block.index, place]) and name in shapes:
                rows, columns = shapes[name]
                found.append(
                    Module(block.index, name.removesuffix(".weight"), float(gain[block.index, place]),
                           finite_or_none(float(share[block.index, place])), random_share(rows, columns, rank))
                )  # fmt: skip
    return found
