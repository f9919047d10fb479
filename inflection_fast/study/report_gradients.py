"""Sections of the report on gradients, on the paper's claims, and on what the source's state says about the arms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from inflection_fast.study.advice import FAMILIES, LAST, LOST, RISE, Score, score_rule
from inflection_fast.study.analysis import compare
from inflection_fast.study.formatting import interval, mean, p_value, signed, table
from inflection_fast.study.results import Result, Results

__all__ = ["claims", "gradients", "regimes"]


def claims(results: Results, cells: Sequence[Result]) -> str:
    """What arXiv 2511.00797 says, as statements that these cells can contradict."""
    rows = [row for row in (_saturated(results), _suppressed(results), _restored(results), *_helped(cells)) if row]
    if not rows:
        return ""
    return "\n\n".join(
        [
            "## The claims of arXiv 2511.00797, tested here",
            "Lower blocks are the lower half. A statement counts as held where the 95 % interval lies on its side.",
            table(["statement", "here", "numbers"], rows),
        ]
    )


def _held(low: float, high: float, *, above: bool) -> str:
    if (low > 0) if above else (high < 0):
        return "held"
    return "the opposite held" if ((high < 0) if above else (low > 0)) else "did not hold here"


def _saturated(results: Results) -> list[str] | None:
    by_transfer: dict[str, dict[str, Any]] = defaultdict(dict)
    for source in results.shared["sources"].values():
        by_transfer[source["transfer"]][source["regime"]] = source["saturation"]["test"]
    pairs = [found for found in by_transfer.values() if {"under", "over"} <= found.keys()]
    if len(pairs) < 2:
        return None
    change = [100 * (pair["over"]["share_above_099"] - pair["under"]["share_above_099"]) for pair in pairs]
    low, high = _t_interval(change)
    under, over = (mean([100 * pair[regime]["share_above_099"] for pair in pairs]) for regime in ("under", "over"))
    return [
        "1a. Long training of the source saturates its output.",
        _held(low, high, above=True),
        f"share of test texts with a largest probability above 0.99: {under:.0f} % UNDER, {over:.0f} % OVER"
        f" ({len(pairs)} sources each, difference {signed(mean(change), 0)} [{signed(low, 0)}, {signed(high, 0)}])",
    ]


def _suppressed(results: Results) -> list[str] | None:
    """The activation gradient of the lower blocks against that of the last, OVER against UNDER, over transfers."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, choice in results.shared["choices"].items():
        transfer, regime, seed = name.rsplit("-", 2)
        if seed != "0":  # the seed of the search
            found[transfer][regime].append(_lower_share(choice["activation_grad"]))
    pairs = [mean(r["over"]) - mean(r["under"]) for r in found.values() if {"under", "over"} <= r.keys()]
    if len(pairs) < 2:
        return None
    low, high = _t_interval(pairs)
    return [
        "1b. A saturated source suppresses the gradient in lower blocks.",
        _held(low, high, above=False),
        "log of the activation gradient of the lower blocks over that of the last block, OVER minus UNDER:"
        f" {signed(mean(pairs))} [{signed(low)}, {signed(high)}] ({len(pairs)} transfers)",
    ]


