"""Arms that look at a few batches of the target's training texts, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from inflection_fast.act.adapters import eva_ranks
from inflection_fast.blocks import find_blocks
from inflection_fast.ops import linear_cka
from inflection_fast.quantities.first_order import top_squares
from inflection_fast.study.adaptation import Adaptation, gradient_of, on_modules
from inflection_fast.study.arms import Seen
from inflection_fast.study.training_loop import batch_of, batches_of, forward

__all__ = ["BlockSimilarity", "Breakpoints", "Eva", "FirstOrderGain", "GradientRule", "breakpoints"]

BATCHES = 8  # that an arm looks at
EVA_BATCHES = 16
CONSTANT = 1e-5  # a spread below this share of the length is rounding


def _batches(seen: Seen, count: int = BATCHES) -> list[dict[str, Tensor]]:
    loop = seen.config.train
    rows = batches_of(seen.split.train, loop.batch_size, count, seen.seed)
    return [batch_of(seen.split.train, some, loop.device) for some in rows]


@contextmanager
def _gradients(seen: Seen) -> Iterator[nn.Module]:
    """The model with the mean gradient of a few batches on every parameter, without dropout."""
    model = seen.model.to(seen.config.train.device).eval()
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    try:
        batches = _batches(seen)
        for batch in batches:
            (forward(model, batch, seen.config.train).loss / len(batches)).backward()
        yield model
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class GradientRule:
    """LoRA on blocks by the norm of the gradient of their parameters: `high` (Aletheia's rule), `low`, or `relative`.

    `relative` is Auto-RGN (arXiv 2210.11466): the norm of the gradient over that of the weights, the highest first.
    """

    rule: str
    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        scores = {}
        with _gradients(seen) as model:
            for block in find_blocks(model):
                parameters = list(block.module.parameters())
                norm = _norm([p.grad for p in parameters if p.grad is not None])
                if self.rule == "relative":
                    norm /= _norm(parameters)
                scores[block.index] = -norm if self.rule == "low" else norm
        return seen.best(scores)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().float().square().sum() for t in tensors]).sum().sqrt())


@dataclass(frozen=True)
class FirstOrderGain:
    """LoRA on the blocks where adapters of the study's rank can win most at first order.

    A step of a rank-r change of a weight W, of a given length, lowers the loss by at most the root of the sum of the r
    largest squared singular values of dL/dW (arXiv 2602.04019). A block's score is that sum over its default modules.
    """

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        scores = {}
        with _gradients(seen) as model:
            for layer, names in seen.modules.items():
                gradients = [gradient_of(model, name) for name in names]
                scores[layer] = sum(float(top_squares(gradient, seen.config.rank)) for gradient in gradients)
        return seen.best(scores)


@dataclass(frozen=True)
class Eva:
    """LoRA with the ranks that EVA gives to the default modules of all blocks."""

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        names = [name for of_block in seen.modules.values() for name in of_block]
        per_module = max(1, seen.config.budget // len(seen.modules))
        batches = [{k: v for k, v in b.items() if k != "labels"} for b in _batches(seen, EVA_BATCHES)]
        ranks = eva_ranks(seen.model, names, per_module, batches)
        scores = {name: float(rank) for name, rank in ranks.items()}
        return on_modules(seen.model, {name: rank for name, rank in ranks.items() if rank}, scores=scores)


@contextmanager
def _hidden(seen: Seen) -> Iterator[list[list[Tensor]]]:
    """For every batch the hidden states before the first block and after each [L + 1][B, T, D]."""
    model = seen.model.to(seen.config.train.device).eval()
    with torch.inference_mode():
        yield [
            [state.float() for state in model(**batch, output_hidden_states=True).hidden_states]
            for batch in _batches(seen)
        ]


@dataclass(frozen=True)
class BlockSimilarity:
    """LoRA on the blocks that change their input most: 1 - CKA of input and output at the first token.

    arXiv 2602.05988; the first token of an encoder is the one its head reads.
    """

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        with _hidden(seen) as batches:
            first = [torch.cat([batch[place][:, 0] for batch in batches]) for place in range(len(batches[0]))]
            change = [_change(x, y) for x, y in pairwise(first)]
        return seen.best(dict(enumerate(change)))


def _change(before: Tensor, after: Tensor) -> float:
    """1 - CKA [N, D] twice. The first token is the same in all texts before the first block, which counts as 1."""
    spread = (before - before.mean(dim=0)).norm() / before.norm()
    return 1.0 if float(spread) < CONSTANT else 1 - float(linear_cka(before, after, debiased=False))


@dataclass(frozen=True)
class Breakpoints:
    """LoRA on the blocks after which the way of the hidden states turns (arXiv 2604.19321).

    The way is the mean hidden state before the first block and after each. Ramer, Douglas and Peucker's simplification
    keeps its ends and then, one after another, the point that lies farthest from the line drawn so far; the points are
    kept until they name as many blocks as the arm may choose. A point names the block whose output it is.
    """

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        with _hidden(seen) as batches:
            way = []
            for place in range(len(batches[0])):
                means = [
                    batch[place][inputs["attention_mask"].bool()].mean(dim=0)
                    for batch, inputs in zip(batches, _batches(seen), strict=True)
                ]
                way.append(torch.stack(means).mean(dim=0).double().cpu().numpy())
        distances = breakpoints(np.stack(way))
        return seen.best({point - 1: distance for point, distance in distances.items() if point})


def breakpoints(way: np.ndarray) -> dict[int, float]:
    """Points of a way [P, D] -> a number that is the larger the earlier Ramer, Douglas and Peucker keep the point.

    It is the distance from the line at which the point would just be kept: the smaller of its own and of those of the
    points that were kept before it on its side. The ends are kept always.
    """
    kept = {0: np.inf, len(way) - 1: np.inf}

    def split(begin: int, end: int, bound: float) -> None:
        if end - begin < 2:
            return
        line = way[end] - way[begin]
        length = np.linalg.norm(line)
        offsets = way[begin + 1 : end] - way[begin]
        if length > 0:
            offsets = offsets - np.outer(offsets @ line / length**2, line)
        far = np.linalg.norm(offsets, axis=1)
        point = begin + 1 + int(far.argmax())
        kept[point] = float(min(bound, far.max()))
        split(begin, point, kept[point])
        split(point, end, kept[point])

    split(0, len(way) - 1, np.inf)
    return kept
