"""The targets by name, and how one case of them runs."""

from __future__ import annotations

import torch

from inflection_fast.ops.library import ISA_NAMES

from . import attention, files, sums
from .draw import Draw

OPERATORS = {
    "logits": attention.logits,
    "qk": attention.qk,
    "column_mass": attention.column_mass,
    "gradients": attention.gradients,
    "squares": sums.squares,
    "moments": sums.moments,
    "cka": sums.cka,
    "matrix": sums.matrix,
    "jackknife": sums.jackknife,
}
FILES = {
    "timeline": files.timeline,
    "plan": files.plan,
    "record": files.record,
    "settings": files.settings,
    "data": files.data,
    "rows": files.rows,
}
TARGETS = OPERATORS | FILES


def run_one(name: str, seed: int, most: int | None = None) -> None:
    """One case, operators by the kernels of any instruction set that this CPU has; raises what is wrong.

    `most`: no dimension of a tensor is larger; None: as targets choose.
    """
    draw = Draw(seed) if most is None else Draw(seed, most)
    if name in OPERATORS:
        torch.ops.inflection_fast.cpu_isa(draw.whole(0, len(ISA_NAMES)))
    try:
        TARGETS[name](draw)
    finally:
        torch.ops.inflection_fast.cpu_isa(len(ISA_NAMES))
