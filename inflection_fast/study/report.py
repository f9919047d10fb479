"""The report of a study as a Markdown page with pictures, written from published cells alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from inflection_fast.run.folder import write_text
from inflection_fast.study.analysis import (
    CLOSE,
    Effect,
    compare,
    compare_all,
    compare_within,
    costs,
    holm,
    means,
    parameters,
)
from inflection_fast.study.drawings import draw_effects
from inflection_fast.study.formatting import interval, p_value, table
from inflection_fast.study.report_confirmed import confirmations
from inflection_fast.study.report_gradients import claims, gradients, regimes
from inflection_fast.study.report_sections import (
    EVERYWHERE,
    LEVEL,
    RANDOM,
    better_and_worse,
    blocks,
    by_transfer,
    how,
    interventions,
    leaking,
    pareto,
    selectors_of,
    stable,
)
from inflection_fast.study.results import Result, Results, read_results

__all__ = ["write"]

GOAL = 0.4  # half of the interval of planned minus random layers, in points, that the study aims at
MARGIN = 0.5  # points below LoRA everywhere that still count as reaching it


def write(folder: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Write the page and its pictures, and return the path of the page. FileNotFoundError where there are no cells."""
    results = read_results(folder)
    page = Path(folder) / "study.md" if out is None else Path(out)
    pictures = page.parent / f"{page.stem}_images"
    cells = results.pooled()
    sections = [
        "# Does it matter where LoRA goes?",
        _first_words(results, cells),
        _against_random(results, cells, pictures),
        _against_everywhere(results, cells, pictures),
        confirmations(results),
        _table(results, cells),
        by_transfer(cells),
        blocks(cells, pictures),
        stable(results, cells),
        claims(results, cells),
        gradients(results),
        interventions(cells),
        regimes(results, cells),
        pareto(cells, pictures),
        leaking(results),
        how(results, [*cells, *results.held_out()]),
    ]
    write_text(page, "\n\n".join(section for section in sections if section) + "\n")
    return page


def _first_words(results: Results, cells: Sequence[Result]) -> str:
    seeds = sorted({cell.seed for cell in cells})
    transfers = list(dict.fromkeys(cell.transfer for cell in cells))
    kept = len({cell.transfer for cell in results.held_out()})
    held_out = f" and {kept} that are held out" if kept else ""
    lines = [
        "This page is written by `inflection-fast study report` from the JSON files of the cells alone"
        " (`benchmarks/study/cells`). The questions and the configuration were written down before a reported seed ran"
        " (`benchmarks/study/PREREGISTRATION.md`).",
        f"{_count(len(results.cells), 'cell')} {'is' if len(results.cells) == 1 else 'are'} there:"
        f" {_count(len(transfers), 'transfer')}{held_out},"
        f" {_count(len({cell.regime for cell in cells}), 'regime')} of the source,"
        f" {_count(len(results.arms()), 'arm')}, {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
        + (f"; {len(results.failed)} cells failed" if results.failed else "")
        + ". Cells of one transfer, regime and seed train on the same texts in the same order from the same weights and"
        " are tested on the same texts, so that arms are compared text by text.",
    ]
    effect = compare(cells, "greedy", RANDOM)
    if effect is not None:
        half = (effect.high - effect.low) / 2
        within = compare_within(cells, "greedy", RANDOM)
        lines.append(
            f"**The smallest difference that the comparison of planned with random layers could have seen is"
            f" {effect.smallest:.2f} points** (with a probability of 0.8, at 5 %;"
            f" {effect.clusters} clusters of transfer and seed, {effect.texts} texts). **Planned minus random layers at"
            f" equal parameters: {interval(effect)} points, p = {p_value(effect.p)}** (± {half:.2f})."
            f" {_verdict(effect)}"
            + (
                f" Within these transfers, without the differences between them: {interval(within)}"
                f" (± {(within.high - within.low) / 2:.2f})."
                if within is not None
                else ""
            )
            + (
                f" At the first spread ± {GOAL} would take about {effect.clusters * (half / GOAL) ** 2:.0f} clusters."
                if half > GOAL
                else ""
            )
        )
    return "\n\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _verdict(effect: Effect) -> str:
    if effect.low > 0:
        return "The planned layers were better places than random ones."
    if effect.high < 0:
        return "The planned layers were worse places than random ones."
    return "These cells do not show which of the two is better."


