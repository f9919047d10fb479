"""Rows of text become batches of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batches"]

IGNORED = -100  # the label that the losses of Transformers ignore


@dataclass(frozen=True)
class Batches:
    """Makes items from rows, and padded batches from items, for one tokenizer and task.

    For classification, texts are tokenised when a batch is made: a fast tokenizer costs less than the memory of a
    tokenised data set.
    """

    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int

    def items(self, rows: Dataset, *, by_length: bool = False) -> Sequence[Any]:
        """The items that the Trainer draws batches from; with `by_length` sorted by length, for less padding."""
        if self.task == "causal-lm":
            pieces = self._pieces(rows)
            return sorted(pieces, key=len) if by_length else pieces
        columns = [name for name in ("text", "text_pair", "label") if name in rows.column_names]
        values = zip(*(rows[name] for name in columns), strict=True)
        items = [dict(zip(columns, row, strict=True)) for row in values]
        return sorted(items, key=lambda item: len(item["text"])) if by_length else items

    def collate(self, items: Sequence[Any]) -> dict[str, torch.Tensor]:
        """A batch with labels, padded to its longest item."""
        import torch

        batch = self._inputs(items)
        if self.task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        else:
            batch["labels"] = torch.tensor([item["label"] for item in items])
        return batch

    def probe(self, rows: Dataset, size: int) -> list[dict[str, torch.Tensor]]:
        """All rows as batches without labels."""
        items = self.items(rows, by_length=True)[: len(rows)]
        return [self._inputs(items[i : i + size]) for i in range(0, len(items), size)]

    def _inputs(self, items: Sequence[Any]) -> dict[str, torch.Tensor]:
        if self.task == "causal-lm":
            return dict(self.tokenizer.pad({"input_ids": [item.tolist() for item in items]}, return_tensors="pt"))
        texts = [item["text"] for item in items]
        pairs = [[item["text_pair"] or "" for item in items]] if "text_pair" in items[0] else []
        options = {"truncation": True, "max_length": self.max_length, "padding": True, "return_tensors": "pt"}
        return dict(self.tokenizer(texts, *pairs, **options))

    def _pieces(self, rows: Dataset) -> list[np.ndarray]:
        """Every text in pieces of at most `max_length` tokens. Texts are not joined, so none attends to another."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        pieces = []
        chats = "rendered" in rows.column_names  # the template has added the special tokens
        options = {"truncation": False, "verbose": False, "add_special_tokens": not chats}
        for begin in range(0, len(rows), 1000):
            texts = list(rows[begin : begin + 1000]["rendered" if chats else "text"])
            for ids in self.tokenizer(texts, **options)["input_ids"]:
                ids = np.asarray(ids + (end if not chats and ids[-1:] != end else []), dtype=np.int32)
                pieces += [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
        return [piece for piece in pieces if len(piece) >= 2]  # a single token predicts nothing
