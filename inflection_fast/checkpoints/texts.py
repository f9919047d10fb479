"""Texts, and the batches of tokens that a model is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from inflection_fast.blocks import find_blocks
from inflection_fast.checkpoints.loading import Loaded
from inflection_fast.run.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "batches_of", "built_in_texts", "read_texts", "shuffled", "token_budget"]

LEAST_BATCHES = 16  # if there are enough texts: differences between batches estimate chance
LEAST_TEXTS = 4  # fewer do not estimate chance
LEAST_TOKENS = {"causal": 2, "masked": 2, "translated": 4, "embedded": 4, "plain": 1}
IGNORED = -100  # the label that losses of Transformers ignore
MASKED_SHARE = 0.15
LEAST_BUDGET = 96 * 2**20  # bytes for activations, if a quarter of the weights is less


@dataclass(frozen=True)
class Batch:
    """Inputs of a model, with labels where its loss takes them."""

    inputs: dict[str, Tensor]
    texts: int


def built_in_texts() -> list[str]:
    """64 English sentences of many kinds, to compare checkpoints without texts of the user."""
    text = (resources.files("inflection_fast.checkpoints") / "sentences.txt").read_text(encoding="utf-8")
    return text.splitlines()


def read_texts(path: str, column: str | None, most: int) -> list[str]:
    """The first texts of a file in a format of `inflection-fast run`. UserError for a file without texts."""
    from inflection_fast.run.config import DataConfig
    from inflection_fast.run.files import load_rows

    file = Path(path).expanduser()
    if file.is_file() and file.suffix.lower() in (".txt", ".csv", ".tsv", ".json", ".jsonl"):
        with open(file, "rb") as head:
            if b"\0" in (begin := head.read(65536)) and not begin.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{path}: is no text, it holds bytes of 0; give a file with one text on each line")
    config = DataConfig(path, text=column or "text")
    found = load_rows(config, [config.text]).columns[config.text]
    texts = [str(text).strip() for text in found if text is not None and str(text).strip()][:most]
    if len(texts) < LEAST_TEXTS:
        raise UserError(
            f"{path}: holds {len(texts)} text{'s' * (len(texts) != 1)}, expected at least {LEAST_TEXTS}, each on a line"
        )
    return texts


def token_budget(loaded: Loaded, *, recomputes: bool = False) -> int:
    """Tokens of one batch whose activations and logits take a quarter of the memory of the weights, or 96 MiB.

    For each token there are the inputs and outputs of every linear layer (with activation checkpointing those of one
    block, and the outputs of all blocks), and the logits, their logarithms and their gradient.
    """
    head = loaded.model.get_output_embeddings()
    vocabulary = head.weight.shape[0] if head is not None and loaded.task != "embedded" else 0
    linear = [m for m in loaded.model.modules() if isinstance(m, nn.Linear) and m is not head]
    sides = sum(m.in_features + m.out_features for m in linear)
    if recomputes:
        blocks = len(find_blocks(loaded.model))
        sides = sides // blocks + blocks * max((m.in_features for m in linear), default=0)
    return max(1, int(max(loaded.weight_bytes / 4, LEAST_BUDGET) / (4 * (sides + 3 * vocabulary) or 1)))


def batches_of(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    *,
    tokens: int,
    budget: int,
    task: str | None = None,
    size: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """The texts, in order, as batches of about `budget` tokens, with labels for the loss of the model.

    Each text is cut to `tokens` tokens, and left out if it has too few for the loss. A batch has at least one text, for
    halves of texts at least four. `task` as in `loading.LOSSES`, or "plain": without labels (None: that of the model);
    `size` is a number of texts instead of the budget.
    """
    task = task or loaded.task
    most = min(tokens, loaded.longest or tokens)
    ids = [_ids(tokenizer, text, most) for text in texts]
    ids = [one for one in ids if len(one) >= LEAST_TOKENS[task]]
    if len(ids) < LEAST_TEXTS:
        raise UserError(f"texts: {len(ids)} have enough tokens to be measured, expected at least {LEAST_TEXTS}")
    least = LEAST_TEXTS if task == "embedded" else 1
    groups = _groups(ids, budget, least, max(least, len(ids) // LEAST_BATCHES))
    if size is not None:
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    rng = np.random.default_rng(seed)
    return [Batch(_labelled(group, tokenizer, loaded.device, task, rng), len(group)) for group in groups]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=most)["input_ids"])


def _groups(ids: list[list[int]], budget: int, least: int, most: int) -> list[list[list[int]]]:
    """Groups of consecutive texts within the budget when padded, of `least` to `most` texts.

    A rest of fewer texts joins the last group.
    """
    groups: list[list[list[int]]] = [[]]
    for one in ids:
        group = groups[-1]
        full = len(group) >= most or (len(group) + 1) * max(map(len, [*group, one])) > budget
        if len(group) >= least and full:
            groups.append([])
        groups[-1].append(one)
    if len(groups) > 1 and len(groups[-1]) < least:
        last = groups.pop()
        groups[-1] += last
    return groups


def _labelled(
    ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device, task: str, rng: np.random.Generator
) -> dict[str, Tensor]:
    def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        full = torch.full((len(rows), longest), int(tokenizer.pad_token_id))
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            full[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return full.to(device), mask.to(device)

    if task in ("embedded", "translated"):
        first, second = ([row[: len(row) // 2] for row in ids], [row[len(row) // 2 :] for row in ids])
        if task == "embedded":
            inputs, mask = padded([*first, *second])
            return {"input_ids": inputs, "attention_mask": mask}
        inputs, mask = padded(first)
        labels, there = padded(second)
        labels = labels.masked_fill(there == 0, IGNORED)
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}
    inputs, mask = padded(ids)
    if task == "plain":
        return {"input_ids": inputs, "attention_mask": mask}
    labels = inputs.masked_fill(mask == 0, IGNORED)
    if task == "masked":
        if tokenizer.mask_token_id is None:
            raise UserError("texts: the model predicts masked tokens, and its tokenizer has no token for a mask")
        chosen = torch.zeros_like(mask, dtype=torch.bool)
        for i, row in enumerate(ids):
            count = max(1, round(MASKED_SHARE * len(row)))
            chosen[i, torch.from_numpy(rng.choice(len(row), count, replace=False)).to(chosen.device)] = True
        labels = labels.masked_fill(~chosen, IGNORED)
        inputs = inputs.masked_fill(chosen, int(tokenizer.mask_token_id))
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def shuffled(batch: Batch, special: Sequence[int], seed: int) -> Batch:
    """The tokens of every text in random order; special tokens keep their positions.

    Labels that equal the inputs by position are permuted with them; those of a decoder are not.
    """
    rng = np.random.default_rng(seed)
    inputs = {name: value.clone() for name, value in batch.inputs.items()}
    keep = torch.tensor(list(special), device=inputs["input_ids"].device)
    free = inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], keep)
    labels = inputs.get("labels")
    paired = labels is not None and labels.shape == free.shape
    if labels is not None and paired:
        paired = bool((labels.eq(inputs["input_ids"]) | labels.eq(IGNORED)).all())
    along = ["input_ids", "labels"] if paired else ["input_ids"]
    for i, row in enumerate(free):
        places = row.argwhere()[:, 0]
        order = places[torch.from_numpy(rng.permutation(len(places))).to(places.device)]
        for name in along:
            inputs[name][i, places] = batch.inputs[name][i, order]
    return Batch(inputs, batch.texts)
