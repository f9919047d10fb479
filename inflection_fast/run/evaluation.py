"""How good a model is on the test texts: right answers for classification, loss per token for language."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from inflection_fast.records import Metrics
from inflection_fast.run.batches import IGNORED

__all__ = [
    "class_logits",
    "classification_metrics",
    "in_words",
    "language_metrics",
    "log_probabilities",
    "saturation",
    "token_losses",
]

SATURATED = 0.99  # a largest class probability above this


def class_logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits alone, in float32; some models return hidden states beside them."""
    return (outputs[0] if isinstance(outputs, tuple) else outputs).float()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over classes, float64 [N, C]."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def saturation(log_p: np.ndarray) -> tuple[float, float]:
    """How sure a classifier is: mean largest probability, and share of texts above 0.99."""
    largest = np.exp(log_p.max(axis=-1))
    return float(largest.mean()), float((largest > SATURATED).mean())


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """Accuracy, mean cross-entropy and saturation, and a "1" for every text that was right.

    With the last, two models on the same texts can be compared text by text.
    """
    log_p = log_probabilities(logits)
    losses = -log_p[np.arange(len(labels)), labels]
    right = log_p.argmax(axis=-1) == labels
    correct = int(right.sum())
    largest, share = saturation(log_p)
    return Metrics(
        n=len(labels),
        loss=float(losses.mean()),
        accuracy=correct / len(labels),
        correct=correct,
        right="".join("01"[one] for one in right.tolist()),
        largest_probability=largest,
        share_above_099=share,
    )


def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Per sequence, the summed cross-entropy of the next token and the number of tokens [batch, 2].

    Reduced before the Trainer gathers it: the logits of a test set would not fit in memory.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(dim=1), (targets != IGNORED).sum(dim=1).float()], dim=1)


def language_metrics(sums: np.ndarray, labels: np.ndarray) -> Metrics:
    """Token-weighted loss in nats and its exponential, the perplexity, from the rows of `token_losses`."""
    total, tokens = np.asarray(sums, dtype=np.float64).sum(axis=0)
    loss = float(total / tokens)
    return Metrics(n=int(tokens), loss=loss, perplexity=math.exp(min(loss, 700.0)))


def in_words(metrics: Metrics | None) -> str:
    """The metrics as a person reads them, with the binomial standard error of an accuracy."""
    if metrics is None:
        return "not evaluated"
    if metrics.accuracy is not None:
        error = (metrics.accuracy * (1 - metrics.accuracy) / metrics.n) ** 0.5
        return f"accuracy {100 * metrics.accuracy:.1f} ± {100 * error:.1f} % on {metrics.n} texts"
    return f"perplexity {metrics.perplexity:.2f} on {metrics.n} tokens"
