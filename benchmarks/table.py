"""Renders the results into the README, between its two markers: `python benchmarks/table.py [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(arguments: list[str]) -> int:
    """Rewrite the table; with --check, only say whether it differs from the results."""
    text = README.read_text()
    fresh = replaced(text, "\n\n".join(table(json.loads(path.read_text())) for path in result_files()))
    if "--check" in arguments:
        return int(fresh != text)
    README.write_text(fresh)
    return 0


def result_files() -> list[Path]:
    """One file per machine, in a stable order."""
    return sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def replaced(text: str, body: str) -> str:
    """`text` with `body` between the markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def table(results: dict) -> str:
    """One machine: a line a case, how many times as fast as each rival, and the goal where there is one."""
    machine = results["machine"]
    lines = [
        f"{machine['name']}, torch {machine['torch']}; medians; `x2.0` means that the rival takes twice our time",
        "",
        "| case | ours, ms | rivals | extra |",
        "|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        rivals = "<br>".join(rival(case, label) for label in case["ratios"])
        extra = "<br>".join(f"{key}: {value:.3g}" for key, value in case["extra"].items())
        lines.append(f"| {name} | {case['ms'][case['ours']]['p50']:.3g} | {rivals} | {extra} |")
    return "\n".join(lines)


def rival(case: dict, label: str) -> str:
    """`eager x31.2 (goal x20)`, with "missed" where it is."""
    ratio, goal = case["ratios"][label], case["goals"].get(label)
    told = f"{label} x{ratio:.2f}"
    return told if goal is None else f"{told} (goal x{goal:g}{'' if ratio >= goal else ', missed'})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
