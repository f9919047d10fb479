"""When quantities are measured, and on which query rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

__all__ = [
    "MOST_LISTS", "BoundedDict", "LayerIndices", "ProbeBudget", "ProbeClock", "RowSampler", "Strata", "is_due",
    "seed_of",
]  # fmt: skip

MOST_LISTS = 512  # cached tensors of layer lists: with layers dropped at random, every step has another list


def is_due(step: int, every: int) -> bool:
    """Whether optimizer step `step` (0-based) is one of 0, every, 2 * every, ..."""
    return step % every == 0


@dataclass(eq=False)
class ProbeBudget:
    """When the probe runs: at the cadences of its quantities, but within its share of the training time.

    The next run follows from the time of a run and of the training steps before it. Several ranks use the means over
    all ranks, which their recorders' threads know a little later. The training threads need them only at the next step
    at which a run could be due.
    """

    every: Mapping[str, int]  # cadence by quantity
    share: float | None  # of the training time; None: no limit
    first_step: int  # of the run
    _: KW_ONLY
    joined: bool  # several ranks decide together; then `decide` is called after every run, in any thread
    patience_s: float  # how long to wait for a decision; then the one before holds

    def __post_init__(self):
        self._last = dict.fromkeys(self.every, self.first_step - 1)
        self._next = self._at = self.first_step
        self._spent_ms = self.later_ms = 0.0  # the latter: work of a run in another thread, after it
        self._decided = threading.Event()
        self._decided.set()

    def due(self, step: int) -> frozenset[str]:
        """The quantities to measure at `step`."""
        if not any(is_due(step, every) for every in self.every.values()):
            return frozenset()
        self._decided.wait(self.patience_s)
        if step < self._next:
            return frozenset()
        return frozenset(name for name, every in self.every.items() if step // every > self._last[name] // every)

    def is_over(self, probe_ms: float, step_ms: float) -> bool:
        """Whether a run at the cadences of the quantities takes more than its share of the time."""
        if self.share is None or self._spent_ms + probe_ms <= FREE_MS:
            return False
        return probe_ms > self.share * step_ms * min(self.every.values())

    def run(self, step: int, quantities: Collection[str], probe_ms: float, step_ms: float) -> int | None:
        """The probe was run at `step`. Returns the steps to the next run; None with several ranks."""
        self._last |= dict.fromkeys(quantities, step)
        self._at, self._next = step, step + 1
        self._decided.clear()
        return None if self.joined else self.decide(probe_ms, step_ms)

    def decide(self, probe_ms: float | None, step_ms: float | None) -> int:
        """Fix the next run from the times of the last one (None: not known); returns the steps to it."""
        steps = 1
        if probe_ms is not None and step_ms is not None:
            self._spent_ms += probe_ms
            if self.share is not None and self._spent_ms > FREE_MS and step_ms > 0:
                steps = math.ceil(probe_ms / (self.share * step_ms))
        self._next = self._at + steps
        self._decided.set()
        return min(-(-self._next // every) * every for every in self.every.values()) - self._at


class ProbeClock:
    """Times a run of the probe without waiting for the device; on a GPU the times are those of the last finished run.

    A run has two parts: the forward passes, and the computations on their features.
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
        """After the run."""
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


FREE_MS = 1000.0  # total time of probe runs before the share of the training time is enforced


class BoundedDict(dict):
    """A dict of at most `most` keys: a new key replaces the oldest one."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __setitem__(self, key, value) -> None:
        if key not in self and len(self) == self._most:
            del self[next(iter(self))]
        super().__setitem__(key, value)


class LayerIndices(BoundedDict):
    """Tuples of layers as int64 tensors on a device, cached because a copy from the host takes time."""

    def __init__(self, device: torch.device):
        super().__init__(MOST_LISTS)
        self._device = device

    def __missing__(self, layers: tuple[int, ...]) -> Tensor:
        self[layers] = torch.tensor(layers).to(self._device, non_blocking=True)
        return self[layers]


@dataclass(frozen=True)
class Strata:
    """Sampled query positions: one of each of R consecutive strata of nearly equal size that cover [0, T)."""

    rows: Tensor | None  # [R] int64, increasing; None: every position is measured
    weights: Tensor  # [R] float64, size of each stratum
    difference_weights: Tensor  # [R - 1] float64, see `_difference_weights`; empty where every position is measured

    def within(self, cu_seqlens: Tensor) -> Strata:
        """The same for sequences that are packed into one row and begin at `cu_seqlens` [S + 1].

        Neighbours of a sample are those in its own sequence, because values jump between sequences. A sample without
        any keeps its former neighbours.
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

    With `share` = (i, n) it is sampler i of n and takes every n-th draw: together they draw what one sampler would draw
    for all their batches.
    """

    def __init__(self, rows: int | None, seed: int, device: torch.device):
        self._rows, self._seed, self._device = rows, seed, device
        self.share = (0, 1)
        self._generator = torch.Generator()
        # (first positions, sizes, weights) by length, which do not depend on the draw
        self._shapes: dict[int, tuple[Tensor, Tensor, Tensor]] = BoundedDict(MOST_LENGTHS)

    def begin(self, step: int) -> None:
        """Seed the draws of a step: a resumed run samples the same rows."""
        self._generator.manual_seed(seed_of(step, self._seed))

    def draw(self, length: int) -> Strata:
        """New positions in [0, length); all positions if there are at most `rows`."""
        if self._rows is None or length <= self._rows:
            ones = torch.ones(length, dtype=torch.float64, device=self._device)
            return Strata(None, ones, ones[:0])
        starts, sizes, weights = self._shape_of(length, self._rows)
        ends = torch.cat([starts[1:], starts.new_tensor([length])])
        offsets = self.uniform() * (ends - starts)
        return Strata(self._there(starts + offsets.long()), sizes, weights)

    def uniform(self) -> Tensor:
        """[rows] float64 on the host, in [0, 1): the relative places of the next positions in their strata."""
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
        return tensor.to(self._device, non_blocking=True)  # otherwise the host would wait for the device


MOST_LENGTHS = 32  # cached strata: all batches may have different lengths


# Knuth's multiplier spreads the steps over the 32 bits of a seed of torch's CPU generator.
_STEP_STRIDE = 2654435761


def seed_of(step: int, seed: int) -> int:
    """The seed of a step in a run with `seed`."""
    return _STEP_STRIDE * step + seed


def _strata(length: int, rows: int) -> tuple[Tensor, Tensor]:
    """First position and size of each of `rows` strata of [0, length)."""
    bounds = torch.arange(rows + 1) * length // rows
    return bounds[:-1], bounds.diff().double()


def _difference_weights(sizes: Tensor) -> Tensor:
    """Weights of the squared differences between neighbouring samples in the variance of the estimated total.

    With one sample per stratum, the variance s_r^2 inside stratum r is estimated from its neighbours (collapsed
    strata): the mean of (e_r - e_{r-1})^2 / 2 and (e_{r+1} - e_r)^2 / 2. The variance of the total is
    sum_r n_r^2 (1 - 1 / n_r) s_r^2, with the finite population correction in brackets: 0 for a stratum of one position.
    """
    neighbours = torch.full_like(sizes, 2.0)
    neighbours[0] = neighbours[-1] = 1.0
    share = sizes * (sizes - 1) / (2 * neighbours)
    return share[:-1] + share[1:]
