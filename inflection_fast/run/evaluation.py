"""The evaluation of a model on the test texts: accuracy of classifiers, loss per token of language models."""

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
    "described",
    "language_metrics",
    "log_probabilities",
    "saturation",
    "token_losses",
]

SATURATED = 0.99  # largest class probability


def class_logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """The logits in float32, without the hidden states that some models also return."""
    return (outputs[0] if isinstance(outputs, tuple) else outputs).float()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over classes, float64 [N, C]."""
    return torch.from_numpy(np.asarray(logits, dtype=np.float64)).log_softmax(-1).numpy()


def saturation(log_p: np.ndarray) -> tuple[float, float]:
    """Mean of the largest class probability, and the share of texts where it is above 0.99."""
    largest = np.exp(log_p.max(axis=-1))
    return float(largest.mean()), float((largest > SATURATED).mean())


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> Metrics:
    """Accuracy, mean cross-entropy and saturation, and which texts were classified correctly."""
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
    """Sum of the cross-entropy of the next token, and number of tokens, of every sequence: [batch, 2].

    Reduced before the Trainer gathers them: the logits of a test set would not fit into memory.
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


def described(metrics: Metrics | None) -> str:
    """The metrics for a reader, with the binomial standard error of an accuracy."""
    if metrics is None:
        return "not evaluated"
    if metrics.accuracy is not None:
        error = (metrics.accuracy * (1 - metrics.accuracy) / metrics.n) ** 0.5
        return f"accuracy {100 * metrics.accuracy:.1f} ± {100 * error:.1f} % on {metrics.n} texts"
    return f"perplexity {metrics.perplexity:.2f} on {metrics.n} tokens"
