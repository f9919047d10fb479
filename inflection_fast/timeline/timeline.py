"""A timeline in memory."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrow import read
from .signals import signal_shapes

__all__ = ["FILE_NAME", "Timeline", "stack"]

FILE_NAME = "timeline.arrows"


@dataclass(frozen=True, eq=False)
class Timeline:
    """What was measured, in `S` steps, `L` layers (transformer blocks in order) and `H` heads. NaN: no value."""

    steps: np.ndarray  # [S] int64, optimizer steps, strictly increasing
    entropy: np.ndarray  # [S, L, H] nats, mean over valid query rows
    entropy_se: np.ndarray  # [S, L, H] nats, standard error of that mean from sampling rows (0: all rows)
    max_logit: np.ndarray  # [S, L, H]
    collision: np.ndarray  # [S, L, H] mean sum of squared probabilities
    sink: np.ndarray  # [S, L, H] mean probability of the first key, or of the sink column where there is one
    probe_entropy: np.ndarray  # [S, L, H] nats, mean over the valid query rows of the probe set
    activation_grad: np.ndarray  # [S, L] l2 norm of dL/d(output of the block)
    parameter_grad: np.ndarray  # [S, L] l2 norm over the block's parameters
    delta_cka: np.ndarray  # [S, L]
    delta_cka_se: np.ndarray  # [S, L] standard error of it, from leaving out sequences of the probe; NaN: not asked for
    probe_activation_grad: np.ndarray  # [S, L] as activation_grad, over the probe set
    loss: np.ndarray  # [S]
    skipped: np.ndarray  # [S] 1: a gradient scaler dropped the step, whose gradients were not finite; 0: it did not
    missing_ranks: np.ndarray  # [S] processes that train along and whose share is in no value of the step, being lost
    measure_ms: np.ndarray  # [S] host time, the probe included
    probe_ms: np.ndarray  # [S] host time of the snapshot of the probe
    layers: list[str]  # names of the blocks
    meta: dict  # format, layers, heads, model, config, versions
    truncated: bool = False  # a torn end was dropped while loading

    @property
    def heads(self) -> int:
        """The number of attention heads `H`."""
        return self.entropy.shape[2]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Timeline:
        """Read a timeline from its file, or from the folder that holds it.

        A torn end (the writer was killed, the disk was full) is dropped with a warning and `truncated` is set; every
        whole batch before it is kept. `FileNotFoundError` if there is none, `ValueError` if the file is not a
        timeline.
        """
        path = _file_of(path)
        rows, meta, torn = read(path)
        if torn:
            last = f"after step {rows[-1][0]}" if rows else "before the first step"
            warnings.warn(f"{path} ends in {torn} unreadable bytes {last}; they were dropped", stacklevel=2)
        return stack(rows, meta, truncated=torn > 0)


def _file_of(path: str | os.PathLike) -> Path:
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no timeline at {path}")
    return path


def stack(rows: list, meta: dict, *, truncated: bool) -> Timeline:
    """A timeline of rows (step, signals by name)."""
    signals = {}
    for name, shape in signal_shapes(len(meta["layers"]), meta["heads"]).items():
        signals[name] = np.array([values[name] for _, values in rows], np.float64).reshape(len(rows), *shape)
    steps = np.array([step for step, _ in rows], np.int64)
    return Timeline(steps=steps, **signals, layers=list(meta["layers"]), meta=meta, truncated=truncated)
