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
from inflection_fast.run.errors import UserError, user_errors
from inflection_fast.run.quiet import quiet_libraries

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
    parser.add_argument(
        "--data", metavar="FILE", help=f"texts: .txt with one on each line, .csv, .jsonl, ...; {default}"
    )
    parser.add_argument("--text", metavar="COLUMN", help="the column of the texts (text)")
    parser.add_argument("--texts", type=_positive, default=TEXTS, metavar="N", help=f"the first N of them ({TEXTS})")
    parser.add_argument(
        "--tokens", type=_positive, default=TOKENS, metavar="N", help=f"cut each to N tokens ({TOKENS})"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def _folder(given: str | None, kind: str, *models: str) -> Path:
    """The folder of the page, by default made of the names of the models."""
    if given is not None:
        return Path(given).expanduser()
    parts = [Path(model).name or "model" for model in models]
    return Path(kind) / "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)


def _fresh(folder: Path) -> None:
    """Delete the timelines of an earlier scan or comparison. UserError for the folder of a run."""
    if any((folder / name).exists() for name in ("run.json", "timeline.arrows", "measure")):
        raise UserError(f"{folder}: holds a run; name another folder with --out")
    for name in ("texts", "shuffled", "random", "a", "b"):
        for file in ("timeline.arrows", "probe_reference.npz"):
            (folder / name / file).unlink(missing_ok=True)


# ---- compare ---------------------------------------------------------------------------------------------------------


def compare_command(argv: Sequence[str], console: Console) -> int:
    """`inflection-fast compare A B`."""
    parser = _parser(
        "compare", "Compare two checkpoints of one model, or two models, layer by layer on the same texts."
    )
    parser.add_argument("a", metavar="A", help="a model: a folder, a .gguf file or a name on the hub")
    parser.add_argument("b", metavar="B", help="the other one")
    _about_texts(parser, "without it 64 sentences of our own")
    parser.add_argument("--rank", type=_positive, metavar="K", help="delta-CKA in a shared basis of K directions (all)")
    parser.add_argument("--biased", action="store_true", help="biased CKA (debiased)")
    parser.add_argument("--out", metavar="FOLDER", help="for the page and comparison.json (comparisons/A-B)")
    asked = parser.parse_args(argv)
    quiet_libraries()
    from inflection_fast.checkpoints.comparison import compare
    from inflection_fast.checkpoints.comparison_views import comparison_page, show_comparison
    from inflection_fast.checkpoints.loading import load
    from inflection_fast.checkpoints.texts import built_in_texts, read_texts
    from inflection_fast.report.layer_page import write_layer_page

    began = time.perf_counter()
    sources = find(asked.a), find(asked.b)
    names = _names(sources)
    texts = built_in_texts()[: asked.texts] if asked.data is None else read_texts(asked.data, asked.text, asked.texts)
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
    write_layer_page(comparison_page(found, names, str(folder), source), folder / "index.html")
    show_comparison(found, names, console)
    console.print(f"page: {folder / 'index.html'} ({time.perf_counter() - began:.0f} s)", markup=False)
    return 0


def _names(sources: Sequence[Source]) -> tuple[str, str]:
    """The names of the models on the page: the shortest ends of their paths that differ."""
    a, b = (tuple(Path(source.name).parts) for source in sources)
    for length in range(1, max(len(a), len(b)) + 1):
        if a[-length:] != b[-length:]:
            return "/".join(a[-length:]), "/".join(b[-length:])
    return sources[0].name, sources[1].name


def _loaders(
    sources: Sequence[Source], models: Sequence[Loaded], texts: Sequence[str], tokens: int
) -> tuple[list[list[Mapping[str, Tensor]]], str]:
    """The same texts for both models, and the pooling: tokens if both have the same ones, else means by text."""
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


# ---- scan ------------------------------------------------------------------------------------------------------------


def scan_command(argv: Sequence[str], console: Console) -> int:
    """`inflection-fast scan MODEL`."""
    parser = _parser("scan", "Say what is unusual in a checkpoint, without training it.")
    parser.add_argument("model", metavar="MODEL", help="a folder, a .safetensors or .gguf file, or a name on the hub")
    _about_texts(parser, "without it weights alone")
    parser.add_argument(
        "--rank", type=_positive, default=4, metavar="R", help="of the adapters that are considered (4)"
    )
    parser.add_argument("--plan", metavar="FILE", help="write the plan: layers to adapt, and why (needs --data)")
    parser.add_argument("--yaml", metavar="TOOL", help="print the plan for axolotl, llama-factory, ms-swift or trl")
    parser.add_argument("--top", type=_positive, metavar="K", help="plan the best K layers, also where none stands out")
    parser.add_argument("--no-weights", action="store_true", help="leave the spectra of the weights out")
    parser.add_argument("--out", metavar="FOLDER", help="for the page, scan.json and timelines (scans/MODEL)")
    asked = parser.parse_args(argv)
    _check_scan(asked)
    quiet_libraries()
    from inflection_fast.checkpoints.scan_views import scan_page, show_scan
    from inflection_fast.checkpoints.scanning import scan
    from inflection_fast.checkpoints.texts import read_texts
    from inflection_fast.decide import SelectConfig
    from inflection_fast.report.layer_page import write_layer_page

    began = time.perf_counter()
    source = find(asked.model)
    texts = None if asked.data is None else read_texts(asked.data, asked.text, asked.texts)
    folder = _folder(asked.out, "scans", asked.model)
    _fresh(folder)
    chosen = None if asked.top is None else SelectConfig(method="top", k=asked.top, significance=None)
    with console.status("reading the model") as status:
        found = scan(
            source.name, texts, out=folder, rank=asked.rank, tokens=asked.tokens, select_config=chosen, yaml=asked.yaml,
            weights=not asked.no_weights, progress=status.update,
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / "scan.json")
    about = "weights alone" if texts is None else f"{found.texts['texts']} texts of {asked.data}"
    write_layer_page(scan_page(found, str(folder), about), folder / "index.html")
    show_scan(found, str(folder), console)
    if found.plan is not None:
        plan = folder / "plan.json" if asked.plan is None else Path(asked.plan).expanduser()
        found.plan.save(plan)
        console.print(f"plan: {plan}", markup=False)
    console.print(f"page: {folder / 'index.html'} ({time.perf_counter() - began:.0f} s)", markup=False)
    if found.yaml is not None:
        console.print(found.yaml, markup=False, end="")
    return 0


def _check_scan(asked: argparse.Namespace) -> None:
    if asked.yaml is not None:
        from inflection_fast.act.export import TOOLS  # brings peft, which a scan needs for nothing else

        if asked.yaml not in TOOLS:
            raise UserError(f"--yaml: expected one of {', '.join(sorted(TOOLS))}, got {asked.yaml}")
    for option in ("plan", "yaml", "top"):
        if asked.data is None and getattr(asked, option) is not None:
            raise UserError(f"--{option}: needs --data, because layers are chosen by what is measured on texts")
    if asked.no_weights and asked.data is None:
        raise UserError("--no-weights: leaves nothing to scan without --data")
