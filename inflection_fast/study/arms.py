"""Arms: each chooses the modules to adapt, from its inputs. Users add arms by entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np
from torch import nn

from inflection_fast.act.adapters import default_modules
from inflection_fast.blocks import find_blocks
from inflection_fast.decide import SelectConfig, select
from inflection_fast.run.errors import UserError
from inflection_fast.study.adaptation import Adaptation, NoArm, Spending, on_layers
from inflection_fast.study.config import StudyConfig
from inflection_fast.study.texts import Split
from inflection_fast.study.training_loop import Clock
from inflection_fast.timeline import Timeline

__all__ = ["ENTRY_POINTS", "Arm", "Seen", "arm_of", "arms"]

ENTRY_POINTS = "inflection_fast.arms"


@dataclass
class Seen:
    """The inputs of an arm. What an arm uses is counted as its cost of choosing.

    Args:
        config: the study
        load: returns a fresh copy of the model before training on the target
        split: texts of the target; an arm may use those of `train` only
        measure: returns the timeline of the measured training and its cost
        seed: seed of the cell
        draw: number of the draw, for arms that draw at random
        place: transfer and regime as numbers, part of the seed of random arms
        learning_rate: the one that the search found for this arm; None while it is being searched for
    """

    config: StudyConfig
    load: Callable[[], nn.Module]
    split: Split
    measure: Callable[[], tuple[Timeline, dict[str, Any]]]
    seed: int
    draw: int = 0
    place: tuple[int, ...] = ()
    learning_rate: float | None = None
    clock: Clock = field(default_factory=Clock)
    steps: int = 0  # of training that the choice cost
    measured: dict[str, Any] | None = None

    @cached_property
    def model(self) -> nn.Module:
        """The model before training on the target. An arm must not change it."""
        return self.load()

    @cached_property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(find_blocks(self.model))

    @property
    def rate(self) -> float:
        """The learning rate, for arms that train before they choose."""
        if self.learning_rate is None:
            raise NoArm("this arm trains before it chooses, and no learning rate was given")
        return self.learning_rate

    @cached_property
    def timeline(self) -> Timeline:
        """The timeline of the measured training."""
        timeline, self.measured = self.measure()
        return timeline

    @property
    def rng(self) -> np.random.Generator:
        """A random generator seeded by the cell."""
        return np.random.default_rng([self.seed, self.draw, *self.place])

    @cached_property
    def modules(self) -> dict[int, list[str]]:
        """The full names of the modules that LoRA adapts by default, by block. NoArm where peft knows none."""
        try:
            return default_modules(self.model)
        except ValueError as error:
            raise NoArm(" ".join(str(error).split())) from error

    def best(self, scores: dict[int, float], **more: Any) -> Adaptation:
        """LoRA on the blocks with the highest scores. NoArm where a score is NaN."""
        k = self.config.blocks
        odd = [layer for layer, score in scores.items() if np.isnan(score)]
        if odd or len(scores) < k:
            raise NoArm(f"{k} blocks were asked for, and of {self.blocks} these have no score: {odd or 'too many'}")
        order = sorted(scores, key=lambda layer: (-scores[layer], layer))
        known = {str(layer): float(score) for layer, score in sorted(scores.items()) if np.isfinite(score)}
        return self.lora(order[:k], scores=known, **more)

    def lora(self, layers: Any, **more: Any) -> Adaptation:
        """LoRA on some blocks, at the rank that every LoRA arm has to spend."""
        return on_layers(self.model, layers, Spending(self.config.budget).over, **more)

    def cost(self) -> dict[str, float]:
        """The cost of choosing: seconds, and steps of training."""
        cost = {**self.clock.facts(), "steps": self.steps}
        for name, value in (self.measured or {}).items():
            cost[name] = round(cost.get(name, 0) + value, 3)
        return cost


class Arm(Protocol):
    """One way to choose what is trained."""

    @property
    def draws(self) -> bool:
        """Whether it draws at random, so that one seed has several cells of it."""

    def choose(self, seen: Seen) -> Adaptation:
        """What to train. NoArm, in one sentence, where this arm cannot be had."""


@dataclass(frozen=True)
class Fixed:
    """Trains a part of the model without adapters."""

    kind: str
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        top = seen.config.measured.top
        if self.kind == "unfreeze":
            layers = range(seen.blocks - top, seen.blocks)
            return Adaptation(self.kind, layers=tuple(layers), options={"top": top})
        return Adaptation(self.kind, layers=() if self.kind == "head" else tuple(range(seen.blocks)))


@dataclass(frozen=True)
class Everywhere:
    """LoRA or another adapter on all blocks: at the rank that all arms spend, or at one of its own."""

    kind: str = "lora"
    own_rank: bool = False
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        rank = seen.config.everywhere_rank
        spread = (lambda layers: dict.fromkeys(layers, rank)) if self.own_rank else Spending(seen.config.budget).over
        return on_layers(seen.model, range(seen.blocks), spread, kind=self.kind)


@dataclass(frozen=True)
class Places:
    """LoRA on blocks that are chosen without any input."""

    which: str
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        count, k = seen.blocks, seen.config.blocks
        if k > count:
            raise NoArm(f"{k} blocks were asked for, the model has {count}")
        if self.which == "random":
            return seen.lora(seen.rng.choice(count, k, replace=False).tolist())
        layers = {
            "first": range(k),
            "last": range(count - k, count),
            "even": np.round(np.linspace(0, count - 1, k)).astype(int).tolist(),
        }[self.which]
        return seen.lora(layers)


@dataclass(frozen=True)
class Planned:
    """LoRA, or another adapter, on the blocks that the plan of the measured training chooses.

    Where a plan is empty because nothing stands out from chance, the best blocks by SKI are taken without asking for
    significance, as `tune.when_empty: top` of a run does, and the note says so.
    """

    select: SelectConfig
    kind: str = "lora"
    count: bool = False  # the method takes a number of blocks
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        config = dataclasses.replace(self.select, k=seen.config.blocks) if self.count else self.select
        try:
            plan = select(seen.timeline, config)
            note = plan.summary
            if not plan.layers:
                plan = select(seen.timeline, SelectConfig(method="top", k=seen.config.blocks, significance=None))
                note = f"The plan was empty, and the best {seen.config.blocks} by SKI were taken. {note}"
        except ValueError as error:
            raise NoArm(str(error)) from error
        scores = {str(i): float(s) for i, s in enumerate(plan.scores) if np.isfinite(s)}
        return seen.lora(plan.layers, kind=self.kind, note=note, scores=scores)


def _own() -> dict[str, Arm]:
    placed = {which: Places(which) for which in ("first", "last", "even")}
    from inflection_fast.study.arms_data import BlockSimilarity, Breakpoints, Eva, FirstOrderGain, GradientRule
    from inflection_fast.study.arms_interventions import Intervened, PlannedBlocks, RatesByBlock
    from inflection_fast.study.arms_other import Other
    from inflection_fast.study.arms_trial import AdaLora, Lisa, SuccessiveHalving, TrialShare
    from inflection_fast.study.arms_weights import Kappa, Spectrum

    greedy = Planned(SelectConfig(method="greedy"))
    whole = PlannedBlocks(greedy)
    other = {kind: Other(kind, Everywhere()) for kind in ("ia3", "dora", "vera", "prefix", "bottleneck")}
    other |= {f"{kind}_planned": Other(kind, greedy) for kind in ("ia3", "dora", "vera", "bottleneck")}
    return {
        "kappa": Kappa(),
        "spectrum": Spectrum(),
        "eva": Eva(),
        "gradient_high": GradientRule("high"),
        "gradient_low": GradientRule("low"),
        "auto_rgn": GradientRule("relative"),
        "block_cka": BlockSimilarity(),
        "breakpoints": Breakpoints(),
        "first_order": FirstOrderGain(),
        "trial_norm": TrialShare("norm"),
        "trial_sensitivity": TrialShare("sensitivity"),
        "halving": SuccessiveHalving(),
        "adalora": AdaLora(),
        "lisa": Lisa(),
        **other,
        "head": Fixed("head"),
        "shallow": Fixed("unfreeze"),
        "full": Fixed("full"),
        "bitfit": Fixed("bitfit"),
        "all": Everywhere(own_rank=True),
        "all_equal": Everywhere(),
        "random": Places("random", draws=True),
        **placed,
        "greedy": greedy,
        "greedy_temperature": Intervened("temperature", greedy, {"start": 1.5, "end": 1.0}),
        "greedy_entropy_floor": Intervened(
            "entropy_floor", greedy, {"target": 1.0, "weight": 0.1, "add_to_loss": True}
        ),
        "greedy_head_dropout": Intervened("head_dropout", greedy, {"p": 0.1}),
        "greedy_debiased": Intervened("debiasing", greedy, {"lr": 1e-4, "least_accuracy": 0.75}),
        "blocks": whole,
        "blocks_new_heads": Intervened("new_heads", whole),
        "blocks_reset_feed_forward": Intervened("reset_feed_forward", whole),
        "blocks_sigma": Intervened("sigma", whole, {"keep": True}),
        "full_rates": RatesByBlock(),
        "maxima": Planned(SelectConfig(method="maxima")),
        "top": Planned(SelectConfig(method="top", k=1, significance=None), count=True),
    }


@cache  # the metadata of all installed packages is read, and the grid asks for every cell
def arms() -> dict[str, Arm]:
    """All arms by name: our own, and those of the entry point group `inflection_fast.arms`."""
    found = _own()
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise UserError(f"the arm {point.name} of {point.value} has the name of another arm: rename one of them")
        loaded = point.load()
        found[point.name] = loaded() if isinstance(loaded, type) else loaded
    return found


def arm_of(name: str) -> Arm:
    """The arm of that name; UserError where there is none."""
    known = arms()
    if name not in known:
        raise UserError(f"arms: there is no arm {name!r}; there are {', '.join(sorted(known))}")
    return known[name]
