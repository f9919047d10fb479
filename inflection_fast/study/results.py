"""The cells of a study as they were published, read back from their JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from inflection_fast.study.record import FORMAT

__all__ = ["Result", "Results", "read_results"]


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    transfer: str
    regime: str
    arm: str
    draw: int | None
    seed: int
    leaking: bool
    held_out: bool
    content: dict[str, Any]

    @cached_property
    def right(self) -> np.ndarray:
        """For every test text whether the model was right [N] bool; the same texts for one transfer and seed."""
        test = self.metrics["test"]
        bits = f"{int(test['right'], 16):0{test['n']}b}"
        right = np.frombuffer(bits.encode(), np.uint8) == ord("1")
        if len(right) != test["n"] or int(right.sum()) != test["correct"]:
            raise ValueError(f"{self.name}: its test results contradict each other")
        return right

    @property
    def name(self) -> str:
        """The name in the study."""
        return self.content["run_info"]["experiment_name"]

    @property
    def metrics(self) -> dict[str, Any]:
        """`test` and `source_after`."""
        return self.content["train_info"]["metrics"][0]

    @property
    def accuracy(self) -> float:
        """Share of the test texts that the model was right about."""
        return self.metrics["test"]["accuracy"]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that hold something trained beside the head."""
        return tuple(self.content["run_info"]["peft_config"]["layers"])

    @property
    def forgotten(self) -> float:
        """Accuracy on the source before, less that afterwards."""
        before = self.content["meta_info"]["dataset_info"]["source_training"]["test"]["accuracy"]
        return before - self.metrics["source_after"]["accuracy"]


@dataclass(frozen=True)
class Results:
    """All cells of a study that are there, and what else was published with them."""

    cells: tuple[Result, ...]
    failed: tuple[tuple[str, str], ...]  # name and error
    shared: dict[str, Any]  # by name: {} where there is none

    def pooled(self) -> list[Result]:
        """Cells of the pooled numbers: of transfers that neither leak nor are held out."""
        return [cell for cell in self.cells if not cell.leaking and not cell.held_out]

    def held_out(self) -> list[Result]:
        """Cells of transfers that are held out."""
        return [cell for cell in self.cells if cell.held_out]

    def arms(self, cells: Iterable[Result] | None = None) -> list[str]:
        """Names of arms, in the order of the files."""
        return list(dict.fromkeys(cell.arm for cell in (self.cells if cells is None else cells)))


def read_results(folder: str | os.PathLike) -> Results:
    """The published cells in a folder, or those in the folder of a study.

    FileNotFoundError where there are none; ValueError where a file is none of this format.
    """
    folder = Path(folder)
    paths = sorted((folder / "cells").rglob("*.json"))
    if not paths:
        raise FileNotFoundError(f"there are no cells in {folder / 'cells'}")
    cells, failed = [], []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
            run = content["run_info"]
            if run["error_msg"]:
                failed.append((run["experiment_name"], run["error_msg"]))
                continue
            facts = (run["transfer"], run["regime"], run["arm"], run["draw"], run["seed"], run["leaking"])
            cell = Result(*facts, run.get("held_out", False), content)  # cells of earlier versions: none was held out
            cell.right  # noqa: B018  a damaged file is reported here, with its name
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a cell of a study: {error}") from error
        cells.append(cell)
    shared = {}
    for name in ("rates", "sources", "probes", "choices", "gradients", "confirmations"):
        path = folder / f"{name}.json"
        shared[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Results(tuple(cells), tuple(failed), shared)
