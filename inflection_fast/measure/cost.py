"""What measuring costs a training step: an interleaved benchmark in one process, with its noise.

An arm is a function that runs one step, forward and backward. A round runs every arm once, in a new random order, so
that a disturbance of the machine affects all arms alike. The unmonitored arm runs twice (A/A): the difference between
these two is the noise of the benchmark.
"""

from __future__ import annotations

import operator
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import nn

from .config import EVERY, MonitorConfig
from .hooks import gradients_set_aside
from .micro_batch import loss_of, tensors_of
from .monitor import Monitor

__all__ = [
    "AGAIN", "UNMONITORED", "Cost", "Overhead", "Steps", "costs", "extra_bytes", "measure_overhead",
    "median_error", "race",
]  # fmt: skip

UNMONITORED, _MEASURED, AGAIN = "unmonitored", "measured", "unmonitored, again"
WARM_UP_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 2, 5, 200


class Steps:
    """Training steps of a model on one batch, without an optimizer.

    Args:
        model: in the state in which it trains, compiled or not; a loss among its outputs is used, else the mean of its
            first output.
        batch: its inputs.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, object]):
        self.model, self.batch = model, dict(batch)

    def __call__(self) -> None:
        """One forward and one backward pass. `ValueError` if the model returns neither a loss nor numbers."""
        self.model.zero_grad(set_to_none=True)
        output = self.model(**self.batch)
        loss = loss_of(output)
        if loss is None:
            first = next(tensors_of(output), None)
            if first is None:
                name = type(self.model).__name__
                raise ValueError(f"model: {name} returned neither a loss nor a floating-point tensor")
            loss = first.float().mean()
        loss.backward()
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)

    @contextmanager
    def watched(self, config: MonitorConfig) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """Two arms under one monitor: a measured step, and a step of the same monitor that is not measured.

        All quantities of `config` are due in a measured step. Between the arms no hook is on the model. In a compiled
        model the taps stay in the graph.
        """
        every_other = replace(config, every=dict.fromkeys(config.names, 2), probe_every=None)
        with Monitor(self.model, every_other, alerts=None) as monitor:
            self()
            monitor.step()

            def measured() -> None:
                monitor.step()  # ends a step that is not measured
                self()
                monitor.step()

            yield measured, self


def race(
    arms: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int = MOST_ROUNDS, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of each arm in each round, after `WARM_UP_ROUNDS` that are not counted.

    Args:
        arms: by name.
        seconds: no round begins later, but at least `LEAST_ROUNDS` run.
        rounds: upper limit of their number.
        seed: of the order of the arms.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {label: [] for label in arms}
    until = float("inf")
    for number in range(WARM_UP_ROUNDS + rounds):
        if number == WARM_UP_ROUNDS:
            until = perf_counter() + seconds
        if number >= WARM_UP_ROUNDS + LEAST_ROUNDS and perf_counter() > until:
            break
        for label in order.sample(list(arms), len(arms)):
            started = perf_counter()
            arms[label]()
            if number >= WARM_UP_ROUNDS:
                times[label].append(1e3 * (perf_counter() - started))
    return times


@dataclass(frozen=True)
class Cost:
    """What an arm adds to an unmonitored step."""

    label: str
    ms: float  # median
    added: float  # median over rounds of the ratio to the unmonitored steps (of A/A: to the other one), minus 1
    error: float  # standard error of that median
    rounds: int


def costs(times: Mapping[str, list[float]]) -> list[Cost]:
    """The cost of every arm; `times` has the arms `UNMONITORED` and `AGAIN`."""
    base = [(a + b) / 2 for a, b in zip(times[UNMONITORED], times[AGAIN], strict=True)]
    found = []
    for label, values in times.items():
        beside = times[UNMONITORED] if label == AGAIN else values if label == UNMONITORED else base
        ratios = [x / y for x, y in zip(values, beside, strict=True)]
        found.append(
            Cost(label, statistics.median(values), statistics.median(ratios) - 1, median_error(ratios), len(values))
        )
    return found


def median_error(values: list[float]) -> float:
    """Standard error of the median of independent values."""
    center = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - center) for value in values)  # of a normal distribution
    return 1.2533 * deviation / len(values) ** 0.5


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of GPU memory that `call` allocates; None on a CPU, which has no such counter."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
    """Time `pairs` rounds of three steps on one batch: unmonitored, measured, unmonitored (`race`).

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
    device = next(model.parameters()).device
    generators = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with gradients_set_aside(model), generators, steps.watched(config) as (measured, _):
        times = race({UNMONITORED: steps, _MEASURED: measured, AGAIN: steps}, seconds=float("inf"), rounds=pairs)
    cost = {one.label: one for one in costs(times)}
    return Overhead(
        off_ms=cost[UNMONITORED].ms,
        on_ms=cost[_MEASURED].ms,
        noise=cost[AGAIN].error / spread,
        ratio=1 + cost[_MEASURED].added / spread,
    )
