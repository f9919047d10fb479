"""What the cells say: paired differences, text by text, with intervals from SciPy and statsmodels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from inflection_fast.study.results import Result

__all__ = [
    "CLOSE",
    "Effect",
    "block_effects",
    "compare",
    "compare_all",
    "compare_within",
    "costs",
    "expected_jaccard",
    "holm",
    "jaccard",
    "means",
    "parameters",
    "stability",
]

CLOSE = 0.03  # arms whose parameters differ by less are compared at equal parameters
POWER = 0.8


@dataclass(frozen=True)
class Effect:
    """The mean difference between two arms, in points of accuracy, pooled or of one transfer.

    Args:
        difference: first arm minus second
        low: lower end of the 95 % interval
        high: upper end
        p: two-sided
        clusters: of the interval: transfers and seeds, or whole transfers
        texts: compared text by text
        error: standard error of the difference, in points
        freedom: degrees of freedom of Student's t
    """

    difference: float
    low: float
    high: float
    p: float
    clusters: int
    texts: int
    error: float
    freedom: float

    @property
    def smallest(self) -> float:
        """The difference that this design finds with a probability of 0.8 at the level of 0.05, in points."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom) + t.ppf(POWER, self.freedom)) * self.error

    def needed(self, level: float, tests: int) -> float:
        """The difference that is significant at `level` however Holm orders so many tests (Bonferroni), in points."""
        from scipy.stats import t

        return float(t.isf(level / tests / 2, self.freedom)) * self.error


def compare(
    cells: Sequence[Result], arm: str, other: str, *, by: str = "seed", regime: str | None = None
) -> Effect | None:
    """`arm` minus `other`, wherever both are; None where they share fewer than two clusters.

    For every text of a cell the difference is 1, 0 or -1; of an arm that draws, the mean over its draws is taken. Every
    transfer has the same weight. The errors are clustered by transfer and seed (`by` "seed") or by transfer, and the
    interval uses Student's t with one degree of freedom less than there are clusters (statsmodels' WLS with
    `cov_type="cluster"`, whose small-sample factor is G / (G - 1)).
    """
    import statsmodels.api as sm

    first, second = _rights(cells, arm, regime), _rights(cells, other, regime)
    values, transfers, clusters = [], [], []
    for place in sorted(first.keys() & second.keys()):
        transfer, _, seed = place
        difference = first[place] - second[place]
        values.append(difference)
        transfers += [transfer] * len(difference)
        clusters += [transfer if by == "transfer" else f"{transfer} {seed}"] * len(difference)
    names, numbers = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        return None
    difference = np.concatenate(values)
    _, which, sizes = np.unique(transfers, return_inverse=True, return_counts=True)
    model = sm.WLS(difference, np.ones(len(difference)), weights=1 / sizes[which])
    if not difference.any():  # the same trainings: no variance to estimate
        return _no_difference(len(names), len(difference))
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": numbers}, use_t=True)
    low, high = fit.conf_int()[0]
    found, low, high, error = (100 * float(x) for x in (fit.params[0], low, high, fit.bse[0]))
    return Effect(found, low, high, float(fit.pvalues[0]), len(names), len(difference), error, len(names) - 1)


def compare_within(cells: Sequence[Result], arm: str, other: str, *, regime: str | None = None) -> Effect | None:
    """`arm` minus `other`, with the variance of seeds within each transfer; it speaks of these transfers alone.

    One observation is the mean difference of a transfer and seed, over texts and regimes. Every transfer has the same
    weight. Least squares on a constant for every transfer with HC2 errors (statsmodels), which in this design are
    s_t**2 / n_t of each transfer t; degrees of freedom by Satterthwaite (1946). None where nothing is shared, or a
    transfer shares fewer than two seeds.
    """
    import statsmodels.api as sm
    from scipy.stats import t

    first, second = _rights(cells, arm, regime), _rights(cells, other, regime)
    shared: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for transfer, where, seed in sorted(first.keys() & second.keys()):
        shared[transfer, seed].append(first[transfer, where, seed] - second[transfer, where, seed])
    values = np.array([100 * np.concatenate(found).mean() for found in shared.values()])
    texts = sum(len(one) for found in shared.values() for one in found)
    names, which, seeds = np.unique([transfer for transfer, _ in shared], return_inverse=True, return_counts=True)
    if not len(names) or seeds.min() < 2:
        return None
    if not values.any():
        return _no_difference(len(values), texts)
    constants = np.equal.outer(which, np.arange(len(names))).astype(float)
    fit = sm.OLS(values, constants).fit(cov_type="HC2")
    mean = fit.t_test(np.full(len(names), 1 / len(names)))
    found, error = float(mean.effect[0]), float(mean.sd[0, 0])
    variances = fit.bse**2
    if not variances.any():
        return None  # every seed has the same difference: no variance to estimate
    freedom = float(variances.sum() ** 2 / (variances**2 / (seeds - 1)).sum())
    half = float(t.ppf(0.975, freedom)) * error
    p = float(2 * t.sf(abs(found) / error, freedom))
    return Effect(found, found - half, found + half, p, len(values), texts, error, freedom)


def _no_difference(clusters: int, texts: int) -> Effect:
    """The same trainings: there is no variance to estimate."""
    return Effect(0.0, 0.0, 0.0, 1.0, clusters, texts, 0.0, max(clusters - 1, 1))