def _against_random(results: Results, cells: Sequence[Result], pictures: Path) -> str:
    effects = compare_all(cells, selectors_of(cells), RANDOM)
    if not effects:
        return ""
    corrected = holm(effects)
    draw_effects(effects, "Minus random layers, at equal parameters", pictures / "against_random.png")
    rows = []
    for arm in sorted(effects, key=lambda arm: -effects[arm].difference):
        wide = compare(cells, arm, RANDOM, by="transfer")
        rows.append(
            [
                f"`{arm}`",
                f"{effects[arm].smallest:.2f}",
                interval(effects[arm]),
                p_value(effects[arm].p),
                p_value(corrected[arm]),
                interval(compare_within(cells, arm, RANDOM)),
                _short(effects[arm], corrected[arm], len(effects)),
                interval(wide),
                _marked(cells, arm),
            ]
        )
    words = (
        f"{better_and_worse(effects, corrected)} For the others the difference is not significant."
        " What an arm is short of: the points"
        " by which it misses being better, at its standard error, corrected for all arms (Bonferroni). Within"
        " transfers: the variance of seeds within each transfer alone. Differences between transfers widen the other"
        " two intervals; the first was named beforehand, and p belongs to it."
    )
    return "\n\n".join(
        [
            "## Selectors against random layers, at equal parameters",
            words,
            table(
                [
                    "arm", "smallest that could be seen", "minus random, 95 % (by seed)", "p", "p after Holm",
                    "95 %, within transfers", f"short of p < {LEVEL}", "95 %, whole transfers as clusters",
                    "parameters",
                ],
                rows,
            ),
            f"![differences]({pictures.name}/against_random.png)",
        ]
    )  # fmt: skip


def _short(effect: Effect, corrected: float, tests: int) -> str:
    """By how many points an arm misses being better than random layers, at the present standard error."""
    if effect.difference > 0 and corrected < LEVEL:
        return "reached"
    return f"{effect.needed(LEVEL, tests) - effect.difference:.2f}"


def _marked(cells: Sequence[Result], arm: str) -> str:
    """Whether an arm has as many parameters as random layers, in words."""
    low, high = parameters(cells, arm)
    base = parameters(cells, RANDOM)[1]
    apart = max(abs(low - base), abs(high - base)) / base
    return "equal" if apart <= CLOSE else f"not equal: {100 * apart:.0f} % apart"


def _against_everywhere(results: Results, cells: Sequence[Result], pictures: Path) -> str:
    arms = [arm for arm in [*selectors_of(cells), RANDOM, "all_equal"] if arm in results.arms(cells)]
    effects = compare_all(cells, arms, EVERYWHERE)
    if not effects:
        return ""
    base = parameters(cells, EVERYWHERE)[1]
    rows = []
    for arm in sorted(effects, key=lambda arm: -effects[arm].difference):
        effect = effects[arm]
        reached = "yes" if effect.low > -MARGIN else f"short by up to {-effect.low:.2f}"
        rows.append(
            [
                f"`{arm}`",
                f"{100 * parameters(cells, arm)[1] / base:.0f} %",
                f"{effect.smallest:.2f}",
                interval(effect),
                reached,
            ]
        )
    draw_effects(effects, "Minus LoRA everywhere, which has more parameters", pictures / "against_all.png")
    return "\n\n".join(
        [
            "## Against LoRA everywhere",
            f"LoRA everywhere (`all`) has {base} parameters outside of the head. An arm reaches it where the interval"
            f" of its difference lies above −{MARGIN} points.",
            table(["arm", "parameters", "smallest that could be seen", "minus `all`, 95 %", "reaches it"], rows),
            f"![differences]({pictures.name}/against_all.png)",
        ]
    )


def _table(results: Results, cells: Sequence[Result]) -> str:
    accuracy = means(cells)
    rows = []
    for arm in sorted(accuracy, key=lambda arm: -accuracy[arm]):
        spent = costs(cells, arm)
        low, high = parameters(cells, arm)
        effect = compare(cells, arm, RANDOM) if arm != RANDOM else None
        rows.append(
            [
                f"`{arm}`",
                sum(cell.arm == arm for cell in cells),
                f"{accuracy[arm]:.2f}",
                "" if arm == RANDOM else interval(effect),
                str(low) if low == high else f"{low} to {high}",
                f"{spent['train_cpu_s']:.1f}",
                f"{spent['choose_steps']:.0f} steps, {spent['choose_cpu_s']:.1f} s",
                f"{spent['step_bytes'] / 1e6:.1f}",
                f"{spent['forgotten']:.1f}",
            ]
        )
    return "\n\n".join(
        [
            "## All arms",
            "Accuracy is the mean over transfers and regimes of the cells that are there; arms with fewer cells are"
            " compared in the column of differences only. Forgotten: points of accuracy on the source's own test texts"
            " that the training on the target cost. A step keeps: tensors saved for the backward pass, gradients and"
            " optimizer states. Times are processor seconds of one thread.",
            table(
                ["arm", "cells", "accuracy, %", "minus random, 95 %", "parameters", "training, s", "choosing",
                 "a step keeps, MB", "forgotten, points"],
                rows,
            ),
        ]
    )  # fmt: skip
