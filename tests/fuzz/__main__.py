"""Runs random cases for some minutes, prints counts, and for each failure the line that repeats it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .targets import FILES, OPERATORS, TARGETS, run_one
from .work import prepare, work

REPORTED = 3  # failures of a target that are printed whole


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="stop after about so many")
    parser.add_argument("--seed", type=int, help="of the first case of every target; none: from the clock, and printed")
    parser.add_argument("--only", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}; or: operators, files")
    parser.add_argument("--emulated", choices=("plain", "sanitized"), help="run the CUDA kernels under the emulator")
    parser.add_argument("--most", type=int, help="no dimension of a tensor is larger: many small cases")
    parser.add_argument("--replay", metavar="TARGET:SEED", help="run one case and let its error through")
    given = parser.parse_args()
    if given.replay:
        prepare(given.emulated)
        name, seed = given.replay.split(":")
        run_one(name, int(seed), given.most)
        print("the case passes")
        return 0
    groups = {"operators": list(OPERATORS), "files": list(FILES)}
    names = [name for part in given.only.split(",") for name in groups.get(part, [part])]
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(TARGETS)}")
    seed = int(time.time()) * 1_000_000 if given.seed is None else given.seed
    options = f" --emulated {given.emulated}" if given.emulated else ""
    options += f" --most {given.most}" if given.most else ""
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "found.json"
        arguments = (names, seed, given.minutes, given.cases, given.emulated, given.most, str(note))
        process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        process.start()
        process.join()
        found = json.loads(note.read_text()) if note.is_file() else {"counts": {}, "failed": []}
        now = note.with_suffix(".now")
        if process.exitcode:
            case = now.read_text() if now.is_file() else "the start"
            found["failed"].append(
                [*case.partition(":")[::2], f"exit status {process.exitcode}", "the process ended\n"]
            )
    shown: Counter = Counter()
    for name, case, kind, text in found["failed"]:
        shown[name] += 1
        if shown[name] <= REPORTED:
            print(f"\n{kind}: python -m tests.fuzz{options} --replay {name}:{case}\n{text}")
        else:
            print(f"{kind}: --replay {name}:{case}")
    for name, count in found["counts"].items():
        print(f"{name:16} {count:8} cases, {shown[name]} failed")
    print(f"{'all':16} {sum(found['counts'].values()):8} cases, {len(found['failed'])} failed")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
