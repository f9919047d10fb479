"""Is the injected model better than its baselines, beyond the noise of the evaluation set?

The models are compared on the same examples: those that both get right or both get wrong add no noise. If a run has
only the number of right answers, the models are treated as independent samples. Their difference has a larger standard
error, so ties become more likely.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from inflection_fast.report.folder import Run, Stage
from inflection_fast.report.words import count, listed, percent

__all__ = ["NOISE", "SAME_LOSS", "SAME_SIZE", "Comparison", "against", "compare", "regime_advice", "verdict"]

NOISE = 2.0  # standard errors: about 95 % of all differences between equally good models lie within
SAME_LOSS = 0.001  # nats per token: losses nearer than that differ by less than a thousandth of the perplexity
SAME_SIZE = 0.1  # trainable parameters within this share of each other count as equally many


@dataclass(frozen=True)
class Comparison:
    """The injected model against one other stage."""

    stage: Stage
    outcome: str  # "won", "lost", "tie" or "unknown"
    difference: float | None = None  # positive: injected is better
    standard_error: float | None = None
    why: str = ""  # for "unknown": a sentence

    @property
    def words(self) -> str:
        """The difference in points of accuracy (nats of loss), its standard error, and whether it counts."""
        if self.difference is None:
            return "not known"
        if self.standard_error is None:  # losses come without one
            return f"{self.difference:+.3f}"
        counts = "within noise" if self.outcome == "tie" else "beyond noise"
        return f"{100 * self.difference:+.1f} ± {100 * self.standard_error:.1f}, {counts}"


def compare(injected: Stage, other: Stage) -> Comparison:
    """Compare the accuracy of the injected model with that of another stage."""
    if injected.accuracy is None and other.accuracy is None:
        if injected.loss is not None and other.loss is not None:
            return Comparison(other, "unknown", other.loss - injected.loss)
    if injected.accuracy is None or other.accuracy is None or not injected.n or not other.n:
        return _unknown(other, "no accuracy with a number of examples was recorded for both.")
    if injected.n != other.n:
        return _unknown(other, f"they were evaluated on different examples ({injected.n:,} and {other.n:,}).")
    difference = injected.accuracy - other.accuracy
    error = _paired_error(injected.right, other.right) or math.hypot(_error(injected), _error(other))
    outcome = "tie" if abs(difference) <= NOISE * error else "won" if difference > 0 else "lost"
    return Comparison(other, outcome, difference, error)


def against(run: Run, stage: Stage) -> str:
    """The injected model against a baseline in words; empty for other stages, and without an injected model."""
    return compare(run.tune, stage).words if run.tune and run.tune.layers and stage in run.baselines else ""


def verdict(run: Run) -> list[str]:
    """The answer of a run in sentences: first the answer, then its limits."""
    if run.tune is None:
        return ["There is no answer yet: no injected model was trained in this run (the tune stage is missing)."]
    if run.tune.layers == ():
        return ["Nothing was injected, because no layer was chosen: there is no injected model to compare."]
    comparisons = [compare(run.tune, stage) for stage in run.baselines]
    sentences = [_overall(comparisons)]
    sentences += [comparison.why for comparison in comparisons if comparison.why]
    sentences += _place(run.tune, [c for c in comparisons if c.outcome != "unknown"])
    sentences += _length(run.tune, run.baselines)
    sentences += _majority(run.tune)
    if run.tune.accuracy is not None:
        sentences.append(
            "The noise is that of the evaluation set alone. It does not include the effect of another seed, which one "
            "run cannot show."
        )
    return sentences + regime_advice(run)


def _unknown(other: Stage, why: str) -> Comparison:
    return Comparison(other, "unknown", why=f"Injected cannot be compared with {other.label}: {why}")


def _error(stage: Stage) -> float:
    # One right and one wrong answer are added (Agresti and Caffo 2000): otherwise a model without any wrong answer
    # would have no noise.
    if stage.accuracy is None or stage.n is None:
        return math.nan
    share = (stage.accuracy * stage.n + 1) / (stage.n + 2)
    return math.sqrt(share * (1 - share) / (stage.n + 2))


def _paired_error(a: str | None, b: str | None) -> float | None:
    """Standard error of the difference of two accuracies on the same examples; None where those are not known.

    From the share of examples that only one of the two got right, one added to each (Bonett and Price 2012).
    """
    if a is None or b is None:
        return None
    only_a, only_b = ((sum(x > y for x, y in zip(*both, strict=True)) + 1) / (len(a) + 2) for both in ((a, b), (b, a)))
    return math.sqrt((only_a + only_b - (only_a - only_b) ** 2) / (len(a) + 2))


def _overall(comparisons: list[Comparison]) -> str:
    by = {
        outcome: [c.stage.label for c in comparisons if c.outcome == outcome]
        for outcome in ("won", "tie", "lost", "unknown")
    }
    if not comparisons:
        return "There is nothing to compare the injected model with: this run has no baseline."
    if all(c.outcome == "unknown" and c.difference is not None for c in comparisons):
        return _by_loss(comparisons)
    if len(by["unknown"]) == len(comparisons):
        return "This run cannot tell whether injecting helped: no comparison could be tested against noise."
    known = len(comparisons) - len(by["unknown"])
    every = "the only baseline" if known == 1 else f"all {known} baselines"
    if len(by["won"]) == known:
        return f"The injected model beats {every} beyond the noise."
    if len(by["lost"]) == known:
        return f"Injecting did not help: the injected model is worse than {every}, beyond the noise."
    if len(by["tie"]) == known:
        return f"This run shows no gain from injecting: the injected model is within the noise of {every}."
    parts = [
        f"beats {listed(by['won'])} beyond the noise" if by["won"] else "",
        f"is within the noise of {listed(by['tie'])}" if by["tie"] else "",
        f"is worse than {listed(by['lost'])} beyond the noise" if by["lost"] else "",
    ]
    return f"The injected model does not beat every baseline: it {listed([part for part in parts if part])}."


def _by_loss(comparisons: list[Comparison]) -> str:
    known = [(c.stage.label, c.difference) for c in comparisons if c.difference is not None]
    same = [name for name, d in known if abs(d) < SAME_LOSS]
    better, worse = ([name for name, d in known if name not in same and (d > 0) is lower] for lower in (True, False))
    parts = [
        f"a lower loss than {listed(better)}" if better else "",
        f"the same loss as {listed(same)} to {SAME_LOSS:g} nats per token" if same else "",
        f"a higher loss than {listed(worse)}" if worse else "",
    ]
    if len(same) == len(known):
        return f"This run shows no gain from injecting: the injected model has {parts[1]}."
    return (
        f"The injected model has {listed([part for part in parts if part])}; losses come without a standard error, so "
        "this run cannot tell whether that is more than chance."
    )


def _place(injected: Stage, comparisons: list[Comparison]) -> list[str]:
    """Whether the place mattered, and not only the number of parameters."""
    size = injected.trainable_parameters
    if not comparisons or not size:
        return []
    same = [c for c in comparisons if abs(c.stage.trainable_parameters / size - 1) <= SAME_SIZE]
    if not same:
        return [
            f"No baseline trains about as many parameters as the injected model ({size:,}), so this run "
            "cannot tell whether the chosen place matters or only the number of parameters."
        ]
    names = listed([c.stage.label for c in same])
    lead = f"Of the baselines, {names} {'trains' if len(same) == 1 else 'train'} about as many parameters"
    outcomes = {c.outcome for c in same}
    result = {
        frozenset({"won"}): "was the better one",
        frozenset({"tie"}): "made no difference beyond the noise",
        frozenset({"lost"}): "was the worse one",
    }.get(frozenset(outcomes), "was not the better one throughout")
    return [f"{lead}: against {'it' if len(same) == 1 else 'them'} the chosen place {result}."]


def _length(injected: Stage, others: list[Stage]) -> list[str]:
    """Stages that trained longer or shorter, which is an advantage or a disadvantage by itself."""
    different = [
        s for s in others if s.trainable_parameters and s.steps and injected.steps and s.steps != injected.steps
    ]
    if not different:
        return []
    named = listed([f"{stage.label} {count(stage.steps)}" for stage in different])
    return [f"Not all trained equally long: injected {count(injected.steps)} steps, {named}."]


def _majority(injected: Stage) -> list[str]:
    if injected.accuracy is None or injected.majority is None or not injected.n:
        return []
    gain = injected.accuracy - injected.majority
    if gain > NOISE * _error(injected):
        return []
    return [
        f"The injected model is no better than always giving the most frequent answer ({percent(injected.majority)} "
        "right): it has not learnt the task, and comparisons with it mean little."
    ]


SAYS = {
    "selective LoRA": "LoRA on chosen layers",
    "LoRA everywhere": "LoRA on all layers",
    "unfreezing": "unfreezing the top blocks",
}


@cache
def _study() -> dict[str, Any]:
    path = resources.files("inflection_fast.report") / "regime.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def regime_advice(run: Run) -> list[str]:
    """How saturated the source is, and what the study found for such sources: family, rule, place of LoRA.

    Empty without a source stage, and where its metrics do not have the saturation.
    """
    metrics = run.source.metrics if run.source is not None else None
    if metrics is None or metrics.largest_probability is None or metrics.share_above_099 is None:
        return []
    study = _study()
    scores = study["accuracy"]
    sure = metrics.largest_probability
    family = SAYS[study["above"] if sure > study["threshold"] else study["below"]]
    always = SAYS[study["always"]]
    state = "saturated" if metrics.share_above_099 > 0.5 else "not saturated"
    lead = (
        f"The source model is {state}: on its own test texts the mean largest probability is {sure:.2f}, "
        f"and {percent(metrics.share_above_099, 0)} are above 0.99."
    )
    where = f"In the study of {study['transfers']} transfers with a small encoder (docs/study.md)"
    if scores["rule"] > scores["always"]:
        rule = (
            f"{where} {family} paid most for sources like this one; choosing by this rule reached "
            f"{scores['rule']:.1f} % on transfers that the rule was not made from, "
            f"always {always} {scores['always']:.1f} %."
        )
    else:
        rule = (
            f"{where} this was no ground to choose by: {always} was the best choice without a rule "
            f"({scores['always']:.1f} %), and a rule by saturation reached {scores['rule']:.1f} % on transfers that it "
            "was not made from."
        )
    places = [
        f"LoRA on the {name} layers was {found:+.1f} points from LoRA on as many random layers "
        f"(95 % interval {low:+.1f} to {high:+.1f})"
        for name, (found, low, high) in study["minus_random"].items()
    ]
    return [lead, rule, *([f"There, {listed(places)}."] if places else [])]
