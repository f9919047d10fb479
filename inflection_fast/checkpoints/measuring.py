"""Measuring a model on batches by a Monitor, without changing it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from inflection_fast.blocks import find_blocks
from inflection_fast.checkpoints.memory import trim_memory
from inflection_fast.checkpoints.threads import threads_for
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.measure.hooks import isolated_evaluation
from inflection_fast.measure.micro_batch import loss_of
from inflection_fast.ops.cka import RowSample, feature_rows
from inflection_fast.quantities.quantity import BlockForward, Quantity, Sums
from inflection_fast.timeline import Timeline

__all__ = ["Features", "Inputs", "can_recompute", "measure"]

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]


class Features(Quantity):
    """Keeps feature rows of every block's output, to compare them with those of another model.

    `rows[layer]` and `sequences[layer]` are lists of tensors [n, D] and [n], one of each batch. Memory: at most
    `budget` rows of every layer, in float32.

    Args:
        batches: their number; each is one step of the monitor.
        budget: rows of a layer.
        pooling: as for `feature_rows`.
        seed: of the choice of rows.
    """

    name = "kept_features"

    def __init__(self, batches: int, budget: int, pooling: str, seed: int = 0):
        self.pooling, self._sample = pooling, RowSample(budget, batches, seed)
        self.rows: dict[int, list[Tensor]] = {}
        self.sequences: dict[int, list[Tensor]] = {}

    def on_block(self, sums: Sums, block: BlockForward) -> None:
        """Keep the rows of a batch."""
        tokens = block.tokens
        tokens = tokens if tokens is not None and tokens.shape == block.output.shape[:2] else None
        rows, of = feature_rows(block.output, tokens, self.pooling)
        rows = rows.float()
        kept, sequences = self.rows.setdefault(block.layer, []), self.sequences.setdefault(block.layer, [])
        begun = 1 + int(sequences[-1][-1]) if sequences and len(sequences[-1]) else 0
        keep = self._sample.keep(len(kept), len(rows), sum(map(len, kept)))
        if keep is not None:
            keep = keep.to(rows.device)
            rows, of = rows[keep], of[keep]
        kept.append(rows)
        sequences.append(begun + of)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Nothing for the timeline."""
        return {}


def measure(
    model: nn.Module,
    batches: Sequence[Inputs],
    config: MonitorConfig,
    *,
    out: Path | None = None,
    probe: Sequence[Inputs] | None = None,
    gradients: bool = False,
    loss: Callable[[Inputs, object], Tensor | None] | None = None,
    weights: frozenset[nn.Parameter] = frozenset(),
    recomputes: bool = False,
) -> Timeline:
    """The timeline of `model` on `batches`, one measured step for each.

    The model runs in evaluation mode; modes, `requires_grad`, gradients and random generators are restored.

    Args:
        model: any that a Monitor takes, on the device of the batches.
        batches: its inputs.
        config: what is measured; gradients are those of all sequences, whatever its `frozen_share`.
        out: folder of the timeline; None: in memory.
        probe: as for a Monitor.
        gradients: whether a backward pass goes through every forward, as far as to the first block.
        loss: makes it, of inputs and output; None: what the model returns.
        weights: parameters with a gradient in the first step; each gradient is freed once it was measured.
        recomputes: activation checkpointing of the blocks; see `can_recompute`.

    Raises:
        ValueError: there is no loss to go back from, or the Monitor refuses the model.
    """
    device = next(model.parameters()).device
    config = replace(config, frozen_share=1.0)  # every parameter is frozen here, and no sequence is left out for it
    with ExitStack() as stack:
        stack.enter_context(threads_for(_operations(model, batches)))
        stack.enter_context(_frozen(model))
        stack.enter_context(isolated_evaluation(model, device, autograd=True))
        if recomputes:
            stack.enter_context(_checkpointed(model))
        trained = stack.enter_context(_trained(weights))  # before the monitor, which looks at what trains
        given = None if probe is None else [dict(inputs) for inputs in probe]
        # Kept features fragment the freed memory, so each forward would allocate new memory.
        stack.callback(model.register_forward_hook(lambda *_: trim_memory()).remove)
        monitor = stack.enter_context(Monitor(model, config, out, probe=given, alerts=None))
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            output = model(**inputs)
            found = loss_of(output) if loss is None else loss(inputs, output)
            del output  # logits of a large vocabulary are larger than all activations
            if gradients:
                if found is None:
                    raise ValueError("loader: a batch gives no loss; put labels into the batches")
                found.backward()
            found = None if found is None else found.detach()  # without the graph
            trained.close()  # before the probe runs, which would keep its activations for their gradients
            trim_memory()
            monitor.step(found)
        timeline = monitor.timeline
        if monitor.dropped:
            logger.warning("%d of %d measured batches are missing from the timeline", monitor.dropped, len(batches))
    return timeline


def _operations(model: nn.Module, batches: Sequence[Inputs]) -> float:
    """Floating-point operations of the largest matrix of the blocks on a batch; infinite without `input_ids`."""
    if not all("input_ids" in batch for batch in batches):
        return math.inf
    tokens = max((batch["input_ids"].numel() for batch in batches), default=0)
    parameters = (p for block in find_blocks(model) if block.module is not None for p in block.module.parameters())
    return 2.0 * tokens * max((p.numel() for p in parameters if p.ndim == 2), default=0)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter trains; the Monitor makes gradients start at the first block."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def can_recompute(model: nn.Module) -> bool:
    """Whether blocks can be checkpointed. Transformers does so in training mode alone, so not with dropout."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    known: dict[str, object] = to_dict()
    drops = any("drop" in name and isinstance(value, (int, float)) and value > 0 for name, value in known.items())
    return bool(_recomputable(model)) and getattr(model, "supports_gradient_checkpointing", False) and not drops


def _recomputable(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Blocks, but not their children, are in training mode, so that Transformers checkpoints them."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second until Transformers 5
    next(getattr(model, name) for name in names if hasattr(model, name))()
    blocks = _recomputable(model)
    try:
        for block in blocks:
            block.training = True
        yield
    finally:
        for block in blocks:
            block.training = False
            setattr(block, "gradient_checkpointing", False)  # noqa: B010  (to a type checker, modules hold modules)


@contextmanager
def _trained(weights: frozenset[nn.Parameter]) -> Iterator[ExitStack]:
    """These parameters train until the stack is closed; each gradient is freed as soon as it is complete."""

    def let_go(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as stack:
        for parameter in weights:
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)
            stack.callback(parameter.register_post_accumulate_grad_hook(let_go).remove)
        yield stack
