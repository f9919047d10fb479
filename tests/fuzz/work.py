"""The process that runs cases and notes what failed; one of its own, because a case may end it."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from pathlib import Path

from .targets import run_one

STEP_S = 2.0  # a target runs so long before the next one has its turn


def work(
    names: list[str],
    seed: int,
    minutes: float,
    cases: int | None,
    emulated: str | None,
    most: int | None,
    place: str,
) -> None:
    """Run targets in turn, and note the case that runs, so that a crash can be told."""
    prepare(emulated)
    end, counts, failed = time.monotonic() + 60 * minutes, Counter(), []
    note = Path(place)
    number = dict.fromkeys(names, 0)
    while time.monotonic() < end and (cases is None or sum(counts.values()) < cases):
        for name in names:
            turn = time.monotonic() + STEP_S
            while time.monotonic() < min(turn, end):
                case = seed + number[name]
                note.with_suffix(".now").write_text(f"{name}:{case}")
                try:
                    run_one(name, case, most)
                except Exception as error:
                    failed.append([name, case, type(error).__name__, traceback.format_exc()])
                number[name] += 1
                counts[name] += 1
            note.write_text(json.dumps({"counts": counts, "failed": failed}))
    note.write_text(json.dumps({"counts": counts, "failed": failed}))


def prepare(emulated: str | None) -> None:
    """One thread, and CUDA kernels under the emulator in place of the CPU's where they are asked for."""
    import torch

    torch.set_num_threads(1)
    if emulated is not None:
        from tests.emulation.build import LIBRARY, ROOT, build

        from .sums import Emulated

        folder = ROOT / "build" / "emulation" / emulated
        torch.ops.load_library(str(build(folder, sanitize=emulated == "sanitized")))
        assert (folder / LIBRARY).is_file()
        Emulated.on = True