def _rights(cells: Sequence[Result], arm: str, regime: str | None) -> dict[tuple[str, str, int], np.ndarray]:
    """Transfer, regime and seed -> right or wrong for every text, the mean over draws [N]."""
    drawn = defaultdict(list)
    for cell in cells:
        if cell.arm == arm and regime in (None, cell.regime):
            drawn[cell.transfer, cell.regime, cell.seed].append(cell.right.astype(float))
    return {place: np.mean(rights, axis=0) for place, rights in drawn.items()}


def compare_all(cells: Sequence[Result], arms: Sequence[str], other: str) -> dict[str, Effect]:
    """`compare` of several arms with one; those that share fewer than two clusters with it are left out."""
    found = {arm: compare(cells, arm, other) for arm in arms}
    return {arm: effect for arm, effect in found.items() if effect is not None}


def holm(effects: Mapping[str, Effect]) -> dict[str, float]:
    """The p of every comparison after Holm's correction over all of them."""
    from statsmodels.stats.multitest import multipletests

    present = {name: effect.p for name, effect in effects.items()}
    if not present:
        return {}
    corrected = multipletests(list(present.values()), method="holm")[1]
    return dict(zip(present, map(float, corrected), strict=True))


def means(cells: Sequence[Result]) -> dict[str, float]:
    """Mean accuracy of each arm in percent, every transfer and regime weighing the same."""
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        found[cell.arm][cell.transfer, cell.regime].append(cell.accuracy)
    return {arm: 100 * float(np.mean([np.mean(v) for v in places.values()])) for arm, places in found.items()}


def parameters(cells: Sequence[Result], arm: str) -> tuple[int, int]:
    """Smallest and largest number of trained parameters outside of the head."""
    counts = [cell.content["train_info"]["num_adapter_params"] for cell in cells if cell.arm == arm]
    return min(counts), max(counts)


def costs(cells: Sequence[Result], arm: str) -> dict[str, float]:
    """Means over the cells of an arm: seconds of training and of choosing, steps of choosing, bytes of a step."""
    selected = [cell for cell in cells if cell.arm == arm]
    chosen = [cell.content["run_info"]["selection"]["cost"] for cell in selected]
    return {
        "train_cpu_s": float(np.mean([cell.content["train_info"]["train_cpu_time"] for cell in selected])),
        "choose_cpu_s": float(np.mean([cost["cpu_s"] for cost in chosen])),
        "choose_steps": float(np.mean([cost["steps"] for cost in chosen])),
        "step_bytes": float(np.mean([cell.content["train_info"]["step_bytes"] for cell in selected])),
        "forgotten": 100 * float(np.mean([cell.forgotten for cell in selected])),
    }


def block_effects(cells: Sequence[Result], arm: str = "random") -> list[tuple[int, float, float, float]]:
    """How much accuracy a block is worth: (block, points, low, high), from an arm that draws blocks at random.

    Least squares of the accuracy on which blocks were drawn, with a constant for every transfer, regime and seed, and
    errors clustered by transfer and seed. The values sum to zero over blocks: a block is compared with the others. This
    is what no selector that adds up blocks can beat. Empty where there are fewer draws than unknowns.
    """
    import statsmodels.api as sm

    selected = [cell for cell in cells if cell.arm == arm]
    if not selected:
        return []
    count = 1 + max(max(cell.layers) for cell in selected)
    places = sorted({(cell.transfer, cell.regime, cell.seed) for cell in selected})
    if len(selected) < len(places) + count:
        return []
    if count < 3:
        return []
    drawn = np.array([[layer in cell.layers for layer in range(count)] for cell in selected], float)
    y = np.array([100 * cell.accuracy for cell in selected])
    which = np.array([places.index((cell.transfer, cell.regime, cell.seed)) for cell in selected])
    for place in range(len(places)):
        inside = which == place
        drawn[inside] -= drawn[inside].mean(axis=0)
        y[inside] -= y[inside].mean()
    # Blocks of one draw sum to k: effects are defined up to a constant, which contrasts to the mean take away.
    basis = np.linalg.svd(np.ones((1, count)))[2][1:].T  # [count, count - 1], orthogonal to the constant
    if np.linalg.matrix_rank(drawn @ basis) < count - 1:
        return []
    groups = np.unique([f"{c.transfer} {c.seed}" for c in selected], return_inverse=True)[1]
    if len(set(groups)) < 3:
        return []
    fit = sm.OLS(y, drawn @ basis).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    effects = fit.t_test(basis)
    bounds = effects.conf_int()
    return [(i, float(effects.effect[i]), float(bounds[i, 0]), float(bounds[i, 1])) for i in range(count)]


def jaccard(choices: Sequence[Sequence[int]]) -> float:
    """Mean Jaccard similarity of all pairs of choices; NaN for fewer than two."""
    pairs = [(set(a), set(b)) for a, b in combinations(choices, 2)]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else float("nan")


def expected_jaccard(k: int, count: int) -> float:
    """That of two random choices of `k` out of `count` blocks."""
    shares = [i / (2 * k - i) * comb(k, i) * comb(count - k, k - i) for i in range(k + 1)]
    return sum(shares) / comb(count, k)


def stability(cells: Sequence[Result], arm: str) -> float:
    """Mean over transfers and regimes of the Jaccard similarity of an arm's choices over seeds."""
    by_place: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
    for cell in cells:
        if cell.arm == arm:
            by_place[cell.transfer, cell.regime].append(cell.layers)
    found = [jaccard(choices) for choices in by_place.values() if len(choices) > 1]
    return float(np.mean(found)) if found else float("nan")
