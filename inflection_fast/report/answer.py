"""The first three lines of the page: verdict, reason, next step."""

from __future__ import annotations

from dataclasses import dataclass

from inflection_fast.alerts import alert_lines
from inflection_fast.report.content import Content
from inflection_fast.report.folder import Stage
from inflection_fast.report.verdict import compare, verdict
from inflection_fast.report.words import count, layer_list

__all__ = ["Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """Three sentences of plain text, and the next command for the terminal, if there is one."""

    verdict: str
    why: str
    next: str
    command: str | None = None


def answer(content: Content) -> Answer:
    """The answer of the run in its present state."""
    run, measured = content.run, content.measured
    where = str(content.folder)
    if run.tune is not None and run.tune.layers:
        return _compared(content, run.tune, where)
    if measured is None or not len(measured.steps):
        state = "The timeline has no measured step yet." if measured else "There is no timeline yet."
        return Answer(
            "Nothing has been measured yet.", state, "Let the training run; this page follows it:",
            f"inflection-fast watch {where}",
        )  # fmt: skip
    if run.plan is not None:
        chosen = f"Chosen for LoRA: {layer_list(run.plan.layers)}." if run.plan.layers else "No layer was chosen."
        return Answer(
            f"{chosen} {_alarms(content)}", run.plan.summary,
            "Train with LoRA in the chosen layers and compare, or in your own code: inject(model, Plan.load(...)).",
            f"inflection-fast tune --config {where}/config.yaml" if run.config else None,
        )  # fmt: skip
    first, last = measured.steps[0], measured.steps[-1]
    period = f"{count(len(measured.steps))} measured steps, from step {count(first)} to {count(last)}, "
    period += f"of {len(measured.layers)} layers."
    if content.alerts_in_all:
        lines = alert_lines(content.alerts)
        return Answer(
            _alarms(content), f"First: {lines[0]} In all: {period}",
            "Look at that layer around that step, on the page or in the report.",
        )  # fmt: skip
    return Answer(
        _alarms(content), f"No rule of the alerts holds anywhere in {period}", "Choose layers from what was measured:",
        f"inflection-fast plan {where}",
    )  # fmt: skip


def _compared(content: Content, tune: Stage, where: str) -> Answer:
    run = content.run
    first = verdict(run)[0]
    comparisons = [compare(tune, stage) for stage in run.baselines]
    words = "; ".join(f"against {each.stage.label} {each.words}" for each in comparisons)
    unit = "nats" if tune.accuracy is None else "points of accuracy with one standard error"
    said = f"{words} ({unit})" if words else "there is no baseline to compare with"
    why = f"LoRA in {layer_list(tune.layers or ())}: {said}."
    seeds = "One seed cannot tell how much the training moves by chance: repeat with another seed."
    again = f"inflection-fast run --config {where}/config.yaml --seed {(run.seed or 0) + 1} --output {where}-again"
    return Answer(first, why, seeds, again if run.config else None)


def _alarms(content: Content) -> str:
    if not content.alerts_in_all:
        return "No alert was raised."
    kinds = sorted({alert.kind.replace("_", " ") for alert in content.alerts})
    number = content.alerts_in_all
    return f"{count(number)} alert{'s' * (number > 1)} {'were' if number > 1 else 'was'} raised: {', '.join(kinds)}."
