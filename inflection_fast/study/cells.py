"""The grid: the cells of a study, and the order in which they are computed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from inflection_fast.study.arms import arm_of
from inflection_fast.study.config import StudyConfig, WaveConfig

__all__ = ["Cell", "Job", "cells_of", "jobs_of"]

SHALLOW = "shallow"  # the arm whose training is the measured one


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    transfer: str
    regime: str
    arm: str
    seed: int
    draw: int | None = None

    @property
    def name(self) -> str:
        """The name in the folder of the study."""
        draw = "" if self.draw is None else f"-{self.draw}"
        return f"{self.transfer}/{self.regime}/{self.arm}{draw}/{self.seed}"


@dataclass(frozen=True)
class Job:
    """A piece of work: a `source` or `measured` training that cells share, one training of a search, or a cell."""

    what: str  # source, probes, tune, cell, gradients
    transfer: str
    regime: str
    arm: str = ""
    rate: float | None = None
    cell: Cell | None = None

    @property
    def name(self) -> str:
        """The name for the reader."""
        if self.cell is not None:
            return self.cell.name
        rate = "" if self.rate is None else f"/{self.rate:g}"
        return "/".join(part for part in (self.what, self.transfer, self.regime, self.arm) if part) + rate


def cells_of(config: StudyConfig, only: str | None = None) -> list[Cell]:
    """All cells in the order of computing: by wave, seed, transfer and regime.

    The cells of one seed, transfer and regime stand together, so that a study that is stopped holds whole comparisons.
    `only` is a pattern as of a shell, over names such as `tweets_reviews/over/greedy/1`; of `jobs_of` also over those
    of trainings that are measured all along, such as `gradients/tweets_reviews/over/greedy`.
    """
    cells = [cell for wave in config.waves for cell in _of_wave(config, wave)]
    return [cell for cell in dict.fromkeys(cells) if only is None or fnmatch.fnmatchcase(cell.name, only)]


def _of_wave(config: StudyConfig, wave: WaveConfig) -> Iterator[Cell]:
    transfers = wave.transfers or [name for name, transfer in config.transfers.items() if transfer.pooled]
    for seed, transfer, regime, arm in product(wave.seeds or config.seeds, transfers, config.regimes, wave.arms):
        draws = range(config.draws) if arm_of(arm).draws else [None]
        yield from (Cell(transfer, regime, arm, seed, draw) for draw in draws)


def jobs_of(config: StudyConfig, only: str | None = None) -> list[Job]:
    """The jobs behind the cells, in the order of computing. Shared work stands before the first cell that needs it."""
    cells = cells_of(config, only)
    regimes = {cell.regime for cell in cells}
    tuning = [
        (transfer, regime) for transfer, regime in (c.split("/") for c in config.tuning.cells) if regime in regimes
    ]
    jobs = [Job("source", transfer, regime) for transfer, regime in tuning]
    jobs += [Job("tune", *place, SHALLOW, rate) for place in tuning for rate in rates_of(config, SHALLOW)]
    measured = [Job("gradients", *_parts(cell)) for cell in config.gradients]
    measured = [job for job in measured if only is None or fnmatch.fnmatchcase(job.name, only)]
    for number, wave in enumerate(config.waves):
        for arm in wave.arms:
            if any(cell.arm == arm for cell in cells):
                jobs += [Job("tune", *place, arm, rate) for place in tuning for rate in rates_of(config, arm)]
        selected = set(_of_wave(config, wave))
        for cell in cells:
            if cell in selected:
                jobs += [
                    Job("source", cell.transfer, cell.regime),
                    Job("probes", cell.transfer, cell.regime),
                    Job("cell", cell.transfer, cell.regime, cell.arm, cell=cell),
                ]
        if number == min(1, len(config.waves) - 1):
            jobs += measured
    return list(dict.fromkeys(jobs))


def _parts(cell: str) -> tuple[str, str, str]:
    transfer, regime, arm = cell.split("/")
    return transfer, regime, arm


def rates_of(config: StudyConfig, arm: str) -> tuple[float, ...]:
    """The learning rates that are tried for an arm."""
    return config.rates[getattr(arm_of(arm), "kind", "lora")]
