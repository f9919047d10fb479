"""Learning rates by block from relative gradient norms: Auto-RGN (Lee et al. 2023, arXiv 2210.11466).

    RGN_l = ||g_l|| / ||theta_l||,    lr_l = lr * RGN_l / max RGN

Blocks with a large gradient relative to their weights get a high learning rate. The norms come from a timeline
(`parameter_grad`, the mean over its steps), so that the rates are known before the training starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..blocks import find_blocks
from ..timeline import Timeline
from ..timeline.means import finite_mean
from .handle import check_number

__all__ = ["groups_of", "learning_rates", "parameter_groups"]


def learning_rates(model: nn.Module, timeline: Timeline, lr: float, *, least: float = 0.0) -> np.ndarray:
    """[L] learning rates of the blocks by Auto-RGN; the block with the largest relative gradient norm has `lr`.

    `least` in [0, 1] is the smallest share of `lr` that a block gets. A block without a measured gradient gets the
    median share of the others; no rate is NaN. `ValueError` if no block has a gradient, or the timeline is of another
    model.
    """
    check_number("lr", lr, "> 0")
    check_number("least", least, "in [0, 1]")
    if not isinstance(timeline, Timeline):
        raise TypeError(f"timeline: expected a Timeline (Timeline.load reads a file), got {type(timeline).__name__}")
    blocks = find_blocks(model)
    names = [block.name for block in blocks]
    if len(names) != len(timeline.layers):
        raise ValueError(f"timeline: it is of a model of {len(timeline.layers)} blocks, this one has {len(names)}")
    relative = finite_mean(timeline.parameter_grad) / np.array([_norm(block.module) for block in blocks])
    known = np.isfinite(relative)
    if not known.any() or not np.nanmax(relative) > 0:
        raise ValueError("timeline: no block has a parameter gradient; measure 'parameter_grad' while the blocks train")
    shares = relative / np.nanmax(relative)
    shares[~known] = np.median(shares[known])
    return lr * np.maximum(shares, least)


def parameter_groups(
    model: nn.Module, timeline: Timeline, lr: float, *, least: float = 0.0, weight_decay: float | None = None
) -> list[dict]:
    """Parameter groups for any optimizer: one for each block with its rate, and one with `lr` for all other parameters.

    The groups hold only parameters that train, and "name" (of the block, or "other"). A parameter that blocks share is
    in the group of the first. With `weight_decay`, biases and other vectors are in separate groups without it, as in
    the Trainer. `ValueError` as in `learning_rates`.
    """
    return groups_of(model, learning_rates(model, timeline, lr, least=least), lr, weight_decay=weight_decay)


def groups_of(
    model: nn.Module, rates: Sequence[float] | np.ndarray, lr: float, *, weight_decay: float | None = None
) -> list[dict]:
    """The groups of `parameter_groups`, from the learning rate of each block."""
    seen: set[int] = set()
    groups = []
    parts = [(b.name, b.module, rate) for b, rate in zip(find_blocks(model), rates, strict=True)]
    for name, module, rate in [*parts, ("other", model, lr)]:
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in trained}
        if weight_decay is None:
            split: list[tuple[str, list[nn.Parameter], dict[str, float]]] = [(name, trained, {})]
        else:
            split = [
                (name, [p for p in trained if p.dim() > 1], {"weight_decay": weight_decay}),
                (f"{name} without decay", [p for p in trained if p.dim() <= 1], {"weight_decay": 0.0}),
            ]
        groups += [{"name": n, "params": ps, "lr": float(rate), **extra} for n, ps, extra in split if ps]
    if not groups:
        raise ValueError("model: none of its parameters trains")
    return groups


def _norm(module: nn.Module) -> float:
    parameters = [p.detach() for p in module.parameters() if p.requires_grad] or list(module.parameters())
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.double()) for p in parameters]))
    return float(norm) if norm > 0 else np.nan
