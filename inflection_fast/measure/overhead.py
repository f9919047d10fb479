"""What measuring costs: training steps with and without it, interleaved in one process."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .config import EVERY, MonitorConfig
from .cost import AGAIN, UNMONITORED, Steps, costs, race

__all__ = ["Overhead", "measure_overhead"]

_MEASURED = "measured"


@dataclass(frozen=True)
class Overhead:
    """Medians over pairs of training steps, forward and backward, without the optimizer."""

    off_ms: float  # a step that is not monitored, from one of the two arms
    on_ms: float  # a step that is measured
    noise: float  # standard error of the median ratio of two unmonitored steps (A/A)
    ratio: float  # measured step over unmonitored step, averaged over `every` steps: 1.01 costs 1 %

    def __str__(self) -> str:
        return (
            f"{self.off_ms:.1f} ms a step, {self.on_ms:.1f} ms measured: {100 * (self.ratio - 1):+.2f} % "
            f"(A/A noise {100 * self.noise:.2f} %)"
        )


def measure_overhead(
    model: nn.Module,
    batch: dict,
    config: MonitorConfig = MonitorConfig(),  # noqa: B008  (frozen)
    *,
    pairs: int = 15,
) -> Overhead:
    """Time `pairs` rounds of three steps on one batch: unmonitored, measured, unmonitored (`cost.race`).

    All quantities are due in the measured step. Its cost is divided by `config.every`, of a mapping by the smallest
    value: the steps between have no hooks. A compiled model that is measured in its graph keeps its taps in all three
    steps, so their cost while they are off is not in `ratio`; `inflection-fast overhead --compiled` shows it. The probe
    is not run. Gradients and random generators are restored.

    Args:
        model: in training state; the loss among its outputs is used, else the mean of its first output.
        batch: its inputs.
        config: what to measure.
        pairs: number of rounds, at least 3.

    Raises:
        ValueError: too few pairs, or the model returned neither a loss nor a floating-point tensor.
    """
    if operator.index(pairs) < 3:
        raise ValueError(f"pairs: expected at least 3, got {pairs}")
    spread = config.every if isinstance(config.every, int) else min(config.every.values(), default=EVERY)
    steps = Steps(model, batch)
    with _preserved_gradients(model), steps.watched(config) as (measured, _):
        times = race({UNMONITORED: steps, _MEASURED: measured, AGAIN: steps}, seconds=float("inf"), rounds=pairs)
    cost = {one.label: one for one in costs(times)}
    return Overhead(
        off_ms=cost[UNMONITORED].ms,
        on_ms=cost[_MEASURED].ms,
        noise=cost[AGAIN].error / spread,
        ratio=1 + cost[_MEASURED].added / spread,
    )


@contextmanager
def _preserved_gradients(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
