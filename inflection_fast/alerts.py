"""Alerts of a training run, found in its timeline: collapsed heads, huge logits, dead gradients, lost ranks.

The rules of a column (`AlertRule`) say which of its values raise an alert. Its quantity declares them, the timeline
stores them, and `AlertConfig.rules` replaces them. An alert is raised once, at the measured step that completes it, and
again only after it has cleared. Gradient norms are compared with their own history, because they scale with the loss,
the batch and the model. A norm raises an alert if it differs from the median of its last measurements by a factor *and*
by several deviations: small changes of a steady norm and usual changes of a noisy one raise none.
"""

from __future__ import annotations

import logging
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .timeline import AlertRule, Column, Timeline
from .timeline.older import STANDARD

__all__ = ["ALERT_KINDS", "Alert", "AlertConfig", "AlertWatch", "alert_lines", "find_alerts", "log_alerts"]

logger = logging.getLogger(__name__)

ALERT_KINDS = ("entropy_collapse", "max_logit", "exploding_gradient", "dead_gradient", "not_finite", "rank_lost")
_OF_HISTORY = ("exploding", "dead")
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LIMITS = ("entropy", "max_logit", "exploding", "dead")  # fields below that a rule may name


@dataclass(frozen=True)
class AlertConfig:
    """When to raise an alert; None switches a kind off. `TypeError` or `ValueError` names the field."""

    entropy: float | None = 0.05  # nats: a head whose mean entropy falls below has collapsed to one key per query
    entropy_from_start: bool = False  # also heads that were below from the first measurement on, as pretrained ones are
    max_logit: float | None = 1000.0  # neighbouring bfloat16 numbers are 4 nats apart up there
    exploding: float | None = 10.0  # times the median of the block's last norms
    dead: float | None = 1e-3  # times the same; a norm of exactly 0 is dead whatever came before
    not_finite: bool = True  # inf, or NaN where there was a number before
    rank_lost: bool = True  # values that are those of one process alone, where several train
    measurements: int = 3  # in a row: so many raise an alert (of the last two kinds: one), so many without it clear it
    history: int = 50  # measurements that a gradient norm is compared with
    history_least: int = 10  # no alert on gradients with fewer
    deviations: float = 6.0  # of the log norm in that history, estimated from its median absolute deviation
    # Rules by column, which replace those that its quantity declares; () switches them off.
    rules: Mapping[str, tuple[AlertRule, ...]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("entropy", "max_logit", "exploding", "dead", "deviations"):
            value = getattr(self, name)
            if value is None and name != "deviations":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if self.exploding is not None and self.exploding <= 1:
            raise ValueError(f"exploding: expected a factor above 1, got {self.exploding}")
        if self.dead is not None and self.dead >= 1:
            raise ValueError(f"dead: expected a factor below 1, got {self.dead}")
        for name in ("entropy_from_start", "not_finite", "rank_lost"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("measurements", "history", "history_least"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if operator.index(value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.history_least > self.history:
            raise ValueError(f"history_least: expected at most history ({self.history}), got {self.history_least}")
        self._check_rules()

    def _check_rules(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise TypeError(f"rules: expected a mapping from columns to rules, got {self.rules!r}")
        as_tuples: dict[str, tuple[AlertRule, ...]] = {}
        for column, rules in self.rules.items():
            rules = (rules,) if isinstance(rules, AlertRule) else rules
            if not isinstance(rules, (tuple, list)) or not all(isinstance(rule, AlertRule) for rule in rules):
                raise TypeError(f"rules: expected AlertRules for {column!r}, got {rules!r}")
            for rule in rules:
                self.limit_of(rule)
            as_tuples[column] = tuple(rules)
        object.__setattr__(self, "rules", as_tuples)

    def limit_of(self, rule: AlertRule) -> float | None:
        """The limit of a rule; NaN if it needs none, None if it is switched off. `ValueError` for an unknown limit."""
        if rule.test == "not_finite":
            return math.nan if self.not_finite else None
        if rule.limit is None or ((rule.kind or rule.test) == "rank_lost" and not self.rank_lost):
            return None
        if not isinstance(rule.limit, str):
            return float(rule.limit)
        if rule.limit not in _LIMITS:
            raise ValueError(f"limit: a rule names {rule.limit!r}; expected a number or one of {_LIMITS}")
        return getattr(self, rule.limit)


@dataclass(frozen=True)
class Alert:
    """One alert: what went wrong, at one place, at the measured step that completed it."""

    step: int  # optimizer step
    kind: str  # one of ALERT_KINDS, or the kind of a rule of another column
    signal: str  # column of the timeline
    layer: int | None  # None: the whole step
    head: int | None  # or the index on the second axis of the column; None: the whole block
    value: float
    limit: float  # that the value passed; NaN for not_finite
    message: str  # one sentence


class AlertWatch:
    """Raises the alerts of a run measurement by measurement, in memory that does not grow.

    ``find_alerts(timeline)`` calls `push` for each of its measurements in order.

    Args:
        config: limits, and rules that replace those of columns.
        columns: whose rules are applied; None: the standard ones.
        axes: labels of the indices on axes other than layers and heads, or their number; for the messages.
    """

    def __init__(
        self,
        config: AlertConfig = AlertConfig(),
        columns: Mapping[str, Column] | None = None,
        axes: Mapping[str, Sequence[str] | int] | None = None,
    ):
        if not isinstance(config, AlertConfig):
            raise TypeError(f"config: expected an AlertConfig, got {type(config).__name__}")
        self._config = config
        columns = STANDARD if columns is None else columns
        unknown = sorted(set(config.rules) - set(columns))
        if unknown:
            raise ValueError(f"rules: there are no columns {unknown}; expected some of {sorted(columns)}")
        self._axes = {name: column.axes for name, column in columns.items()}
        self._named = {axis: places for axis, places in (axes or {}).items() if not isinstance(places, int)}
        self._rules = {name: config.rules.get(name, column.alerts) for name, column in columns.items()}
        self._rules = {name: rules for name, rules in self._rules.items() if rules}
        self._conditions: dict[tuple[str, str], _Condition] = {}
        of_history = [n for n, rules in self._rules.items() if any(rule.test in _OF_HISTORY for rule in rules)]
        # Logarithms of the values, oldest first.
        self._logs: dict[str, deque[np.ndarray]] = {name: deque(maxlen=config.history) for name in of_history}
        self._had_value: dict[str, np.ndarray] = {}
        self._was_higher: dict[str, np.ndarray] = {}  # where a value was at or above the limit before

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of alerts that this watch may raise."""
        of_rules = (rule.kind or rule.test for rules in self._rules.values() for rule in rules)
        return tuple(dict.fromkeys((*ALERT_KINDS, *of_rules)))

    def push(self, step: int, signals: Mapping[str, np.ndarray | float]) -> list[Alert]:
        """The alerts that one measurement raises.

        `signals` holds arrays or scalars by column; columns without rules are ignored. The mask of a masked array says
        where nothing was measured. In a plain array NaN means the same until the first number there.
        """
        # A gradient scaler that searches its scale skips steps, and their gradients overflow.
        skipped = float(np.ma.filled(signals.get("skipped", 0.0), 0.0)) == 1
        found = []
        for name, rules in self._rules.items():
            value = signals.get(name)
            if value is None or np.ma.getmaskarray(value).all() or (skipped and name in self._logs):
                continue
            values, masked = np.asarray(np.ma.getdata(value), np.float64), isinstance(value, np.ma.MaskedArray)
            measured = ~np.ma.getmaskarray(value)
            with np.errstate(invalid="ignore"):
                for rule, holds, limit in self._tested(name, rules, values, measured, masked):
                    found += self._raised(step, name, rule, values, holds & measured, limit)
        return found

    def _raised(self, step: int, name: str, rule: AlertRule, values, holds: np.ndarray, limit) -> list[Alert]:
        config, kind = self._config, rule.kind or rule.test
        at_once = 1 if rule.test == "not_finite" else config.measurements
        key = kind, name
        if key not in self._conditions:
            self._conditions[key] = _Condition(holds.shape, rule.measurements or at_once, config.measurements)
        limits = np.broadcast_to(limit, holds.shape)
        return [
            self._alert(step, kind, name, place, float(values[place]), float(limits[place]), rule)
            for place in self._conditions[key].push(holds)
        ]

    def _alert(
        self, step: int, kind: str, signal: str, place: tuple[int, ...], value: float, limit: float, rule: AlertRule
    ) -> Alert:
        places = dict(zip(self._axes[signal], place, strict=True))
        layer, head = places.get("layer"), next((index for axis, index in places.items() if axis != "layer"), None)
        labels = {axis: self._named[axis][index] if axis in self._named else index for axis, index in places.items()}
        where = " ".join(f"{'block' if axis == 'layer' else axis} {label}" for axis, label in labels.items())
        template = rule.words or _TEMPLATES[rule.test]
        text = template.format(signal=signal, place=where or "the step", value=value, limit=limit)
        return Alert(step, kind, signal, layer, head, value, limit, f"Step {step}: {text}.")

    def resume(self, timeline: Timeline) -> None:
        """Push the last measurements of a run that is resumed, so that its earlier alerts are not raised again."""
        for step, signals in _measurements_of(timeline, self._rules, last=self._config.history):
            self.push(step, signals)

    def _tested(self, name: str, rules, values: np.ndarray, measured: np.ndarray, masked: bool):
        """(rule, where it holds, limit) for every rule of a column that is not switched off."""
        limits = [(rule, limit) for rule in rules if (limit := self._config.limit_of(rule)) is not None]
        history = [(rule, limit) for rule, limit in limits if rule.test in _OF_HISTORY]
        if history:
            yield from self._tested_by_history(name, values, measured, history)
        for rule, limit in limits:
            if rule.test == "above":
                yield rule, values > limit, limit if (rule.kind or rule.test) != "rank_lost" else math.nan
            elif rule.test == "below":
                yield rule, values < limit, limit
            elif rule.test == "falls_below":
                yield rule, self._fallen(name, values, limit), limit
            elif rule.test == "not_finite":
                yield rule, self._not_finite(name, values, measured, masked), math.nan

    def _fallen(self, name: str, values: np.ndarray, limit: float) -> np.ndarray:
        low = values < limit
        if self._config.entropy_from_start:
            return low
        before = self._was_higher.get(name, np.zeros(values.shape, bool))
        self._was_higher[name] = (values >= limit) | before
        return low & self._was_higher[name]

    def _tested_by_history(self, name: str, norms: np.ndarray, measured: np.ndarray, rules):
        config, history = self._config, np.array(self._logs[name]).reshape(-1, *norms.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(norms)  # NaN: no value; -inf: a norm of 0
        middle = _median(history)
        middle[np.isfinite(history).sum(0) < config.history_least] = np.nan
        apart, margins = logs - middle, None
        self._logs[name].append(np.where(np.isfinite(logs) & measured, logs, np.nan))
        for rule, limit in rules:
            up = rule.test == "exploding"
            distance = math.log(limit) if up else -math.log(limit)
            beyond = apart > distance if up else -apart > distance
            if beyond.any() and margins is None:  # rare, and deviations cost as much as all the rest
                margins = config.deviations * _MAD_TO_DEVIATION * _median(np.abs(history - middle))
            needed = np.maximum(distance, 0.0 if margins is None else margins)
            if up:
                yield rule, (apart > needed) & np.isfinite(logs), np.exp(middle + needed)
            else:
                least = np.nan_to_num(np.exp(middle - needed), nan=0.0)  # without a history only 0 is dead
                yield rule, (-apart > needed) | (norms == 0), least

    def _not_finite(self, name: str, values: np.ndarray, measured: np.ndarray, masked: bool) -> np.ndarray:
        finite = np.isfinite(values)
        if masked:
            return measured & ~finite
        before = self._had_value.get(name, np.zeros_like(finite))
        self._had_value[name] = before | finite
        return np.isinf(values) | (before & ~finite)


class _Condition:
    """A condition by place, which begins after `to_begin` measurements with it, and ends after `to_clear` without it.

    Both in a row. `push` returns the places where it begins.
    """

    def __init__(self, shape: tuple[int, ...], to_begin: int, to_clear: int):
        self._to_begin, self._to_clear = to_begin, to_clear
        self._with, self._without = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._active = np.zeros(shape, bool)

    def push(self, holds: np.ndarray) -> list[tuple[int, ...]]:
        self._with = np.where(holds, self._with + 1, 0)
        self._without = np.where(holds, 0, self._without + 1)
        self._active &= self._without < self._to_clear
        begins = (self._with >= self._to_begin) & ~self._active
        self._active |= begins
        return [tuple(map(int, place)) for place in np.argwhere(begins)]


def _median(values: np.ndarray) -> np.ndarray:
    """Median over axis 0 without NaN; NaN where all are NaN. `np.nanmedian` takes ten times as long."""
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    count = np.isfinite(values).sum(0)
    ordered = np.sort(values, axis=0)  # NaN last
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    pick = np.stack([low, np.minimum(high, len(values) - 1)])
    return np.where(count > 0, np.take_along_axis(ordered, pick, axis=0).mean(0), np.nan)


# ---- of a whole timeline ---------------------------------------------------------------------------------------------


def find_alerts(
    timeline: Timeline, config: AlertConfig = AlertConfig(), *, kinds: Iterable[str] | None = None
) -> list[Alert]:
    """All alerts of a timeline, in the order of their steps. `ValueError` for an unknown kind."""
    watch = AlertWatch(config, timeline.columns if len(timeline.columns) else None, timeline.axes)
    kinds = watch.kinds if kinds is None else tuple(kinds)
    unknown = sorted(set(kinds) - set(watch.kinds))
    if unknown:
        raise ValueError(f"kinds: expected some of {watch.kinds}, got {unknown}")
    found = [a for step, signals in _measurements_of(timeline, watch._rules) for a in watch.push(step, signals)]
    return [alert for alert in found if alert.kind in kinds]


def _measurements_of(
    timeline: Timeline, names: Iterable[str], last: int | None = None
) -> Iterable[tuple[int, dict[str, np.ndarray]]]:
    """(step, values by column) of every measurement, or of the last `last` ones."""
    columns = {name: timeline.masked(name) for name in {"skipped", *names} & {"skipped", *timeline.columns}}
    first = 0 if last is None else max(0, len(timeline.steps) - last)
    for i in range(first, len(timeline.steps)):
        yield int(timeline.steps[i]), {name: values[i : i + 1][0] for name, values in columns.items()}


# ---- messages --------------------------------------------------------------------------------------------------------

_TEMPLATES = {
    "above": "{signal} of {place} is {value:.3g}, above {limit:.3g}",
    "below": "{signal} of {place} is {value:.3g}, below {limit:.3g}",
    "falls_below": "{signal} of {place} is {value:.3g}, below {limit:.3g}",
    "exploding": "{signal} of {place} is {value:.3g}, above {limit:.3g}, which follows from its history",
    "dead": "{signal} of {place} is {value:.3g}, below {limit:.3g}, which follows from its history",
    "not_finite": "{signal} of {place} is {value}",
}
_LOW = ("entropy_collapse", "dead_gradient", "below", "falls_below", "dead")  # of these the smallest value is the worst


def alert_lines(alerts: Iterable[Alert]) -> list[str]:
    """One line for each step, kind and signal: the message of the worst place, and the number of other places."""
    groups: dict[tuple, list[Alert]] = {}
    for alert in alerts:
        groups.setdefault((alert.step, alert.kind, alert.signal), []).append(alert)
    lines = []
    for (_, kind, _), group in groups.items():
        worst = (min if kind in _LOW else max)(group, key=lambda alert: alert.value)
        others = len(group) - 1
        more = f"; {others} other place{'s' * (others > 1)} likewise." if others else "."
        lines.append(worst.message.removesuffix(".") + more)
    return lines


def log_alerts(alerts: list[Alert], on_alert: Callable[[list[Alert]], None] | None = None) -> None:
    """Log the alerts of one measurement as warnings and pass them to `on_alert`, whose exceptions are logged."""
    for line in alert_lines(alerts):
        logger.warning("%s", line)
    if on_alert is not None and alerts:
        try:
            on_alert(alerts)
        except Exception:
            logger.exception("on_alert raised an exception; training continues")
