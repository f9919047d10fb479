"""Copies what is published of a study into this folder: one JSON per cell, rates, sources, choices, gradients.

python benchmarks/study/collect.py runs/study benchmarks/study
"""

from __future__ import annotations

import argparse
from pathlib import Path

from inflection_fast.study.publish import publish


def main() -> None:
    """Copies, and says how many cells there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(f"{publish(args.study, args.out)} cells in {args.out / 'cells'}")


if __name__ == "__main__":
    main()
