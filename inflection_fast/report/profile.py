"""The profile that the layers were chosen from, as arrays by layer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from inflection_fast.decide import Plan, ski
from inflection_fast.report.words import score, significant

__all__ = ["COMPONENTS", "by_name", "components", "found", "last_part", "layer_rows", "log_gradient"]

COMPONENTS = ("low entropy", "low gradient")
PART = 1 / 3  # share of the measured steps at the end of a training over which heads are averaged


def by_name(plan: Plan, name: str) -> np.ndarray:
    """A quantity of the plan's profile [L]; NaN where the plan has none."""
    values = plan.profile.get(name)
    return np.full(len(plan.scores), np.nan) if values is None else np.array(values, float)


def log_gradient(plan: Plan) -> np.ndarray:
    """Natural logarithm of the activation gradient norm [L]; NaN where it is zero."""
    norms = by_name(plan, "activation_grad")
    return np.log(norms, out=np.full_like(norms, np.nan), where=norms > 0)


def layer_rows(plan: Plan, layers: Iterable[int]) -> list[tuple[str, str, str, str]]:
    """Table cells of layers: index, entropy with standard error, log gradient norm, SKI."""
    entropy, error, gradient = by_name(plan, "entropy"), by_name(plan, "entropy_se"), log_gradient(plan)
    rows = []
    for i in layers:
        spread = f" ± {significant(error[i], 2)}" if np.isfinite(error[i]) else ""
        rows.append((str(i), f"{significant(entropy[i])}{spread}", significant(gradient[i]), score(plan.scores[i])))
    return rows


def components(plan: Plan) -> dict[str, np.ndarray]:
    """The two parts of SKI [L], each as SKI with all weight on it, for the layers that have a score."""
    scored = np.isfinite(plan.scores)
    entropy, gradient = (np.where(scored, by_name(plan, name), np.nan) for name in ("entropy", "activation_grad"))
    options = {name: plan.config[name] for name in ("normalisation", "log_gradient") if name in plan.config}
    return {
        name: ski(entropy, gradient, alpha=alpha, **options) for name, alpha in zip(COMPONENTS, (1.0, 0.0), strict=True)
    }


def found(plan: Plan, what: str) -> int | None:
    """The layer that is the plan's "entropy minimum" or "gradient cliff"; None where it found or looked for none."""
    return next(iter(plan.found.get(what, ())), None)


def last_part(steps: int) -> slice:
    """The last part of so many measured steps."""
    return slice(steps - max(1, round(PART * steps)), steps)
