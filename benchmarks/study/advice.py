"""Writes what the report of a run says of its source, from the published cells of the study.

python benchmarks/study/advice.py
"""

from __future__ import annotations

from pathlib import Path

from inflection_fast import report
from inflection_fast.atomic import write_json
from inflection_fast.study.advice import for_runs
from inflection_fast.study.results import read_results


def main() -> None:
    """Writes the file and says where."""
    found = for_runs(read_results(Path(__file__).parent).pooled())
    if found is None:
        raise SystemExit("fewer than three transfers have cells of every family")
    path = Path(report.__file__).parent / "regime.json"
    write_json(path, found)
    print(path)


if __name__ == "__main__":
    main()
