"""Sections of the report: by transfer, by block, stability, cost, the leaking variant, and how it was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inflection_fast.study.analysis import (
    Effect,
    block_effects,
    compare,
    compare_all,
    expected_jaccard,
    holm,
    jaccard,
    means,
    stability,
)
from inflection_fast.study.drawings import draw_blocks, draw_pareto
from inflection_fast.study.formatting import interval, mean, names, p_value, signed, table
from inflection_fast.study.results import Result, Results

__all__ = [
    "EVERYWHERE",
    "LEVEL",
    "RANDOM",
    "better_and_worse",
    "blocks",
    "by_transfer",
    "how",
    "interventions",
    "leaking",
    "pareto",
    "selectors_of",
    "stable",
]

# Arms that choose where LoRA goes, and are compared with random layers in one family of tests.
SELECTORS = ("greedy", "maxima", "top", "first", "last", "even", "kappa", "spectrum", "eva", "gradient_high",
             "gradient_low", "auto_rgn", "block_cka", "breakpoints", "first_order", "trial_norm",
             "trial_sensitivity", "halving")  # fmt: skip
RANDOM, EVERYWHERE, PLANNED, WHOLE = "random", "all", "greedy", "blocks"
LEVEL = 0.01
# What trains a part of the model, or at other rates, beside the arm that trains everything.
SCHEDULES = {WHOLE: "full", "lisa": "full", "full_rates": "full"}


def selectors_of(cells: Sequence[Result]) -> list[str]:
    """Arms that choose where LoRA goes: our own in their order, then those of users."""
    present = {cell.arm for cell in cells}
    known = {cell.arm for cell in cells if cell.content["run_info"]["peft_config"]["kind"] == "lora"}
    extra = sorted(known - {*SELECTORS, RANDOM, EVERYWHERE, "all_equal", *_intervened(cells)})  # arms of users
    return [arm for arm in SELECTORS if arm in present] + extra


def better_and_worse(effects: Mapping[str, Effect], corrected: Mapping[str, float]) -> str:
    """Which arms differ from random layers after Holm's correction, in two sentences."""
    sure = {arm: effects[arm].difference for arm, p in corrected.items() if p < LEVEL}
    better, worse = ([arm for arm, found in sure.items() if sign * found > 0] for sign in (1, -1))
    return f"Better than random layers at p < {LEVEL} after Holm: {names(better)}. Worse: {names(worse)}."


def _intervened(cells: Sequence[Result]) -> dict[str, str]:
    """Arms that act on the planned blocks beside training them, and the arm without that."""
    configs = {cell.arm: cell.content["run_info"]["peft_config"] for cell in cells}
    acting = {arm: config["kind"] for arm, config in configs.items() if "intervention" in config.get("options", {})}
    return {arm: kind if kind == WHOLE else PLANNED for arm, kind in acting.items()}


def interventions(cells: Sequence[Result]) -> str:
    """Each intervention beside the same training without it."""
    present = {cell.arm for cell in cells}
    beside = _intervened(cells) | {arm: other for arm, other in SCHEDULES.items() if arm in present}
    effects = {arm: effect for arm, other in beside.items() for _, effect in compare_all(cells, [arm], other).items()}
    if not effects:
        return ""
    corrected = holm(effects)
    regimes = list(dict.fromkeys(cell.regime for cell in cells))
    rows = []
    for arm, effect in sorted(effects.items(), key=lambda item: -item[1].difference):
        apart = [interval(compare(cells, arm, beside[arm], regime=regime)) for regime in regimes]
        places = {(c.transfer, c.regime, c.seed) for c in cells if c.arm == arm}
        p = [p_value(effect.p), p_value(corrected[arm])]
        rows.append(
            [f"`{arm}`", f"`{beside[arm]}`", len(places), f"{effect.smallest:.2f}", interval(effect), *p, *apart]
        )
    header = ["arm", "without", "cells", "smallest that could be seen", "difference, 95 %", "p", "p after Holm"]
    return "\n\n".join(
        [
            "## Interventions",
            "The same training with and without an intervention (docs/interventions.md): adapters on the planned"
            f" blocks (`{PLANNED}`), these blocks trained whole (`{WHOLE}`), or everything trained (`full`)."
            " What they do to the gradients stands in the section on gradients.",
            table([*header, *(f"{regime.upper()} alone" for regime in regimes)], rows),
        ]
    )


