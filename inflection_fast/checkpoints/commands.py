"""`inflection-fast compare` and `inflection-fast scan`."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from inflection_fast.checkpoints.files import Source, find
from inflection_fast.run.chatter import quiet_libraries
from inflection_fast.run.errors import UserError, user_errors

if TYPE_CHECKING:
    from rich.console import Console
    from inflection_fast.checkpoints.loading import Loaded

__all__ = ["compare_command", "scan_command"]

TEXTS, TOKENS = 64, 128


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"inflection-fast {name}",
        description=description,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=22, width=100),
    )


def _about_texts(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--data", metavar="FILE", help=f"texts: .txt with one on each line, .csv, .jsonl, ...; {default}")
    parser.add_argument("--text", metavar="COLUMN", help="the column of the texts (text)")
    parser.add_argument("--texts", type=_positive, default=TEXTS, metavar="N", help=f"the first N of them ({TEXTS})")
    parser.add_argument("--tokens", type=_positive, default=TOKENS, metavar="N", help=f"cut each to N tokens ({TOKENS})")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def _folder(given: str | None, kind: str, *models: str) -> Path:
    """Where the page goes; the names of the models make it, if nobody says."""
    if given is not None:
        return Path(given).expanduser()
    parts = [Path(model).name or "model" for model in models]
    return Path(kind) / "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)


def _fresh(folder: Path) -> None:
    """Earlier timelines of such a folder go; a folder with anything else's run in it stays as it is."""
    if (folder / "run.json").exists() or (folder / "timeline.arrows").exists() and not (folder / "scan.json").exists():
        raise UserError(f"{folder}: holds another measurement; name another folder with --out")
    for path in (*folder.glob("timeline.arrows"), *folder.glob("*/timeline.arrows"), *folder.glob("probe_reference.npz"),
                 *folder.glob("*/probe_reference.npz")):  # fmt: skip
        path.unlink()


# ---- compare ---------------------------------------------------------------------------------------------------------


def compare_command(argv: Sequence[str], console: Console) -> int:
    """`inflection-fast compare A B`."""
    parser = _parser("compare", "Compare two checkpoints of one model, or two models, layer by layer on the same texts.")
    parser.add_argument("a", metavar="A", help="a model: a folder, a .gguf file or a name on the hub")
    parser.add_argument("b", metavar="B", help="the other one")
    _about_texts(parser, "without it 64 sentences of our own")
    parser.add_argument("--rank", type=_positive, metavar="K", help="delta-CKA in a shared basis of K directions (all)")
    parser.add_argument("--biased", action="store_true", help="biased CKA (debiased)")
    parser.add_argument("--out", metavar="FOLDER", help="for the page and comparison.json (comparisons/A-B)")
    asked = parser.parse_args(argv)
    quiet_libraries()
    from inflection_fast.checkpoints.comparison import compare
    from inflection_fast.checkpoints.comparison_views import comparison_look, show_comparison
    from inflection_fast.checkpoints.loading import load
    from inflection_fast.checkpoints.texts import own_texts, read_texts
    from inflection_fast.report.look import write_look

    began = time.perf_counter()
    sources = find(asked.a), find(asked.b)
    names = _names(sources)
    texts = own_texts()[: asked.texts] if asked.data is None else read_texts(asked.data, asked.text, asked.texts)
    models = [load(source) for source in sources]
    loaders, pooling = _loaders(sources, models, texts, asked.tokens)
    folder = _folder(asked.out, "comparisons", *names)
    _fresh(folder)
    with user_errors(ValueError, about=f"{names[0]} and {names[1]} cannot be compared"):
        found = compare(
            models[0].model, models[1].model, loaders[0], loader_b=loaders[1], rank=asked.rank,
            debiased=not asked.biased, pooling=pooling, out=folder,
        )  # fmt: skip
    found.save(folder / "comparison.json")
    source = f"{len(texts)} texts of {'our own' if asked.data is None else asked.data}"
    write_look(comparison_look(found, names, str(folder), source), folder / "index.html")
    show_comparison(found, names, console)
    console.print(f"page: {folder / 'index.html'} ({time.perf_counter() - began:.0f} s)", markup=False)
    return 0


def _names(sources: Sequence[Source]) -> tuple[str, str]:
    """The models as they are called on the page: the shortest paths from the end that differ."""
    a, b = (tuple(Path(source.name).parts) for source in sources)
    for length in range(1, max(len(a), len(b)) + 1):
        if a[-length:] != b[-length:]:
            return "/".join(a[-length:]), "/".join(b[-length:])
    return sources[0].name, sources[1].name


def _loaders(
    sources: Sequence[Source], models: Sequence[Loaded], texts: Sequence[str], tokens: int
) -> tuple[list[list[Mapping[str, Tensor]]], str]:
    """The same texts for both models, and what a row is: a token where both take the same ones, else a text."""
    from inflection_fast.checkpoints.loading import tokenizer_of
    from inflection_fast.checkpoints.texts import batches_of, token_budget

    tokenizers = [tokenizer_of(source) for source in sources]
    ids = [[one(text, truncation=True, max_length=tokens)["input_ids"] for text in texts] for one in tokenizers]
    long = [text for text, *both in zip(texts, *ids, strict=True) if min(map(len, both)) > 1]
    causal = all(model.task == "causal" for model in models)
    same = ids[0] == ids[1]
    made = [
        batches_of(
            long,
            tokenizer,
            model,
            tokens=tokens,
            budget=min(map(token_budget, models)),
            task="causal" if causal else "plain",
            size=None if same else 8,  # batches of other tokens have to hold the same texts
        )
        for tokenizer, model in zip(tokenizers, models, strict=True)
    ]
    return [[batch.inputs for batch in side] for side in made], "tokens" if same else "mean"
