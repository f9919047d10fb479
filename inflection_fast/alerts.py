"""What goes wrong in a training run, seen in its timeline: collapsed heads, huge logits, dead gradients, lost ranks.

An alert is raised once, at the measured step that completes it, and again only after it has cleared. Gradient norms are
held against the run's own history, because they scale with the loss, the batch and the model: a norm is odd when it
leaves the median of its last measurements by a factor *and* by several of its own deviations, so neither a quiet layer
that moves a little nor a noisy one that always moves raises an alert.
"""

from __future__ import annotations

import logging
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .timeline import Timeline

__all__ = ["ALERT_KINDS", "Alert", "AlertConfig", "AlertWatch", "alert_lines", "find_alerts", "log_alerts"]

logger = logging.getLogger(__name__)

ALERT_KINDS = ("entropy_collapse", "max_logit", "exploding_gradient", "dead_gradient", "not_finite", "rank_lost")
_GRADIENTS = ("activation_grad", "parameter_grad")
_FINITE = ("loss", "entropy", *_GRADIENTS)  # the other signals of a head are NaN where its entropy is
_AT_ONCE = ("not_finite", "rank_lost")
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


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
    measurements: int = 3  # so many in a row complete an alert (of the last two kinds: one), so many without clear it
    history: int = 50  # measurements that a gradient norm is held against
    history_least: int = 10  # no judgement on gradients from fewer
    deviations: float = 6.0  # of the log norm in that history, estimated from its median absolute deviation

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


@dataclass(frozen=True)
class Alert:
    """One thing that went wrong, at one place, at the measured step that completed it."""

    step: int  # optimizer step
    kind: str  # one of ALERT_KINDS
    signal: str  # column of the timeline
    layer: int | None  # None: of the whole step
    head: int | None  # None: of the whole block
    value: float
    limit: float  # what the value went beyond; NaN for not_finite and rank_lost
    message: str  # one sentence


class AlertWatch:
    """Raises the alerts of a run measurement by measurement, in memory that does not grow.

    ``find_alerts(timeline)`` is every `push` of its measurements in order.
    """

    def __init__(self, config: AlertConfig = AlertConfig()):
        if not isinstance(config, AlertConfig):
            raise TypeError(f"config: expected an AlertConfig, got {type(config).__name__}")
        self._config = config
        self._conditions: dict[tuple[str, str], _Condition] = {}
        self._logs = {name: deque(maxlen=config.history) for name in _GRADIENTS}  # log norms [L], oldest first
        self._had_value: dict[str, np.ndarray] = {}
        self._was_higher: np.ndarray | bool = False  # [L, H], heads that have been above the limit of entropy

    def push(self, step: int, signals: Mapping[str, np.ndarray]) -> list[Alert]:
        """Look at one measurement: arrays [L, H], [L] or scalars by the names of the timeline, missing ones ignored."""
        signals = {name: np.asarray(value, np.float64) for name, value in signals.items()}
        if signals.get("skipped", 0) == 1:  # by a gradient scaler that tries its scale out
            signals = {name: value for name, value in signals.items() if name not in _GRADIENTS}
        found = []
        for kind, signal, holds, limit in self._judged(signals):
            n = 1 if kind in _AT_ONCE else self._config.measurements
            key = (kind, signal)
            if key not in self._conditions:
                self._conditions[key] = _Condition(holds.shape, n, self._config.measurements)
            for place in self._conditions[key].push(holds):
                value = float(signals[signal][place])
                found.append(
                    _alert(step, kind, signal, place, value, float(np.broadcast_to(limit, holds.shape)[place]))
                )
        return found

    def resume(self, timeline: Timeline) -> None:
        """Look at the last measurements of a run that goes on, whose alerts were told before."""
        for step, signals in _measurements_of(timeline, last=self._config.history):
            self.push(step, signals)

    def _judged(self, signals: dict[str, np.ndarray]) -> Iterable[tuple[str, str, np.ndarray, np.ndarray | float]]:
        """(kind, signal, where it holds, limit) for every condition on this measurement."""
        config = self._config
        if config.entropy is not None and "entropy" in signals:
            yield "entropy_collapse", "entropy", self._collapsed(signals["entropy"]), config.entropy
        if config.max_logit is not None and "max_logit" in signals:
            yield "max_logit", "max_logit", signals["max_logit"] > config.max_logit, config.max_logit
        for name in _GRADIENTS:
            if name in signals:
                yield from self._judged_gradient(name, signals[name])
        for name in _FINITE if config.not_finite else ():
            if name in signals:
                yield "not_finite", name, self._lost(name, signals[name]), math.nan
        if config.rank_lost and "missing_ranks" in signals:
            yield "rank_lost", "missing_ranks", signals["missing_ranks"] > 0, math.nan

    def _collapsed(self, entropy: np.ndarray) -> np.ndarray:
        low = entropy < self._config.entropy
        if self._config.entropy_from_start:
            return low
        self._was_higher = (entropy >= self._config.entropy) | self._was_higher
        return low & self._was_higher

    def _judged_gradient(self, name: str, norms: np.ndarray):
        config, history = self._config, np.array(self._logs[name]).reshape(-1, len(norms))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(norms)  # NaN: no value; -inf: a norm of 0
        middle = _median(history)
        middle[np.isfinite(history).sum(0) < config.history_least] = np.nan
        up = math.inf if config.exploding is None else math.log(config.exploding)
        down = -math.inf if config.dead is None else math.log(config.dead)
        apart = logs - middle
        margin = 0.0
        if ((apart > up) | (apart < down)).any():  # seldom, and deviations cost as much as all the rest
            margin = config.deviations * _MAD_TO_DEVIATION * _median(np.abs(history - middle))
        self._logs[name].append(np.where(np.isfinite(logs), logs, np.nan))
        if config.exploding is not None:
            up = np.maximum(up, margin)
            yield "exploding_gradient", name, (apart > up) & np.isfinite(logs), np.exp(middle + up)
        if config.dead is not None:
            down = np.minimum(down, -margin)
            limit = np.nan_to_num(np.exp(middle + down), nan=0.0)  # without a history, 0 alone is dead
            yield "dead_gradient", name, (apart < down) | (norms == 0), limit

    def _lost(self, name: str, values: np.ndarray) -> np.ndarray:
        finite = np.isfinite(values)
        before = self._had_value.get(name, np.zeros_like(finite))
        self._had_value[name] = before | finite
        return np.isinf(values) | (before & ~finite)