def by_transfer(cells: Sequence[Result]) -> str:
    """Differences from random layers for each transfer and regime."""
    arms = [arm for arm in ("greedy", "last", "first", EVERYWHERE) if any(cell.arm == arm for cell in cells)]
    rows = []
    for transfer in dict.fromkeys(cell.transfer for cell in cells):
        selected = [cell for cell in cells if cell.transfer == transfer]
        for regime in dict.fromkeys(cell.regime for cell in selected):
            here = [cell for cell in selected if cell.regime == regime and cell.arm == RANDOM]
            if not here:
                continue
            base = means(here)[RANDOM]
            source = here[0].content["meta_info"]["dataset_info"]["source_training"]
            sure = source["saturation"]["test"]
            row = [transfer, regime, f"{base:.1f}", f"{100 * sure['share_above_099']:.0f} %"]
            rows.append([*row, *(interval(compare(selected, arm, RANDOM, regime=regime), 1) for arm in arms)])
    if not rows:
        return ""
    pooled = []
    for regime in dict.fromkeys(cell.regime for cell in cells):
        row = ["pooled", regime, "", ""]
        pooled.append([*row, *(interval(compare(cells, arm, RANDOM, regime=regime), 1) for arm in arms)])
    header = ["transfer", "regime", "random, %", "source above 0.99", *(f"`{arm}` minus random" for arm in arms)]
    return "\n\n".join(
        [
            "## By transfer and regime",
            "Intervals of one transfer rest on as many clusters as there are seeds, and are wide for that reason.",
            table(header, [*rows, *pooled]),
        ]
    )


def blocks(cells: Sequence[Result], pictures: Path) -> str:
    """What each block is worth, from the random layers."""
    effects = block_effects(cells)
    if not effects:
        return ""
    draw_blocks(effects, pictures / "blocks.png")
    worth = sorted((value for _, value, _, _ in effects), reverse=True)
    count = len(effects)
    k = max(len(cell.layers) for cell in cells if cell.arm == RANDOM)
    gain = sum(worth[:k])
    rows = [[block, signed(value), f"[{signed(low)}, {signed(high)}]"] for block, value, low, high in effects]
    return "\n\n".join(
        [
            "## What a block is worth",
            "From the random layers alone: least squares of the accuracy on which blocks were drawn, within one"
            f" transfer, regime and seed. The best {k} of {count} blocks by these values are worth {signed(gain)}"
            " points over a random draw, if blocks add up and the same ones are best everywhere: that is what a fixed"
            " choice could win, and it is estimated from the same cells, so it is too high rather than too low.",
            table(["block", "points", "95 %"], rows),
            f"![blocks]({pictures.name}/blocks.png)",
        ]
    )


def stable(results: Results, cells: Sequence[Result]) -> str:
    """How much choices agree over seeds and over the options of the selectors."""
    rows = []
    for arm in selectors_of(cells):
        selected = [cell for cell in cells if cell.arm == arm]
        common = dict.fromkeys(cell.layers for cell in selected)
        often = max(common, key=lambda layers: sum(cell.layers == layers for cell in selected))
        share = sum(cell.layers == often for cell in selected) / len(selected)
        value = stability(cells, arm)
        rows.append([f"`{arm}`", "" if value != value else f"{value:.2f}", f"{list(often)} ({100 * share:.0f} %)"])
    if not rows:
        return ""
    parts = [
        "## How stable a choice is",
        "Jaccard similarity of the blocks that an arm chooses for the same transfer and regime over seeds (1: always"
        " the same; two random draws of three out of six blocks: "
        f"{expected_jaccard(3, 6):.2f}), and the blocks it chooses most often.",
        table(["arm", "Jaccard over seeds", "most often"], rows),
    ]
    choices = [choice for name, choice in results.shared["choices"].items() if not name.endswith("-0")]
    if choices:
        alphas, windows = choices[0]["top"], choices[0]["greedy"]
        over_alpha = [jaccard([choice["top"][a] for a in alphas]) for choice in choices]
        half = "0.5"
        by_alpha = [[a, f"{mean([jaccard([c['top'][half], c['top'][a]]) for c in choices]):.2f}"] for a in alphas]
        by_window = [[w, f"{mean([len(c['greedy'][w]) for c in choices]):.1f}"] for w in windows]
        empty = sum(not choice["greedy"]["1"] for choice in choices)
        parts += [
            f"Over the weight `alpha` of the entropy in SKI, from 0 to 1, the three best blocks of one measurement"
            f" agree by {mean(over_alpha):.2f} on average over all pairs ({len(choices)} measurements). With `alpha`"
            " = 0.5 they agree as follows.",
            table(["alpha", "Jaccard with alpha 0.5"], by_alpha),
            f"`greedy` found nothing significant in {empty} of {len(choices)} measurements (the arm then takes the"
            " three best blocks by SKI). Blocks chosen by window:",
            table(["window", "blocks chosen, mean"], by_window),
        ]
    return "\n\n".join(parts)


