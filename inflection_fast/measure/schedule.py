"""When to measure, and which query rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

__all__ = [
    "MOST_LISTS",
    "LayerIndices",
    "ProbeBudget",
    "ProbeClock",
    "Recent",
    "RowSampler",
    "Strata",
    "is_due",
    "seed_of",
]

MOST_LISTS = 512  # of layers, of which tensors are kept: where layers are dropped at random, every step has others


def is_due(step: int, every: int) -> bool:
    """Whether optimizer step `step` (0-based) is one of 0, every, 2 * every, ..."""
    return step % every == 0


class ProbeBudget:
    """When the probe is run: as the quantities say that need it, but so seldom that it keeps to its share of the time.

    The decision follows from what a run and the training steps before it took. Several ranks decide by the means over
    all of them, which their recorders' threads know a little later; the training's threads ask only at the next step at
    which a run could be due, when those have long arrived.

    Args:
        every: cadence by quantity.
        share: of the training time; None: no bound.
        first_step: of the run.
        joined: other ranks decide along; then `decide` is called for every run, in whatever thread.
        patience_s: how long to wait for a decision; after that the one before holds.
    """

    def __init__(
        self, every: Mapping[str, int], share: float | None, first_step: int, *, joined: bool, patience_s: float
    ):
        self._every, self._share, self._joined, self._patience_s = dict(every), share, joined, patience_s
        self.first_step = first_step
        self._last = dict.fromkeys(every, first_step - 1)
        self._next = self._at = first_step
        self._spent_ms = self.later_ms = 0.0  # the latter is what a run took after it, in another thread
        self._decided = threading.Event()
        self._decided.set()

    def due(self, step: int) -> frozenset[str]:
        """The quantities to measure at `step`."""
        if not self._is_candidate(step):
            return frozenset()
        self._decided.wait(self._patience_s)
        if step < self._next:
            return frozenset()
        return frozenset(name for name, every in self._every.items() if step // every > self._last[name] // every)

    def _is_candidate(self, step: int) -> bool:
        return any(is_due(step, every) for every in self._every.values())

    def is_over(self, probe_ms: float, step_ms: float) -> bool:
        """Whether a run takes more than its share of the steps from one to the next, as quantities ask for them."""
        if self._share is None or self._spent_ms + probe_ms <= FREE_MS:
            return False
        return probe_ms > self._share * step_ms * min(self._every.values())

    def run(self, step: int, quantities: Collection[str], probe_ms: float, step_ms: float) -> int | None:
        """The probe was run at `step`. Returns the steps to the next run, where other ranks need not be asked."""
        self._last |= dict.fromkeys(quantities, step)
        self._at, self._next = step, step + 1
        self._decided.clear()
        return None if self._joined else self.decide(probe_ms, step_ms)

    def decide(self, probe_ms: float | None, step_ms: float | None) -> int:
        """Fix the next step with a run, from the times of the last one; None: nobody knows. Returns their distance."""
        steps = 1
        if probe_ms is not None and step_ms is not None:
            self._spent_ms += probe_ms
            if self._share is not None and self._spent_ms > FREE_MS and step_ms > 0:
                steps = math.ceil(probe_ms / (self._share * step_ms))
        self._next = self._at + steps
        self._decided.set()
        return min(-(-self._next // every) * every for every in self._every.values()) - self._at


class ProbeClock:
    """What a run of the probe takes, without waiting for a device: of a GPU, the last run of which the end was seen.

    A run has two parts: the forward passes, and what is made of them.
    """

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._runs: list[list[torch.cuda.Event]] = []
        self._times = [0.0, 0.0, 0.0]
        self.last_ms = self.after_ms = 0.0  # of the whole run, and of its second part

    def begin(self) -> None:
        """Before a run."""
        self._times[0] = perf_counter()
        if self._gpu:
            self._runs.append([torch.cuda.Event(enable_timing=True) for _ in range(3)])
            self._runs[-1][0].record()

    def seen(self) -> None:
        """After the forward passes."""
        self._mark(1)

    def end(self) -> None:
        """After the run: fix its times."""
        self._mark(2)
        begun, seen, ended = self._times
        parts = [(1e3 * (ended - begun), 1e3 * (ended - seen))]
        for first, between, last in self._runs:
            if last.query():
                parts.append((first.elapsed_time(last), between.elapsed_time(last)))
        self._runs = self._runs[-1:]
        self.last_ms, self.after_ms = max(parts[0], parts[-1])

    def _mark(self, place: int) -> None:
        self._times[place] = perf_counter()
        if self._gpu:
            self._runs[-1][place].record()


FREE_MS = 1000.0  # of runs of the probe in all, before their share of the training time counts


class Recent(dict):
    """A dict with no more than `most` keys, which a run of months does not fill: a new one replaces the oldest."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __setitem__(self, key, value) -> None:
        if key not in self and len(self) == self._most:
            del self[next(iter(self))]
        super().__setitem__(key, value)


