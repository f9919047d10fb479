"""Regime advice: which family of arms is likely to pay, from the state of the source, and how good that rule is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np

from inflection_fast.study.analysis import compare
from inflection_fast.study.results import Result

__all__ = ["FAMILIES", "LAST", "LOST", "RISE", "SURE", "Fold", "Rule", "Score", "fit_rule", "for_runs", "score_rule"]

# Of each the arm that stands for it.
FAMILIES = {"selective LoRA": "greedy", "LoRA everywhere": "all", "unfreezing": "shallow"}
PLACES = {"planned": "greedy", "last": "last"}


# What a rule may look at, in the words of the report.
SURE = "mean largest probability"
LAST, RISE, LOST = "last block's probe", "last block's probe minus the first's", "best block's probe minus the last's"


@dataclass(frozen=True)
class Rule:
    """`above` for a source of which a number exceeds the threshold, else `below`."""

    threshold: float
    below: str
    above: str
    number: str = SURE

    def family(self, state: Mapping[str, float]) -> str:
        """The family for a source."""
        return self.above if state[self.number] > self.threshold else self.below

    def __str__(self) -> str:
        if self.below == self.above:
            return f"always {self.below}"
        number = "" if self.number == SURE else f" ({self.number})"
        return f"{self.above} above {self.threshold:.2f}, {self.below} below{number}"


@dataclass(frozen=True)
class Fold:
    """One transfer left out: mean accuracies in percent."""

    transfer: str
    words: str
    rule: float
    always: float
    best: float


@dataclass(frozen=True)
class Score:
    """The rule by leave-one-transfer-out."""

    folds: list[Fold]
    always: str  # the family that is best over all transfers
    rule: Rule  # from all transfers

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean accuracy of the rule, of always one family, and in hindsight."""
        rule, always, best = (
            float(np.mean([getattr(fold, name) for fold in self.folds])) for name in ("rule", "always", "best")
        )
        return rule, always, best

    @property
    def better(self) -> bool:
        """Whether the rule is ahead of always one family, on the transfers that it was not made from."""
        return self.means[0] > self.means[1]

    @property
    def advice(self) -> str:
        """The rule in a sentence, or the family where no rule is ahead of it."""
        return f"{self.rule}." if self.better else f"{self.always}, whatever the state of the source."


Place = tuple[dict[str, float], dict[str, float]]  # the numbers that a rule may look at, accuracy of each family


def score_rule(cells: Sequence[Result], probes: Mapping[str, Mapping[str, Any]] | None = None) -> Score | None:
    """Score the rule; None where fewer than three transfers have cells of every family.

    The rule looks at the saturation of the source. Given `probes` ("transfer-regime" -> {"accuracy": [...]}), it looks
    at the accuracy of linear probes on its blocks as well, and places without them are left out.
    """
    places = _places(cells, probes)
    if len(places) < 3:
        return None
    folds = []
    for left_out, selected in places.items():
        others = [place for name, found in places.items() if name != left_out for place in found]
        rule, always = fit_rule(others), _best_family(others)
        folds.append(
            Fold(
                left_out,
                str(rule),
                float(np.mean([accuracy[rule.family(state)] for state, accuracy in selected])),
                float(np.mean([accuracy[always] for _, accuracy in selected])),
                float(np.mean([max(accuracy.values()) for _, accuracy in selected])),
            )
        )
    everything = [place for found in places.values() for place in found]
    return Score(folds, _best_family(everything), fit_rule(everything))


def for_runs(cells: Sequence[Result]) -> dict[str, Any] | None:
    """What the report of a run says of its source, as JSON holds it; None where there is no score.

    `python benchmarks/study/advice.py` writes it to `inflection_fast/report/regime.json`.
    """
    score = score_rule(cells)
    if score is None:
        return None
    rule, always, best = (round(value, 2) for value in score.means)
    places = {name: compare(cells, arm, "random") for name, arm in PLACES.items()}
    return {
        "model": cells[0].content["meta_info"]["model_info"]["path"],
        "transfers": len(score.folds),
        "regimes": sorted({cell.regime for cell in cells}),
        "cells": len(cells),
        "threshold": round(score.rule.threshold, 4),
        "below": score.rule.below,
        "above": score.rule.above,
        "always": score.always,
        "accuracy": {"rule": rule, "always": always, "hindsight": best},
        "minus_random": {
            name: [round(value, 2) for value in (effect.difference, effect.low, effect.high)]
            for name, effect in places.items()
            if effect is not None
        },
    }


def _places(cells: Sequence[Result], probes: Mapping[str, Mapping[str, Any]] | None) -> dict[str, list[Place]]:
    """Transfer -> for each regime the state of the source, and the accuracy of every family where all were run."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    states: dict[tuple[str, str], dict[str, float]] = {}
    for cell in cells:
        found[cell.transfer, cell.regime][cell.arm][cell.seed] = 100 * cell.accuracy
        source = cell.content["meta_info"]["dataset_info"]["source_training"]
        states[cell.transfer, cell.regime] = {SURE: source["saturation"]["test"]["largest_probability"]}
    if probes is not None:
        for place, state in states.items():
            of_blocks = probes.get("-".join(place), {}).get("accuracy")
            if of_blocks is None:
                del found[place]
            else:
                last = of_blocks[-1]
                state |= {LAST: last, RISE: last - of_blocks[0], LOST: max(of_blocks) - last}
    places = defaultdict(list)
    for place, arms in found.items():
        seeds = set.intersection(*(set(arms[arm]) for arm in FAMILIES.values()))
        if seeds:
            accuracy = {name: float(np.mean([arms[arm][s] for s in sorted(seeds)])) for name, arm in FAMILIES.items()}
            places[place[0]].append((states[place], accuracy))
    return dict(places)


def _best_family(places: Sequence[Place]) -> str:
    return max(FAMILIES, key=lambda family: np.mean([accuracy[family] for _, accuracy in places]))


def fit_rule(places: Sequence[Place]) -> Rule:
    """The number, threshold and families with the highest mean accuracy; the simplest of equals."""
    rules = []
    for number in places[0][0]:
        values = sorted({state[number] for state, _ in places})
        thresholds = [(a + b) / 2 for a, b in pairwise(values)] or [values[0]]
        rules += [Rule(t, below, above, number) for t, below, above in product(thresholds, FAMILIES, FAMILIES)]
    rules.sort(key=lambda rule: rule.below != rule.above)  # of equals the one without a threshold
    return max(rules, key=lambda rule: round(np.mean([acc[rule.family(state)] for state, acc in places]), 9))