def pareto(cells: Sequence[Result], pictures: Path) -> str:
    """Accuracy against parameters, time and memory."""
    places = {(c.transfer, c.regime, c.seed) for c in cells}
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    have = {arm: {(c.transfer, c.regime, c.seed) for c in cells if c.arm == arm} for arm in arms}
    usual = max(len(found) for found in have.values())
    arms = [arm for arm in arms if len(have[arm]) * 4 >= usual]
    shared = set.intersection(places, *(have[arm] for arm in arms))
    selected = [c for c in cells if (c.transfer, c.regime, c.seed) in shared and c.arm in arms]
    if not selected:
        return ""
    draw_pareto(selected, arms, pictures / "pareto.png")
    return "\n\n".join(
        [
            "## Accuracy against cost",
            f"Over the {len(shared)} places (transfer, regime and seed) where all {len(arms)} arms of the picture are."
            " The line joins the arms that no other arm beats at less cost.",
            f"![accuracy against cost]({pictures.name}/pareto.png)",
        ]
    )


def leaking(results: Results) -> str:
    """The cells whose source holds texts of the target, apart from all others."""
    leaking = [cell for cell in results.cells if cell.leaking]
    if not leaking:
        return ""
    rows = []
    for transfer in dict.fromkeys(cell.transfer for cell in leaking):
        selected = [cell for cell in leaking if cell.transfer == transfer]
        accuracy = means(selected)
        rows += [
            [transfer, f"`{arm}`", f"{accuracy[arm]:.1f}", interval(compare(selected, arm, RANDOM))] for arm in accuracy
        ]
    return "\n\n".join(
        [
            "## Leaking variant, as published",
            "The source holds texts of the target. These cells are in no number above.",
            table(["transfer", "arm", "accuracy, %", "minus random, 95 %"], rows),
        ]
    )


def how(results: Results, cells: Sequence[Result]) -> str:
    """Model, texts, learning rates, and failed cells."""
    run, meta = cells[0].content["run_info"]["train_config"], cells[0].content["meta_info"]
    data = [[c.transfer, c.content["meta_info"]["dataset_info"]] for c in cells]
    rows = []
    for transfer, facts in {name: facts for name, facts in data}.items():
        dropped = "; ".join(f"{count} {why}" for why, count in facts["dropped"].items())
        rows.append([transfer, facts["source"]["texts"], facts["target"]["texts"], dropped])
    rates = [
        [
            f"`{found['arm']}`",
            found["regime"],
            *(f"{row['learning_rate']:g}: {row['loss']:.3f}" for row in found["tried"]),
            f"{found['learning_rate']:g}{_at_an_end(found)}",
        ]
        for found in results.shared["rates"].values()
    ]
    near = data[0][1]["near_duplicates"]
    parts = [
        "## How it was done",
        f"Model {meta['model_info']['path']} on {meta['system_info']['processor']}; {run['steps']} steps of"
        f" {run['batch_size']} texts of at most {run['max_length']} tokens, forward passes in {run['precision']},"
        " AdamW. Sources are trained by full fine-tuning once for each transfer and regime and shared by all cells."
        " Every seed draws its own training and test texts. Arms that chose the same blocks at the same learning rate"
        " share one training.",
        "Texts that are equal after normalisation count once and never stand on both sides"
        + (f", nor do texts whose sets of five letters overlap by {near:g} (MinHash, then exact)" if near else "")
        + ".",
        table(["transfer", "source texts", "target texts", "dropped"], rows),
    ]
    if rates:
        width = max(len(row) for row in rates)
        parts += [
            "The learning rates that were tried, with the mean validation loss, and the one taken: by a seed that is"
            " not reported, on texts that no reported cell trains on or is tested on. A rate at an end of those"
            " that were tried may not be the best there is.",
            table(
                ["arm", "regime", *[""] * (width - 3), "taken"],
                [[*row[:-1], *[""] * (width - len(row)), row[-1]] for row in rates],
            ),
        ]
    if results.failed:
        parts += ["Cells that failed:", table(["cell", "error"], results.failed)]
    return "\n\n".join(parts)


def _at_an_end(found: dict[str, Any]) -> str:
    """Says where the best learning rate is the smallest or largest of those tried."""
    tried = [row["learning_rate"] for row in found["tried"]]
    if found["learning_rate"] == max(tried):
        return ", the largest"
    return ", the smallest" if found["learning_rate"] == min(tried) else ""
