"""The columns of files of formats 2 and 3, which have no descriptions: the defaults of a writer, with alert rules."""

from __future__ import annotations

from .columns import AlertRule, Column

__all__ = ["ENTROPY_COLLAPSE", "GRADIENT_RULES", "LARGE_LOGIT", "NOT_FINITE", "RANK_LOST", "STANDARD", "columns_of"]

NOT_FINITE = AlertRule("not_finite")
ENTROPY_COLLAPSE = AlertRule(
    "falls_below",
    "entropy",
    kind="entropy_collapse",
    words="attention entropy of {place} is {value:.3g} nats, below {limit:.3g}",
)
LARGE_LOGIT = AlertRule(
    "above", "max_logit", kind="max_logit", words="largest attention logit of {place} is {value:.4g}, above {limit:.4g}"
)
RANK_LOST = AlertRule(
    "above",
    0.0,
    kind="rank_lost",
    words="the values of {place} are those of one rank alone, {value:.0f} missing",
    measurements=1,
)
GRADIENT_RULES = (
    AlertRule("exploding", "exploding", kind="exploding_gradient"),
    AlertRule("dead", "dead", kind="dead_gradient"),
    NOT_FINITE,
)

# name -> axes, unit, quantity, rules, label: those that the quantities declare
_COLUMNS = {
    "entropy": (("layer", "head"), "nats", "attention", (ENTROPY_COLLAPSE, NOT_FINITE), "attention entropy"),
    "entropy_se": (("layer", "head"), "nats", "attention", (), "standard error of the entropy"),
    "max_logit": (("layer", "head"), "logit", "attention", (LARGE_LOGIT,), "largest attention logit"),
    "collision": (("layer", "head"), "probability", "attention", (), "attention collision"),
    "sink": (("layer", "head"), "probability", "attention", (), "attention on the first token"),
    "probe_entropy": (("layer", "head"), "nats", "probe_entropy", (), "attention entropy on the probe"),
    "activation_grad": (("layer",), "l2 norm", "activation_grad", GRADIENT_RULES, "activation gradient"),
    "parameter_grad": (("layer",), "l2 norm", "parameter_grad", GRADIENT_RULES, "parameter gradient"),
    "delta_cka": (("layer",), "1 - CKA", "delta_cka", (), "representation drift"),
    "delta_cka_se": (("layer",), "1 - CKA", "delta_cka", (), "standard error of the drift"),
    "probe_activation_grad": (("layer",), "l2 norm", "probe_activation_grad", (), "activation gradient on the probe"),
    "loss": ((), "nats", "step", (NOT_FINITE,), "loss"),
    "skipped": ((), "0 or 1", "step", (), "skipped"),
    "missing_ranks": ((), "processes", "step", (RANK_LOST,), "missing ranks"),
    "measure_ms": ((), "ms", "step", (), "time for measuring"),
    "probe_ms": ((), "ms", "step", (), "time for the probe"),
}
STANDARD: dict[str, Column] = {
    name: Column(
        unit,
        axes,
        label,
        f"{name} of a timeline of an earlier format.",
        quantity,
        scale="log" if "grad" in name else "linear",
        alerts=rules,
    )
    for name, (axes, unit, quantity, rules, label) in _COLUMNS.items()
}
_ABSENT = {2: ("missing_ranks",), 3: ()}  # missing columns by format


def columns_of(version: int) -> dict[str, Column]:
    """Of a file of format 2 or 3."""
    return {name: column for name, column in STANDARD.items() if name not in _ABSENT[version]}
