"""The description of a column of a timeline: unit, axes, drawing, alert rules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

__all__ = ["TESTS", "AlertRule", "Column"]

# The tests of a rule; see `AlertRule`.
TESTS = ("above", "below", "falls_below", "exploding", "dead", "not_finite")
_DRAWN = ("lines", "heatmap", "none")
_SCALES = ("linear", "log")


@dataclass(frozen=True)
class AlertRule:
    """A rule for alerts on the values of a column.

    `test` is one of

    * "above", "below": the value is beyond `limit`;
    * "falls_below": it is below `limit` at a place that was at or above it before;
    * "exploding", "dead": it differs from the median of its last measurements by the factor `limit` (above 1, below 1)
      and by several of their deviations; 0 is always dead. For positive values, such as norms;
    * "not_finite": it was measured and is infinite or NaN. `limit` is not used.

    Raises:
        ValueError: a test that does not exist, or a limit that is missing.
    """

    test: str
    # A number, or the name of a field of `AlertConfig`, which users can change or switch off.
    limit: float | str | None = None
    kind: str | None = None  # name of the alert; None: the name of the test
    words: str | None = None  # of the alert; None: "{signal} of {place} is {value:.3g}, above {limit:.3g}" or alike
    measurements: int | None = None  # consecutive measurements for an alert; None: as in `AlertConfig`

    def __post_init__(self):
        if self.test not in TESTS:
            raise ValueError(f"test: expected one of {TESTS}, got {self.test!r}")
        if self.test != "not_finite" and self.limit is None:
            raise ValueError(f"limit: a rule {self.test!r} needs one, a number or the name of a field of AlertConfig")
        if self.measurements is not None and self.measurements < 1:
            raise ValueError(f"measurements: expected at least 1, got {self.measurements}")


@dataclass(frozen=True)
class Column:
    """One column of a timeline.

    `axes` name the dimensions of the values of one step: ("layer", "head") is [L, H], ("layer",) is [L], () is one
    number of the step. Other names are axes of fixed size that the quantity declares. "layer" comes first.

    Raises:
        ValueError: an axis twice, "layer" not first, or a way of drawing that does not exist.
    """

    unit: str  # "nats", "1" for a number without a unit, "ms", ...
    axes: tuple[str, ...]
    label: str  # for an axis of a chart, without the unit: "attention entropy"
    explanation: str  # one sentence: what the number is
    quantity: str = ""  # its quantity; set by the monitor
    drawn: str = "lines"  # over steps, a line per layer; "heatmap": layers x steps; "none"
    scale: str = "linear"  # of the values; "log"
    # Name of the accumulator that counts measurements, with the same axes or the first of them: where it is 0, the
    # value is missing. None: all values exist whenever the quantity was due.
    count: str | None = None
    alerts: tuple[AlertRule, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "alerts", tuple(self.alerts))
        if len(set(self.axes)) < len(self.axes) or "layer" in self.axes[1:]:
            raise ValueError(f"axes: expected distinct names, 'layer' first, got {self.axes}")
        if self.drawn not in _DRAWN:
            raise ValueError(f"drawn: expected one of {_DRAWN}, got {self.drawn!r}")
        if self.scale not in _SCALES:
            raise ValueError(f"scale: expected one of {_SCALES}, got {self.scale!r}")

    def as_dict(self) -> dict:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict) -> Column:
        """A column from `as_dict`; unknown fields and rules of later versions are ignored."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in saved.items() if name in known}
        of_rules = {field.name for field in fields(AlertRule)}
        rules = [rule for rule in values.pop("alerts", ()) if rule.get("test") in TESTS]
        alerts = (AlertRule(**{k: v for k, v in rule.items() if k in of_rules}) for rule in rules)
        return cls(**values, alerts=tuple(alerts))
