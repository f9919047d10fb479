"""Making a plan alone, from any timeline, bringing one into a run, and the layers that a plan is compared with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from inflection_fast.decide import Plan, SelectConfig, select
from inflection_fast.decide.baselines import baseline
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.folder import load_settings
from inflection_fast.timeline import Timeline

__all__ = ["adopt_plan", "baseline_plan", "compared_plan", "make_plan", "select_settings"]


def select_settings(folder: Path) -> dict[str, Any]:
    """The settings of the selection that a run folder was made with; none where the folder holds no run."""
    path = folder / "config.yaml"
    settings = load_settings(path).get("select") if path.is_file() else None
    return settings or {}


def make_plan(source: Path, config: SelectConfig, out: Path | None) -> tuple[Plan, Path]:
    """Chooses layers from the timeline of a run folder, another folder or a file, and writes the plan."""
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
    """Makes a plan from elsewhere the plan of a run."""
    with user_errors(ValueError, FileNotFoundError):
        plan = Plan.load(path)
    stored = run / "plan.json"
    if stored.is_file() and path.samefile(stored):
        return
    _not_in_use(run, plan.layers, "choose another output folder")
    plan.save(stored)


def _not_in_use(run: Path, layers: tuple[int, ...], instead: str) -> None:
    """Refuses to change a plan that models were trained on: the report would then show one plan and other models."""
    stored = run / "plan.json"
    if (run / "tune").is_dir() and stored.is_file() and Plan.load(stored).layers != layers:
        raise UserError(f"{run} holds a model trained on layers {list(Plan.load(stored).layers)}: {instead}")


def baseline_plan(plan: Plan, name: str, count: int, others: set[tuple[int, ...]], seed: int) -> tuple[Plan, int]:
    """A plan of `count` layers (or all of them) for the model of `plan`, and how many draws it took.

    It does not look at what was measured. Random layers are drawn again where they are those of `others`, with which
    they are to be compared, unless there are no more choices than that.
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
    """The layers that the `chosen` are compared with under `name`, how many draws they took, and what to call them.

    Random layers differ from the chosen ones, and from the first and last where `names` has those, too.
    """
    others = {chosen}
    for other in {"first", "last"} & set(names):
        others.add(baseline_plan(plan, other, len(chosen), set(), seed)[0].layers)
    found, draws = baseline_plan(plan, name, len(chosen), others, seed)
    count = len(found.layers)
    which = {"all": "all", "random": f"{count} random"}.get(name, f"the {name} {count}")
    again = f" (draw {draws}: the ones before it were layers of the plan or of another baseline)"
    return found, draws, f"LoRA on {which} layers{again if draws > 1 else ''}"
