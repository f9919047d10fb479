"""What the study found for sources as saturated as that of a run."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from inflection_fast.report.folder import Run
from inflection_fast.report.words import percent

__all__ = ["regime_advice"]

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
    """How saturated the source is, what the study found to pay for such sources, and how good that rule was there.

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
        return [
            lead,
            f"{where} {family} paid most for sources like this one; choosing by this rule reached "
            f"{scores['rule']:.1f} % on transfers that the rule was not made from, "
            f"always {always} {scores['always']:.1f} %.",
        ]
    return [
        lead,
        f"{where} this was no ground to choose by: {always} was the best choice without a rule "
        f"({scores['always']:.1f} %), and a rule by saturation reached {scores['rule']:.1f} % on transfers that it was "
        "not made from.",
    ]