class _Condition:
    """Where a condition begins to hold for `to_begin` measurements in a row; forgotten after `to_clear` without it."""

    def __init__(self, shape: tuple[int, ...], to_begin: int, to_clear: int):
        self._to_begin, self._to_clear = to_begin, to_clear
        self._held, self._calm = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._active = np.zeros(shape, bool)

    def push(self, holds: np.ndarray) -> list[tuple[int, ...]]:
        self._held = np.where(holds, self._held + 1, 0)
        self._calm = np.where(holds, 0, self._calm + 1)
        self._active &= self._calm < self._to_clear
        begins = (self._held >= self._to_begin) & ~self._active
        self._active |= begins
        return [tuple(map(int, place)) for place in np.argwhere(begins)]


def _median(values: np.ndarray) -> np.ndarray:
    """Median over axis 0 without the NaN; NaN where there is nothing else. `nanmedian` takes ten times as long."""
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    count = np.isfinite(values).sum(0)
    ordered = np.sort(values, axis=0)  # NaN last
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    pick = np.stack([low, np.minimum(high, len(values) - 1)])
    return np.where(count > 0, np.take_along_axis(ordered, pick, axis=0).mean(0), np.nan)


# ---- of a whole timeline ---------------------------------------------------------------------------------------------


def find_alerts(
    timeline: Timeline,
    config: AlertConfig = AlertConfig(),
    *,
    kinds: Iterable[str] = ALERT_KINDS,
) -> list[Alert]:
    """All alerts of a timeline, in the order of their steps. `ValueError` for a kind that does not exist."""
    kinds = tuple(kinds)
    unknown = sorted(set(kinds) - set(ALERT_KINDS))
    if unknown:
        raise ValueError(f"kinds: expected some of {ALERT_KINDS}, got {unknown}")
    watch = AlertWatch(config)
    found = [alert for step, signals in _measurements_of(timeline) for alert in watch.push(step, signals)]
    return [alert for alert in found if alert.kind in kinds]


def _measurements_of(timeline: Timeline, last: int | None = None) -> Iterable[tuple[int, dict[str, np.ndarray]]]:
    """(step, signals by name) of every measurement, or of the `last` ones only."""
    names = {"max_logit", "skipped", "missing_ranks", *_FINITE}
    first = 0 if last is None else max(0, len(timeline.steps) - last)
    for i in range(first, len(timeline.steps)):
        yield int(timeline.steps[i]), {name: getattr(timeline, name)[i] for name in names}


# ---- words -----------------------------------------------------------------------------------------------------------

_WORDS = {
    "entropy_collapse": ("attention entropy of {place} is {value:.3g} nats, below {limit:.3g}", min),
    "max_logit": ("largest attention logit of {place} is {value:.4g}, above {limit:.4g}", max),
    "exploding_gradient": ("{signal} of {place} is {value:.3g}, above {limit:.3g}, out of its own history", max),
    "dead_gradient": ("{signal} of {place} is {value:.3g}, below {limit:.3g}, out of its own history", min),
    "not_finite": ("{signal} of {place} is {value}", max),
    "rank_lost": ("the values of {place} are those of one rank alone, {value:.0f} missing", max),
}


def _alert(step: int, kind: str, signal: str, place: tuple[int, ...], value: float, limit: float) -> Alert:
    layer, head = (*place, None, None)[:2]
    where = "the step" if layer is None else f"block {layer}" if head is None else f"block {layer} head {head}"
    words = _WORDS[kind][0].format(signal=signal, place=where, value=value, limit=limit)
    return Alert(step, kind, signal, layer, head, value, limit, f"Step {step}: {words}.")


def alert_lines(alerts: Iterable[Alert]) -> list[str]:
    """One line for each step, kind and signal: the worst place in words and how many others there are."""
    groups: dict[tuple, list[Alert]] = {}
    for alert in alerts:
        groups.setdefault((alert.step, alert.kind, alert.signal), []).append(alert)
    lines = []
    for (_, kind, _), group in groups.items():
        worst = _WORDS[kind][1](group, key=lambda alert: alert.value)
        others = len(group) - 1
        likewise = f"; {others} other place{'s' * (others > 1)} likewise." if others else "."
        lines.append(worst.message.removesuffix(".") + likewise)
    return lines


def log_alerts(alerts: list[Alert], on_alert: Callable[[list[Alert]], None] | None = None) -> None:
    """Log the alerts of one measurement as warnings and hand them to `on_alert`; what that raises is logged."""
    for line in alert_lines(alerts):
        logger.warning("%s", line)
    if on_alert is not None and alerts:
        try:
            on_alert(alerts)
        except Exception:
            logger.exception("on_alert raised; training goes on")
