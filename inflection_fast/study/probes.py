"""How much about the labels can be read off the features of every block by a linear probe."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.study.config import LoopConfig
from inflection_fast.study.texts import Tokens
from inflection_fast.study.training_loop import batch_of

__all__ = ["block_probes", "pooled_features", "ridge_accuracy"]

FOLDS = 5
PENALTY = 1.0  # on standardised features, per text


def block_probes(model: nn.Module, tokens: Tokens, config: LoopConfig) -> list[float]:
    """Accuracy of a probe on the output of each block [L], cross-validated over the given texts."""
    return [round(ridge_accuracy(one, tokens.labels), 4) for one in pooled_features(model, tokens, config)]


def pooled_features(model: nn.Module, tokens: Tokens, config: LoopConfig) -> np.ndarray:
    """Mean over the tokens of each text of the output of each block [L, N, D]."""
    blocks = find_blocks(model)
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int):
        def hook(_module, _inputs, output) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.module.register_forward_hook(keep(block.index)) for block in blocks]
    parts = []
    model.to(config.device).eval()
    try:
        with torch.inference_mode():
            for begin in range(0, len(tokens), config.eval_batch_size):
                rows = np.arange(begin, min(begin + config.eval_batch_size, len(tokens)))
                batch = batch_of(tokens, rows, config.device)
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                mask = batch["attention_mask"][..., None].float()
                count = mask.sum(dim=1)
                # Outputs may carry more positions than the texts (virtual tokens of a prefix stand in front).
                parts.append(
                    torch.stack(
                        [
                            (outputs[i][:, -mask.shape[1] :].float() * mask).sum(dim=1) / count
                            for i in range(len(blocks))
                        ]
                    )
                )
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts, dim=1).cpu().numpy()


def ridge_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of ridge regression on one-hot labels, by cross-validation: features [N, D], labels [N].

    Features are standardised and the mean removed by the training folds alone; the penalty is fixed.
    """
    classes = np.unique(labels)
    if len(classes) < 2 or len(labels) < 2 * FOLDS:
        raise ValueError(
            f"labels: expected at least two classes and {2 * FOLDS} texts, got {len(classes)}, {len(labels)}"
        )
    order = np.random.default_rng(0).permutation(len(labels))
    targets = (labels[:, None] == classes).astype(float)
    right = 0
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = np.setdiff1d(order, test)
        mean, std = features[train].mean(axis=0), features[train].std(axis=0) + 1e-8
        x, z = (features[train] - mean) / std, (features[test] - mean) / std
        middle = targets[train].mean(axis=0)
        gram = x @ x.T + PENALTY * len(train) * np.eye(len(train))  # the dual form: fewer texts than features
        weights = x.T @ np.linalg.solve(gram, targets[train] - middle)
        right += int((classes[(z @ weights + middle).argmax(axis=1)] == labels[test]).sum())
    return right / len(labels)
