"""What measuring costs a training step: an interleaved benchmark in one process, with its noise.

An arm is a function that runs one step, forward and backward. A round runs every arm once, in a new random order, so
that a disturbance of the machine affects all arms alike. The unmonitored arm runs twice (A/A): the difference between
these two is the noise of the benchmark.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import nn

from .config import MonitorConfig
from .micro_batch import loss_of, tensors_of
from .monitor import Monitor

__all__ = ["AGAIN", "UNMONITORED", "Cost", "Steps", "costs", "extra_bytes", "median_error", "race"]

UNMONITORED, AGAIN = "unmonitored", "unmonitored, again"
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
