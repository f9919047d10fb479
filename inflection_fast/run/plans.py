"""Plans from any timeline, plans brought into a run, and the baselines of a plan."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from inflection_fast.decide import Plan, SelectConfig, select
from inflection_fast.decide.select import baseline
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.folder import load_settings
from inflection_fast.timeline import Timeline

__all__ = ["adopt_plan", "baseline_plan", "compared_plan", "make_plan", "select_settings"]


def select_settings(folder: Path) -> dict[str, Any]:
    """The settings of the selection in a run folder; empty if the folder holds no run."""
    path = folder / "config.yaml"
    settings = load_settings(path).get("select") if path.is_file() else None
    return settings or {}


def make_plan(source: Path, config: SelectConfig, out: Path | None) -> tuple[Plan, Path]:
    """Choose layers from the timeline of a run folder, another folder or a file, and write the plan."""
    is_run = (source / "run.json").is_file()
    with user_errors(ValueError, FileNotFoundError):
        timeline = Timeline.load(source / "measure" if is_run else source)
    with user_errors(about="plan"):
        plan = select(timeline, config)
    path = out or (source if source.is_dir() else source.parent) / "plan.json"
    if is_run and path == source / "plan.json":
        _not_in_use(source, plan.layers, "write the new plan to another file with --out")
    plan.save(path)
    return plan, path


def adopt_plan(run: Path, path: Path) -> None:
    """Copy a plan into a run folder as the plan of that run."""
    with user_errors(ValueError, FileNotFoundError):
        plan = Plan.load(path)
    stored = run / "plan.json"
    if stored.is_file() and path.samefile(stored):
        return
    _not_in_use(run, plan.layers, "choose another output folder")
    plan.save(stored)


def _not_in_use(run: Path, layers: tuple[int, ...], instead: str) -> None:
    """UserError if models were trained on another plan: the report would show one plan and the models of another."""
    stored = run / "plan.json"
    if (run / "tune").is_dir() and stored.is_file() and Plan.load(stored).layers != layers:
        raise UserError(f"{run} holds a model trained on layers {list(Plan.load(stored).layers)}: {instead}")


def baseline_plan(plan: Plan, name: str, count: int, others: set[tuple[int, ...]], seed: int) -> tuple[Plan, int]:
    """A plan of `count` layers (or all) for the model of `plan`, chosen without the measurement; the number of draws.

    Random layers are drawn again while they are among `others`, with which they are compared, unless `others` holds
    every choice.
    """
    layers = plan.candidates
    draws, avoid = 1, others if name == "random" and math.comb(len(layers), count) > len(others) else set()
    while True:
        (found,) = baseline(name, count, layers, seed + draws - 1)
        if tuple(found.picks) not in avoid:
            break
        draws += 1
    config = {**plan.config, "method": name, "k": None if name == "all" else count, "seed": seed + draws - 1}
    chosen = dataclasses.replace(
        plan, layers=tuple(found.picks), reasons=found.picks, summary=found.words, config=config, found={}
    )
    return chosen, draws


def compared_plan(
    plan: Plan, chosen: tuple[int, ...], name: str, names: tuple[str, ...], seed: int
) -> tuple[Plan, int, str]:
    """The baseline `name` for the `chosen` layers: its plan, the number of draws, and its label.

    Random layers differ from the chosen ones, and from the first and last layers if `names` has those baselines.
    """
    others = {chosen}
    for other in {"first", "last"} & set(names):
        others.add(baseline_plan(plan, other, len(chosen), set(), seed)[0].layers)
    found, draws = baseline_plan(plan, name, len(chosen), others, seed)
    count = len(found.layers)
    which = {"all": "all", "random": f"{count} random"}.get(name, f"the {name} {count}")
    again = f" (draw {draws}: earlier draws were the layers of the plan or of another baseline)" if draws > 1 else ""
    return found, draws, f"LoRA on {which} layers{again}"
