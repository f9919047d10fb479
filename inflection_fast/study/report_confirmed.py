"""The section of the report on hypotheses that were tested on cells of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inflection_fast.study.analysis import compare, compare_within, holm, means
from inflection_fast.study.formatting import interval, p_value, table
from inflection_fast.study.report_sections import EVERYWHERE, RANDOM, better_and_worse
from inflection_fast.study.results import Result, Results

__all__ = ["confirmations"]


def confirmations(results: Results) -> str:
    """Each family of hypotheses, on its cells alone."""
    sections = [_family(name, _selected(results, family), family["arms"]) for name, family in _families(results)]
    sections = [section for section in sections if section]
    if not sections:
        return ""
    words = (
        "What the first cells suggested, tested on cells that were computed afterwards, of transfers or seeds that had"
        " no part in it. The hypotheses were written down before (`benchmarks/study/PREREGISTRATION.md`). The interval"
        " is that within transfers, and Holm's correction is over the arms of one table that have a corrected p."
    )
    return "\n\n".join(["## Confirmed on cells of their own?", words, *sections])


def _families(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return list(results.shared["confirmations"].items())


def _selected(results: Results, family: dict[str, Any]) -> list[Result]:
    transfers, seeds = family["transfers"], family["seeds"]
    cells = results.pooled() if transfers is None else [cell for cell in results.cells if cell.transfer in transfers]
    return [cell for cell in cells if seeds is None or cell.seed in seeds]


def _family(name: str, cells: Sequence[Result], tested: Sequence[str]) -> str:
    arms = [arm for arm in dict.fromkeys([*tested, *(cell.arm for cell in cells)]) if arm != RANDOM]
    effects = {arm: effect for arm in arms if (effect := compare_within(cells, arm, RANDOM)) is not None}
    if not any(arm in effects for arm in tested):
        return ""
    corrected = holm({arm: effects[arm] for arm in tested if arm in effects})
    rows = [
        [
            f"`{arm}`",
            "`random`",
            effect.clusters,
            f"{effect.smallest:.2f}",
            interval(effect),
            p_value(effect.p),
            p_value(corrected.get(arm)),
            interval(compare(cells, arm, RANDOM, by="transfer")),
        ]
        for arm, effect in effects.items()
    ]
    for arm in tested:
        effect = compare_within(cells, arm, EVERYWHERE)
        if effect is not None:
            wide = interval(compare(cells, arm, EVERYWHERE, by="transfer"))
            measured = [effect.clusters, f"{effect.smallest:.2f}", interval(effect), p_value(effect.p), "", wide]
            rows.append([f"`{arm}`", f"`{EVERYWHERE}`", *measured])
    transfers = list(dict.fromkeys(cell.transfer for cell in cells))
    apart = []
    for transfer in transfers:
        here = [cell for cell in cells if cell.transfer == transfer]
        base = means(here).get(RANDOM)
        differences = [interval(compare_within(here, arm, RANDOM), 1) for arm in effects]
        apart.append([transfer, "" if base is None else f"{base:.1f}", *differences])
    seeds = sorted({cell.seed for cell in cells})
    return "\n\n".join(
        [
            f"### {name.replace('_', ' ').capitalize()}",
            f"{len(cells)} cells: {len(transfers)} transfers, seeds {', '.join(map(str, seeds))}."
            f" {better_and_worse(effects, corrected)}",
            table(
                ["arm", "minus", "clusters", "smallest that could be seen", "difference, 95 %", "p", "p after Holm",
                 "95 %, whole transfers as clusters"],
                rows,
            ),
            table(["transfer", "random, %", *(f"`{arm}` minus random" for arm in effects)], apart),
        ]
    )  # fmt: skip
