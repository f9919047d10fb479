"""Arms that try: a short training, or several, before the one that counts. Their steps are part of their cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from inflection_fast.blocks import find_blocks
from inflection_fast.study.adaptation import Adaptation, Spending, on_layers
from inflection_fast.study.arms import Seen
from inflection_fast.study.texts import Tokens
from inflection_fast.study.training_loop import evaluate, train

__all__ = ["AdaLora", "Lisa", "SuccessiveHalving", "TrialShare"]

TRIAL_SHARE = 0.2  # of the steps of an arm
HELD_OUT = 0.1  # of the training texts, on which candidates are compared


@dataclass(frozen=True)
class TrialShare:
    """LoRA everywhere for a fifth of the steps, then LoRA anew on the blocks with the largest share of it.

    The share is that of the norm of the change of the weights (`norm`), or of the sum of |gradient times weight| of the
    adapters, over the last quarter of the trial (`sensitivity`).
    """

    by: str
    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        steps = max(4, round(TRIAL_SHARE * seen.config.train.steps))
        everywhere = on_layers(seen.model, range(seen.blocks), Spending(seen.config.budget).over)
        model = everywhere.apply(seen.load(), steps)
        products: dict[str, torch.Tensor] = {}

        def watch(step: int) -> None:
            if self.by == "sensitivity" and step >= steps - steps // 4:
                for name, p in model.named_parameters():
                    if "lora_" in name and p.grad is not None:
                        product = (p.grad * p.detach()).abs().sum()
                        products[name] = products[name] + product if name in products else product

        train(
            model,
            seen.split.train,
            seen.config.train,
            learning_rate=seen.rate,
            seed=seen.seed,
            steps=steps,
            after_backward=watch,
        )
        seen.steps += steps
        scores = {block.index: self._score(block.path, block.module, products) for block in find_blocks(model)}
        return seen.best(scores)

    def _score(self, path: str, block: nn.Module, products: dict[str, torch.Tensor]) -> float:
        if self.by == "sensitivity":
            return float(sum(value for name, value in products.items() if name.startswith(f"{path}.")))
        squares = 0.0
        layer: Any  # of peft, which does not say in its types what can merge
        for layer in block.modules():
            if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "lora_A", {}):
                squares += float(layer.get_delta_weight("default").detach().float().square().sum())
        return squares**0.5


@dataclass(frozen=True)
class SuccessiveHalving:
    """Eight sets of blocks are tried for a few steps, and the better half for twice as many, until one is left.

    The sets are the first, the last, the evenly spaced and five random ones; the loss on a tenth of the training texts
    decides, which no trial trains on.
    """

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        count, k = seen.blocks, seen.config.blocks
        even = np.round(np.linspace(0, count - 1, k)).astype(int).tolist()
        sets = [tuple(range(k)), tuple(range(count - k, count)), tuple(even)]
        rng = seen.rng
        for _ in range(100):
            if len(dict.fromkeys(sets)) == 8:
                break
            sets.append(tuple(sorted(rng.choice(count, k, replace=False).tolist())))
        sets = list(dict.fromkeys(sets))[:8]
        held = max(1, round(HELD_OUT * len(seen.split.train)))
        rows = np.arange(len(seen.split.train))
        judged, trained = seen.split.train.take(rows[:held]), seen.split.train.take(rows[held:])
        steps = max(2, seen.config.train.steps // 20)
        losses: dict[tuple[int, ...], float] = {}
        while len(sets) > 1:
            losses |= {layers: self._loss(seen, layers, steps, trained, judged) for layers in sets}
            sets = sorted(sets, key=losses.__getitem__)[: len(sets) // 2]
            steps *= 2
        scores = {",".join(map(str, layers)): -loss for layers, loss in losses.items()}
        return seen.lora(sets[0], scores=scores)

    def _loss(self, seen: Seen, layers: Sequence[int], steps: int, trained: Tokens, judged: Tokens) -> float:
        model = seen.lora(layers).apply(seen.load(), steps)
        train(model, trained, seen.config.train, learning_rate=seen.rate, seed=seen.seed, steps=steps)
        seen.steps += steps
        return evaluate(model, judged, seen.config.train)["loss"]


@dataclass(frozen=True)
class AdaLora:
    """AdaLoRA on all blocks: it begins with more rank than it may keep, and prunes as it trains."""

    kind: str = "adalora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        return on_layers(seen.model, range(seen.blocks), Spending(seen.config.budget).over, kind="adalora")


@dataclass(frozen=True)
class Lisa:
    """LISA: full training of a few blocks that are drawn anew every so many steps."""

    kind: str = "lisa"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        every = max(1, seen.config.train.steps // 10)
        return Adaptation(
            "lisa", layers=tuple(range(seen.blocks)), options={"blocks": min(2, seen.blocks), "every": every}
        )
