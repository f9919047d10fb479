"""Python blocks of Markdown files, and what their readers have already: a model, data, an optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Section:
    """The blocks under one heading, which share their names."""

    heading: str
    blocks: list[tuple[int, str]] = field(default_factory=list)  # line of the file, code


def documents() -> list[Path]:
    """The README and every page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def sections(path: Path) -> tuple[list[Section], list[tuple[int, str, str]]]:
    """What runs, by heading, and what does not: (line, title, code)."""
    run, left = [Section("")], []
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            run.append(Section(following.content))
        elif token.type == "fence" and token.info.split()[:1] == ["python"]:
            title = re.search(r'title="([^"]*)"', token.info)
            line = token.map[0] + 1
            if title:
                left.append((line, title[1], token.content))
            else:
                run[-1].blocks.append((line, token.content))
    return [section for section in run if section.blocks], left


def given(folder: Path) -> dict[str, Any]:
    """What a reader has: tiny models on a CPU, made-up batches, and the tensors that formulas speak of."""
    from torch.utils.data import DataLoader

    from helpers import trainers
    from inflection_fast import MonitorConfig, Timeline

    items = trainers.items(240)
    model = peaked()
    x = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(2))
    query, key, value = torch.randn(3, 2, 12, 5, 8, generator=torch.Generator().manual_seed(3))
    return {
        "torch": torch,
        "model": model,
        "data": [items[0] | {"labels": torch.tensor(i % 2)} for i in range(240)],  # so alike that blocks stand out
        "loader": DataLoader(items, batch_size=4),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-2),
        "args": trainers.arguments(folder / "trainer", max_steps=104, learning_rate=1e-5),
        "config": MonitorConfig(every=1),
        "batches": [(*torch.randn(2, 12, 9, 64), torch.arange(9)) for _ in "ab"],
        "before": torch.randn(12, 9, 64),
        "after": torch.randn(12, 9, 64),
        "x": x,
        "y": x.roll(1, -1) + 0.5,
        "query": query,
        "key": key,
        "value": value,
        "valid": torch.ones(2, 5, dtype=torch.bool),
        "logits": torch.randn(3, 7),
        "mask": torch.zeros(3, 7).masked_fill(torch.rand(3, 7) < 0.3, -torch.inf),
        "scale": 0.7,
        "hsic1": hsic1,
        "Timeline": Timeline,
    }


def peaked() -> torch.nn.Module:
    """A classifier of six blocks, of which one attends to few tokens: so there is something to choose."""
    from transformers import BertForSequenceClassification

    import helpers.tiny_texts as tiny

    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(tiny.bert_config(num_hidden_layers=6, num_labels=2, **still))
    with torch.no_grad():
        for part in (model.bert.encoder.layer[2].attention.self.query, model.bert.encoder.layer[2].attention.self.key):
            part.weight.mul_(60)
    return model


def hsic1(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741  the letters of the formula
    """The unbiased estimator of Song et al. 2012 of kernels [..., n, n], as the formula is written."""
    n = k.shape[-1]
    k, l = (m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)) for m in (k.double(), l.double()))  # noqa: E741
    trace = (k * l.mT).sum((-2, -1))
    means = k.sum((-2, -1)) * l.sum((-2, -1)) / ((n - 1) * (n - 2))
    crossed = 2 / (n - 2) * (k.sum(-2) * l.sum(-1)).sum(-1)
    return (trace + means - crossed) / (n * (n - 3))
