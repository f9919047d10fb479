"""Regime advice: which family of arms is likely to pay, from how saturated the source is, and how good that rule is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from inflection_fast.study.results import Result

__all__ = ["FAMILIES", "Fold", "Rule", "Score", "fit_rule", "score_rule"]

FAMILIES = {"selective LoRA": "greedy", "LoRA everywhere": "all", "unfreezing": "shallow"}


@dataclass(frozen=True)
class Rule:
    """`above` for a source whose mean largest probability exceeds the threshold, else `below`."""

    threshold: float
    below: str
    above: str

    def family(self, sure: float) -> str:
        """The family for a source."""
        return self.above if sure > self.threshold else self.below

    def __str__(self) -> str:
        if self.below == self.above:
            return f"always {self.below}"
        return f"{self.above} above {self.threshold:.2f}, {self.below} below"


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
    advice: str

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean accuracy of the rule, of always one family, and in hindsight."""
        return tuple(
            float(np.mean([getattr(fold, name) for fold in self.folds])) for name in ("rule", "always", "best")
        )


Place = tuple[float, dict[str, float]]  # how sure the source is, accuracy of each family


def score_rule(cells: Sequence[Result]) -> Score | None:
    """Scores the rule; None where fewer than three transfers have cells of every family."""
    places = _places(cells)
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
                float(np.mean([accuracy[rule.family(sure)] for sure, accuracy in selected])),
                float(np.mean([accuracy[always] for _, accuracy in selected])),
                float(np.mean([max(accuracy.values()) for _, accuracy in selected])),
            )
        )
    everything = [place for found in places.values() for place in found]
    always = _best_family(everything)
    score = Score(folds, always, "")
    better = score.means[0] > score.means[1]
    advice = f"{fit_rule(everything)}." if better else f"{always}, whatever the state of the source."
    return Score(folds, always, advice)


def _places(cells: Sequence[Result]) -> dict[str, list[Place]]:
    """Transfer -> for each regime how sure the source is, and the accuracy of every family where all were run."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    sure = {}
    for cell in cells:
        found[cell.transfer, cell.regime][cell.arm][cell.seed] = 100 * cell.accuracy
        source = cell.content["meta_info"]["dataset_info"]["source_training"]
        sure[cell.transfer, cell.regime] = source["saturation"]["test"]["largest_probability"]
    places = defaultdict(list)
    for place, arms in found.items():
        seeds = set.intersection(*(set(arms[arm]) for arm in FAMILIES.values()))
        if seeds:
            accuracy = {name: float(np.mean([arms[arm][s] for s in sorted(seeds)])) for name, arm in FAMILIES.items()}
            places[place[0]].append((sure[place], accuracy))
    return dict(places)


def _best_family(places: Sequence[Place]) -> str:
    return max(FAMILIES, key=lambda family: np.mean([accuracy[family] for _, accuracy in places]))


def fit_rule(places: Sequence[Place]) -> Rule:
    """The threshold and families with the highest mean accuracy; the simplest of equals."""
    values = sorted({sure for sure, _ in places})
    thresholds = [(a + b) / 2 for a, b in pairwise(values)] or [values[0]]
    rules = [Rule(t, below, above) for t, below, above in product(thresholds, FAMILIES, FAMILIES)]
    rules.sort(key=lambda rule: rule.below != rule.above)  # of equals the one without a threshold
    return max(rules, key=lambda rule: round(np.mean([acc[rule.family(sure)] for sure, acc in places]), 9))