class LayerIndices(Recent):
    """Tuples of layers as int64 tensors on a device, each brought there once: a copy from the host takes its time."""

    def __init__(self, device: torch.device):
        super().__init__(MOST_LISTS)
        self._device = device

    def __missing__(self, layers: tuple[int, ...]) -> Tensor:
        self[layers] = torch.tensor(layers).to(self._device, non_blocking=True)
        return self[layers]


@dataclass(frozen=True)
class Strata:
    """Sampled query positions: one out of each of R strata, consecutive and of nearly equal size, that cover [0, T)."""

    rows: Tensor | None  # [R] int64, increasing; None: every position is measured
    weights: Tensor  # [R] float64, positions that each sampled one stands for
    difference_weights: Tensor  # [R - 1] float64, see `_difference_weights`; empty where every position is measured

    def within(self, cu_seqlens: Tensor) -> Strata:
        """The same for sequences that are packed into one row and begin at `cu_seqlens` [S + 1].

        A sample has neighbours in its own sequence only, because what is measured jumps from one to the next; one
        without any keeps those that it had.
        """
        if self.rows is None or len(self.rows) < 2:
            return self
        sequence = torch.searchsorted(cu_seqlens.to(self.rows), self.rows, right=True)
        same = sequence[1:] == sequence[:-1]  # [R - 1]
        beside = torch.nn.functional.pad(same, (1, 1)).double()
        neighbours = beside[:-1] + beside[1:]  # [R]
        alone = neighbours == 0
        edges = torch.full_like(neighbours, 2.0)
        edges[0] = edges[-1] = 1.0
        share = self.weights * (self.weights - 1) / (2 * torch.where(alone, edges, neighbours))
        return replace(self, difference_weights=share[:-1] * (same | alone[:-1]) + share[1:] * (same | alone[1:]))


class RowSampler:
    """Draws query positions from a seed: the same seed, step and order of lengths give the same positions.

    Of `share` = (i, n), sampler i of n takes every n-th draw: together they draw what one would for all their batches.
    """

    def __init__(self, rows: int | None, seed: int, device: torch.device):
        self._rows, self._seed, self._device = rows, seed, device
        self.share = (0, 1)
        self._generator = torch.Generator()
        # What does not depend on the draw, (first positions, sizes, weights) by length.
        self._shapes: dict[int, tuple[Tensor, Tensor, Tensor]] = Recent(MOST_LENGTHS)

    def begin(self, step: int) -> None:
        """Start the draws of one step, whatever was drawn before: a resumed run samples the same rows."""
        self._generator.manual_seed(seed_of(step, self._seed))

    def draw(self, length: int) -> Strata:
        """Positions out of [0, length), fresh with every call; all of them if there are no more than `rows`."""
        if self._rows is None or length <= self._rows:
            ones = torch.ones(length, dtype=torch.float64, device=self._device)
            return Strata(None, ones, ones[:0])
        starts, sizes, weights = self._shape_of(length, self._rows)
        ends = torch.cat([starts[1:], starts.new_tensor([length])])
        offsets = self.uniform() * (ends - starts)
        return Strata(self._there(starts + offsets.long()), sizes, weights)

    def uniform(self) -> Tensor:
        """[rows] float64 on the host, in [0, 1): where in its stratum each position of the next draw lies."""
        if self._rows is None:
            raise ValueError("all rows are measured: no position is drawn")
        own, samplers = self.share
        return torch.rand(samplers, self._rows, generator=self._generator, dtype=torch.float64)[own]

    def _shape_of(self, length: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        if length not in self._shapes:
            starts, sizes = _strata(length, rows)
            self._shapes[length] = (starts, self._there(sizes), self._there(_difference_weights(sizes)))
        return self._shapes[length]

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)  # else the host would wait for all that the device has to do


MOST_LENGTHS = 32  # of sequences, of which the strata are kept: batches may all be of different lengths


# Knuth's multiplier scatters the steps over the 32 bits that torch's generator on the CPU takes of a seed.
_STEP_STRIDE = 2654435761


def seed_of(step: int, seed: int) -> int:
    """Of what is drawn at a step of a run with `seed`."""
    return _STEP_STRIDE * step + seed


def _strata(length: int, rows: int) -> tuple[Tensor, Tensor]:
    """First position and size of each of `rows` strata of [0, length)."""
    bounds = torch.arange(rows + 1) * length // rows
    return bounds[:-1], bounds.diff().double()


def _difference_weights(sizes: Tensor) -> Tensor:
    """Weights of the squared differences between neighbouring samples in the variance of the estimated total.

    With one sample per stratum the variance inside stratum r comes from its neighbours (collapsed strata): s_r^2 is
    the mean of (e_r - e_{r-1})^2 / 2 and (e_{r+1} - e_r)^2 / 2. The variance of the total is then
    sum_r n_r^2 (1 - 1 / n_r) s_r^2: the bracket corrects for the finite population, and a stratum of one position
    adds nothing.
    """
    neighbours = torch.full_like(sizes, 2.0)
    neighbours[0] = neighbours[-1] = 1.0
    share = sizes * (sizes - 1) / (2 * neighbours)
    return share[:-1] + share[1:]
