"""Renders the results into README and docs/quantities.md, between markers: `python benchmarks/table.py [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
QUANTITIES = ROOT / "docs" / "quantities.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LINE = "quantities on a training step of "  # cases with a table of their own; benchmarks/bench_quantities.py


def main(arguments: list[str]) -> int:
    """Rewrite the tables; with --check, only say whether they differ from the results."""
    results = [json.loads(path.read_text()) for path in result_files()]
    fresh = {}
    for path, render in ((README, table), (QUANTITIES, costs)):
        fresh[path] = replaced(path.read_text(), "\n\n".join(filter(None, map(render, results))))
    if "--check" in arguments:
        return int(any(path.read_text() != text for path, text in fresh.items()))
    for path, text in fresh.items():
        path.write_text(text)
    return 0


def result_files() -> list[Path]:
    """One file per machine, in a stable order."""
    return sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def replaced(text: str, body: str) -> str:
    """`text` with `body` between the markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def table(results: dict) -> str | None:
    """One machine: a line a case, how many times as fast as each rival, and the goal where there is one.

    None where only quantities were measured on it.
    """
    machine, cases = results["machine"], {k: case for k, case in results["cases"].items() if not k.startswith(LINE)}
    if not cases:
        return None
    lines = [
        f"{machine['name']}, torch {machine['torch']}; medians; `x2.0` means that the rival takes twice our time",
        "",
        "| case | ours, ms | rivals | extra |",
        "|---|---|---|---|",
    ]
    for name, case in cases.items():
        rivals = "<br>".join(rival(case, label) for label in case["ratios"])
        extra = "<br>".join(f"{key}: {value:.3g}" for key, value in case["extra"].items())
        lines.append(f"| {name} | {case['ms'][case['ours']]['p50']:.3g} | {rivals} | {extra} |")
    return "\n".join(lines)


def costs(results: dict) -> str | None:
    """One machine: a line for each shape and quantity, percent of a step; None: they were not measured on it."""
    machine, lines = results["machine"], []
    for name, case in results["cases"].items():
        if not name.startswith(LINE):
            continue
        extra, step = case["extra"], case["ms"][case["ours"]]["p50"]
        noise = extra["% between two unmonitored steps"]
        lines.append(f"| {name.removeprefix(LINE)} | *two unmonitored steps, {step:.4g} ms* | {noise:.2f} | |")
        for label in case["ratios"]:
            every = [extra.get(f"{label}, % at every {n} steps") for n in (1, 10)]
            if None not in every:
                lines.append(f"| | `{label}` | {every[0]:+.2f} | {every[1]:+.2f} |")
    if not lines:
        return None
    head = [f"{machine['name']}, torch {machine['torch']}; percent of an unmonitored step", ""]
    return "\n".join([*head, "| training | quantity | every step | every 10 |", "|---|---|---|---|", *lines])


def rival(case: dict, label: str) -> str:
    """`eager x31.2 (goal x20)`, with "missed" where it is."""
    ratio, goal = case["ratios"][label], case["goals"].get(label)
    told = f"{label} x{ratio:.2f}"
    return told if goal is None else f"{told} (goal x{goal:g}{'' if ratio >= goal else ', missed'})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
