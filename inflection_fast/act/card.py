"""The section about the plan in the README of an adapter: layers, reasons, measurement and comparisons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..atomic import write_text
from ..decide import Plan

__all__ = ["CARD", "section_of", "write_section"]

CARD = "README.md"
_BEGIN, _END = "<!-- inflection_fast:begin -->", "<!-- inflection_fast:end -->"
_SETTINGS = ("method", "window", "alpha", "k", "normalisation", "cliff", "stack")


def write_section(folder: str | os.PathLike, plan: Plan, comparisons: Sequence[str] = ()) -> None:
    """Write the section about a plan into the card in `folder`, in place of an earlier section.

    Several adapters in one folder share one section, that of the last. Without a card, one is made.
    """
    path = Path(folder) / CARD
    text = path.read_text("utf-8") if path.exists() else ""
    before, found, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if found else ""
    section = f"{_BEGIN}\n{section_of(plan, comparisons)}{_END}"
    write_text(path, f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip("\n"))


def section_of(plan: Plan, comparisons: Sequence[str] = ()) -> str:
    """Markdown: the layers with reasons, the measurement, the rule, and each of `comparisons` as a line."""
    names = plan.model["layers"]
    lines = ["## Where the adapters are, and why", "", plan.summary, ""]
    lines += ["| layer | module | reason |", "|---|---|---|"]
    lines += [f"| {layer} | `{names[layer]}` | {_cell(plan.reasons[layer])} |" for layer in plan.layers]
    lines += ["", f"Layers are counted from 0. They were chosen from {len(plan.candidates)} layers."]
    done = [str(action["words"]) for action in plan.actions if action.get("words")]
    lines += [f"What was done there: {' '.join(done)}", ""] if done else [""]
    settings = [f"{name} {plan.config[name]}" for name in _SETTINGS if plan.config.get(name) is not None]
    measured = ", ".join(name.replace("_", " ") for name in plan.profile) or "nothing"
    lines += [
        "### How it was measured",
        "",
        f"By [inflection_fast](https://pypi.org/project/inflection-fast), in a training of a model of type"
        f" {plan.model.get('model_type') or plan.model.get('class') or 'unknown'}: {measured}, by layer.",
        f"Chosen by: {', '.join(settings)}. All numbers are in `{Plan.FILE}`.",
        "",
        "### Against which baselines",
        "",
    ]
    lines += [f"- {line}" for line in comparisons] or [
        "None were recorded: these layers were not compared with equally many others, so a gain from their choice is"
        " not known."
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