def _lower_share(norms: Sequence[float | None]) -> float:
    logs = np.log([np.nan if x is None else x for x in norms])
    return float(np.nanmean(logs[: len(logs) // 2]) - logs[-1])


def _restored(results: Results) -> list[str] | None:
    """The same ratio at the end of training, planned LoRA against shallow unfreezing."""
    by_place: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for one in results.shared["gradients"].values():
        by_place[one["transfer"], one["regime"]][one["arm"]] = _lower_share(one["activation_grad"][-1])
    change = [
        found["greedy"] - found["shallow"] for found in by_place.values() if {"greedy", "shallow"} <= found.keys()
    ]
    if len(change) < 2:
        return None
    low, high = _t_interval(change)
    return [
        "2. Planned LoRA restores the gradient of lower blocks.",
        _held(low, high, above=True),
        "log of the activation gradient of the lower blocks over that of the last at the end of training, planned LoRA"
        f" minus shallow unfreezing: {signed(mean(change))} [{signed(low)}, {signed(high)}]"
        f" ({len(change)} transfers and regimes, one seed)",
    ]


def _helped(cells: Sequence[Result]) -> list[list[str]]:
    rows = []
    for number, regime, above, words in (
        ("3a", "over", True, "From an OVER source planned LoRA is ahead of shallow unfreezing."),
        ("3b", "under", False, "From an UNDER source it is behind."),
    ):
        effect = compare(cells, "greedy", "shallow", regime=regime)
        if effect is not None:
            held = _held(effect.low, effect.high, above=above)
            rows.append([f"{number}. {words}", held, f"{interval(effect)} points, p = {p_value(effect.p)}"])
    return rows


def _t_interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy import stats

    error = stats.sem(values)
    if error == 0:
        return values[0], values[0]
    low, high = stats.t.interval(0.95, len(values) - 1, float(np.mean(values)), error)
    return float(low), float(high)


def gradients(results: Results) -> str:
    """What the trainings that were measured all along show."""
    found = results.shared["gradients"]
    if not found:
        return ""
    rows = []
    for one in found.values():
        norms = [_lower_share(row) for row in one["activation_grad"]]
        change = [row for row in one["delta_cka"] if row[0] is not None]
        rows.append(
            [
                one["transfer"],
                one["regime"],
                f"`{one['arm']}` {one['layers']}",
                " / ".join(signed(norms[i]) for i in (0, len(norms) // 2, -1)),
                " ".join(f"{x:.3f}" for x in change[-1]) if change else "",
                " ".join(f"{100 * x:.0f}" for x in one["probes_before"]),
                " ".join(f"{100 * x:.0f}" for x in one["probes_after"]),
            ]
        )
    return "\n\n".join(
        [
            "## Gradients and features under every strategy",
            "One seed. Lower over last: the log of the activation gradient of the lower half of the blocks over that of"
            " the last, before, in the middle and at the end of training. Delta-CKA of every block at the end, against"
            " the features before training. Probe: accuracy of ridge regression on the mean output of every block,"
            " cross-validated on the validation texts, before and after training, in percent.",
            table(
                ["transfer", "regime", "arm and blocks", "lower over last", "delta-CKA", "probe before", "probe after"],
                rows,
            ),
        ]
    )


def regimes(results: Results, cells: Sequence[Result]) -> str:
    """Whether the saturation of the source tells which family of arms pays."""
    score = score_rule(cells)
    if score is None:
        return ""
    names = ", ".join(f"{family} (`{arm}`)" for family, arm in FAMILIES.items())
    verdict = (
        "The rule is worth following here."
        if score.better
        else f"So the saturation of the source is no ground to choose by here; {score.always} is."
    )
    parts = [f"{verdict} In short: {score.advice}"]
    probed = score_rule(cells, results.shared["probes"])
    if probed is not None:
        ahead = "is ahead of" if probed.better else "is not ahead of"
        parts += [
            "The same for a rule that may look at linear probes of the source model as well, on validation texts of the"
            f" target: at the accuracy of the {LAST}, at the {RISE}, or at the {LOST}. On transfers left out it reaches"
            f" {probed.means[0]:.2f} %, and {ahead} always one family ({probed.means[1]:.2f} %).",
            _folds(probed),
        ]
    return "\n\n".join(
        [
            "## Does the state of the source say what pays?",
            f"Families: {names}. The rule: a source whose mean largest probability on its own test texts lies above a"
            " threshold gets one family, the others another; threshold and families are those that are best on all"
            " transfers but one and are scored on that one, by mean accuracy, beside the family that is best on the"
            " others without any rule, and the best choice in hindsight.",
            _folds(score),
            *parts,
        ]
    )


def _folds(score: Score) -> str:
    rows = [[one.transfer, one.words, f"{one.rule:.2f}", f"{one.always:.2f}", f"{one.best:.2f}"] for one in score.folds]
    rows.append(["mean", "", *(f"{value:.2f}" for value in score.means)])
    return table(["left out", "rule from the others", "rule, %", "always one, %", "hindsight, %"], rows)
