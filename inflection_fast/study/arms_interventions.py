"""Arms that act on the planned blocks before or during their training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from inflection_fast.act.debias import debias_source
from inflection_fast.act.entropy_loss import attention_entropy_loss
from inflection_fast.act.handle import Handle, Scheduled
from inflection_fast.act.head_dropout import head_dropout
from inflection_fast.act.learning_rates import groups_of, learning_rates
from inflection_fast.act.reinitialise import reinitialise_heads, reset_feed_forward
from inflection_fast.act.sigma import SigmaReparametrisation, sigma_reparametrisation
from inflection_fast.act.temperature import attention_temperature
from inflection_fast.decide import SelectConfig, select
from inflection_fast.measure import Monitor, MonitorConfig
from inflection_fast.study.adaptation import Adaptation, NoArm
from inflection_fast.study.arms import Planned, Seen
from inflection_fast.study.config import LoopConfig
from inflection_fast.study.texts import Tokens
from inflection_fast.study.training_loop import TrainingHooks, batch_of, batches_of, forward

__all__ = ["Intervened", "PlannedBlocks", "RatesByBlock", "intervention_hooks", "prepare", "rate_groups"]

# During training. Afterwards `remove` takes them away, or `merge` for a reparametrisation.
DURING: dict[str, Callable[..., Handle]] = {
    "temperature": attention_temperature,
    "entropy_floor": attention_entropy_loss,
    "head_dropout": head_dropout,
    "sigma": sigma_reparametrisation,
}
# Before training.
BEFORE: dict[str, Callable[..., Handle]] = {"reset_feed_forward": reset_feed_forward, "new_heads": reinitialise_heads}
DEBIASING = "debiasing"
SOFT_SHARE = 0.5  # of the steps, after which the temperature is the model's own
DEBIASING_SHARE = 1 / 3  # of the steps, as many more on the source
RATE_BATCHES = 4  # from which relative gradients of blocks are taken


@dataclass(frozen=True)
class PlannedBlocks:
    """The blocks of `place` trained whole, and the head: freezing by plan."""

    place: Planned
    kind: str = "blocks"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        chosen = self.place.choose(seen)
        options = {"layers": list(chosen.layers)}
        return Adaptation(self.kind, layers=chosen.layers, options=options, note=chosen.note, scores=chosen.scores)


@dataclass(frozen=True)
class RatesByBlock:
    """Everything trains, each block at a learning rate by its relative gradient norm (Auto-RGN, arXiv 2210.11466)."""

    kind: str = "full"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        loop, model = seen.config.train, seen.load().to(seen.config.train.device).train()
        model.requires_grad_(True)
        rows = batches_of(seen.split.train, loop.batch_size, RATE_BATCHES, seen.seed)
        with Monitor(model, MonitorConfig(every=1, quantities=("parameter_grad",)), alerts=None) as monitor:
            for some in rows:
                forward(model, batch_of(seen.split.train, some, loop.device), loop).loss.backward()
                monitor.step()
                model.zero_grad(set_to_none=True)
        try:
            measured = learning_rates(model, monitor.timeline, 1.0)
        except ValueError as error:
            raise NoArm(" ".join(str(error).split())) from error
        shares = [float(f"{share:.6g}") for share in measured]
        scores = {str(layer): share for layer, share in enumerate(shares)}
        return Adaptation("full", layers=tuple(range(seen.blocks)), options={"rates": shares}, scores=scores)


@dataclass(frozen=True)
class Intervened:
    """What `place` trains, and an intervention on its blocks.

    Where the plan is empty `place` takes the best blocks, as it does without the intervention, so the two arms differ
    in the intervention alone.
    """

    intervention: str
    place: Planned | PlannedBlocks
    settings: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False

    @property
    def kind(self) -> str:
        """The kind of what is trained, whose learning rates are tried."""
        return self.place.kind

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        chosen = self.place.choose(seen)
        settings, steps = dict(self.settings), seen.config.train.steps
        if self.intervention == "temperature":
            settings["steps"] = max(1, round(SOFT_SHARE * steps))
        elif self.intervention == DEBIASING:
            settings["steps"] = max(1, round(DEBIASING_SHARE * steps))
        elif self.intervention == "new_heads":
            settings["heads"] = _lowest_heads(seen, chosen.layers)
        action = {"intervention": self.intervention, "on": list(chosen.layers), "settings": settings}
        if self.intervention in DURING:
            try:
                _apply(DURING, seen.model, action).remove()
            except ValueError as error:
                raise NoArm(" ".join(str(error).split())) from error
        return replace(chosen, options={**chosen.options, **action})


def _lowest_heads(seen: Seen, layers: tuple[int, ...]) -> dict[str, list[int]]:
    """Of each block the collapsed heads, or, where it has none, the head of the lowest attention entropy."""
    collapsed = select(seen.timeline, SelectConfig(method="collapsed")).heads or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over no value
        entropy = np.nanmean(seen.timeline.entropy, axis=0)  # [L, H]
    known = [layer for layer in layers if np.isfinite(entropy[layer]).any()]
    if len(known) < len(layers):
        raise NoArm(f"blocks {sorted(set(layers) - set(known))} have no attention entropy")
    return {str(layer): list(collapsed.get(layer, (int(np.nanargmin(entropy[layer])),))) for layer in layers}


def _apply(among: Mapping[str, Callable[..., Handle]], model: nn.Module, action: Mapping[str, Any]) -> Handle:
    settings = dict(action["settings"])
    if "heads" in settings:
        settings["heads"] = {int(layer): heads for layer, heads in settings["heads"].items()}
    return among[action["intervention"]](model, layers=list(action["on"]), **settings)


def prepare(
    adaptation: Adaptation, model: nn.Module, source: Callable[[], Tokens], loop: LoopConfig, seed: int
) -> None:
    """What an intervention does to the model before it is adapted. NoArm where it cannot be.

    Args:
        source: gives the training texts of the source, on which a debiasing phase runs.
    """
    action = adaptation.options
    try:
        if action.get("intervention") in BEFORE:
            _apply(BEFORE, model, {**action, "settings": {**action["settings"], "seed": seed}})
        elif action.get("intervention") == DEBIASING:
            _debias(model, source(), loop, seed, dict(action["settings"]))
    except ValueError as error:
        raise NoArm(" ".join(str(error).split())) from error


def _debias(model: nn.Module, tokens: Tokens, loop: LoopConfig, seed: int, settings: dict[str, Any]) -> None:
    model.to(loop.device).train()
    torch.manual_seed(seed)
    rows = batches_of(tokens, loop.batch_size, settings["steps"], seed)
    debias_source(model, [batch_of(tokens, some, loop.device) for some in rows], **settings)


def intervention_hooks(adaptation: Adaptation, model: nn.Module, steps: int) -> TrainingHooks:
    """Arguments of `train` that apply the intervention of an adaptation to `model` and take it back at the end."""
    if adaptation.options["intervention"] not in DURING:
        return {}
    handle = _apply(DURING, model, adaptation.options)

    def after_step(step: int) -> None:
        if isinstance(handle, Scheduled):
            handle.step()
        if step + 1 >= steps:
            handle.merge() if isinstance(handle, SigmaReparametrisation) else handle.remove()

    return {"after_step": after_step}


def rate_groups(adaptation: Adaptation, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Parameter groups of `RatesByBlock`."""
    return groups_of(model, [learning_rate * share for share in adaptation.options["rates"]], learning_rate)
