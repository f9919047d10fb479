"""What measuring costs: training steps with and without it, interleaved in one process."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import nn

from .config import EVERY, MonitorConfig
from .cost import Steps, median_error
from .monitor import Monitor

__all__ = ["Overhead", "measure_overhead"]

_WARM_UP_PAIRS = 2


@dataclass(frozen=True)
class Overhead:
    """Medians over pairs of training steps, forward and backward, without the optimizer."""

    off_ms: float  # a step that is not monitored
    on_ms: float  # a step that is measured
    noise: float  # standard error of the median ratio, found between two unmonitored steps (A/A)
    ratio: float  # measured over unmonitored step, spread over the config's `every` steps: 1.01 costs 1 %

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
    """Time `pairs` triples of steps on one batch: unmonitored, measured, unmonitored.

    The cost of a measured step, with all quantities due, is counted every `config.every` steps, of a mapping the least;
    the steps between have no hooks. The probe is not run. Gradients and the state of the random generators are left as
    they were.

    Args:
        model: in the state in which it trains; a loss among its outputs is used, else the mean of its first output.
        batch: its inputs.
        config: what to measure.
        pairs: at least 3.

    Raises:
        ValueError: too few pairs, or the model returned neither a loss nor a floating-point tensor.
    """
    if operator.index(pairs) < 3:
        raise ValueError(f"pairs: expected at least 3, got {pairs}")
    every_step = replace(config, every=dict.fromkeys(config.names, 1), probe_every=None)
    spread = config.every if isinstance(config.every, int) else min(config.every.values(), default=EVERY)
    off: list[float] = []
    on: list[float] = []
    again: list[float] = []
    with _gradients_set_aside(model):
        for pair in range(_WARM_UP_PAIRS + pairs):
            # The order turns round with every pair, so that drift of the machine favours nobody.
            arms = [(off, None), (on, every_step), (again, None)]
            for times, settings in arms if pair % 2 else reversed(arms):
                times.append(_step_ms(model, batch, settings))
    off, on, again = (times[_WARM_UP_PAIRS:] for times in (off, on, again))
    base = [(a + b) / 2 for a, b in zip(off, again, strict=True)]
    measured = statistics.median(x / y for x, y in zip(on, base, strict=True))
    identical = [x / y for x, y in zip(off, again, strict=True)]
    return Overhead(
        off_ms=statistics.median(base),
        on_ms=statistics.median(on),
        noise=median_error(identical) / spread,
        ratio=1 + (measured - 1) / spread,
    )


def _step_ms(model: nn.Module, batch: dict, config: MonitorConfig | None) -> float:
    step = Steps(model, batch)
    if config is None:
        started = perf_counter()
        step()
        return 1e3 * (perf_counter() - started)
    with Monitor(model, config) as monitor:
        started = perf_counter()
        step()
        monitor.step()
        return 1e3 * (perf_counter() - started)


@contextmanager
def _gradients_set_aside(model: nn.Module) -> Iterator[None]:
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
