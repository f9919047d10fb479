"""The card of the tuned adapter, once it was compared with its baselines."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tell_comparisons"]


def tell_comparisons(folder: Path, adapter: Path) -> None:
    """Write into the card of `adapter` how the run in `folder` compared it; nothing where it has no plan."""
    from inflection_fast.act.card import write_section
    from inflection_fast.decide import Plan
    from inflection_fast.report import folder as run_files
    from inflection_fast.report.verdict import compare

    if not (adapter / Plan.FILE).is_file():
        return
    run = run_files.read(folder, timeline=False)
    if run.tune is None:
        return
    unit = "nats" if run.tune.accuracy is None else "points of accuracy, one standard error"
    comparisons = [
        f"{each.stage.label}: {each.words} ({unit})" for each in (compare(run.tune, b) for b in run.baselines)
    ]
    write_section(adapter, Plan.from_pretrained(adapter), comparisons)
