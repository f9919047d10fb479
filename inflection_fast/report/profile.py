"""What the choice was made from, as arrays by layer."""

from __future__ import annotations

import numpy as np

from inflection_fast.decide import Plan, ski

__all__ = ["COMPONENTS", "by_name", "components", "found", "last_part", "log_gradient"]

COMPONENTS = ("low entropy", "low gradient")
PART = 1 / 3  # of the measured steps: late enough to show what training has made of the heads, long enough to average


def by_name(plan: Plan, name: str) -> np.ndarray:
    """A quantity of the plan's profile [L]; NaN where the plan has none."""
    values = plan.profile.get(name)
    return np.full(len(plan.scores), np.nan) if values is None else np.array(values, float)


def log_gradient(plan: Plan) -> np.ndarray:
    """Natural logarithm of the activation gradient norm [L]; NaN where it is zero."""
    norms = by_name(plan, "activation_grad")
    return np.log(norms, out=np.full_like(norms, np.nan), where=norms > 0)


def components(plan: Plan) -> dict[str, np.ndarray]:
    """The two parts of SKI [L]: SKI itself with all the weight on one of them, over the layers that have a score."""
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
    """Which of so many measured steps are the last part of a training."""
    return slice(steps - max(1, round(PART * steps)), steps)
