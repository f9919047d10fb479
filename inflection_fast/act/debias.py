"""Source debiasing: a model that is sure of its source classes is made less sure before it is adapted.

For a bounded number of steps the mean entropy of the model's class probabilities on source texts is raised and, as an
option, the loss on them is raised as well (gradient ascent). A guard stops the phase before accuracy or loss on the
source leave the bounds that were given. The expectation (arXiv 2511.00797, future work) is that the loss of the
adaptation rises at first and then falls, and that activation gradients of the blocks below recover; `held` says of two
timelines whether they did.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decide import Plan
from ..timeline import Timeline
from .handle import Handle, check_steps

__all__ = ["Debiased", "Expectation", "debias_source", "held"]


@dataclass(frozen=True)
class Expectation:
    """What was expected of the adaptation after a debiasing phase, and whether it came."""

    held: bool | None  # None: the timelines do not say
    loss: bool | None  # it rose in the phase, and fell from there in the adaptation
    gradients: bool | None  # those of the lower half of the blocks are larger than without the phase
    words: str


@dataclass
class _History:
    """Of every step of the phase, before its update."""

    loss: list[float] = field(default_factory=list)  # nats
    accuracy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)  # nats

    def __len__(self) -> int:
        return len(self.loss)


class Debiased(Handle):
    """A debiasing phase that has run; what it did is permanent."""

    name = "source debiasing"
    permanent = True

    def __init__(
        self,
        model: nn.Module,
        where: Plan | Sequence[int] | int | None,
        batches: Iterable[Mapping[str, Tensor]],
        steps: int,
        lr: float,
        ascent: float,
        least_accuracy: float | None,
        largest_loss: float | None,
    ):
        check_steps("steps", steps)
        for name, value, least in (("lr", lr, 0.0), ("ascent", ascent, -math.inf)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least < value < math.inf:
                raise ValueError(f"{name}: expected a number > {least:g}, got {value!r}")
        if ascent < 0:
            raise ValueError(f"ascent: expected a number >= 0, got {ascent!r}")
        if least_accuracy is None and largest_loss is None:
            raise ValueError("least_accuracy: give it or largest_loss, so that something stops the phase")
        if least_accuracy is not None and not 0 <= least_accuracy <= 1:
            raise ValueError(f"least_accuracy: expected a number in [0, 1], got {least_accuracy!r}")
        super().__init__(model, where)
        self.steps, self.lr, self.ascent = steps, lr, ascent
        self.least_accuracy, self.largest_loss = least_accuracy, largest_loss
        self.history = _History()
        self.stopped: str | None = None  # why, where the guard stopped the phase
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        parameters = [p for p in model.parameters() if p.requires_grad and (where is None or id(p) in inside)]
        if not parameters:
            raise ValueError("model: none of the chosen parameters trains; unfreeze some first")
        before = [(p, p.grad) for p in model.parameters()]
        trained = [(p, p.requires_grad) for p in model.parameters()]
        chosen = {id(p) for p in parameters}
        try:
            for p, was in trained:
                p.requires_grad_(was and id(p) in chosen)
                p.grad = None
            self._run(parameters, _endless(batches), next(model.parameters()).device)
        finally:
            for (p, was), (_, gradient) in zip(trained, before, strict=True):
                p.requires_grad_(was)
                p.grad = gradient
        self._live = False

    def _run(self, parameters: list[nn.Parameter], batches: Iterator[Mapping[str, Tensor]], device) -> None:
        optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=0.0)
        for batch in itertools.islice(batches, self.steps):
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            labels = batch.get("labels")
            if labels is None or labels.dim() != 1:
                raise ValueError("batches: expected `labels` [B], the source classes, in every batch")
            output = self.model(**batch)
            logits = output["logits"] if isinstance(output, dict) else output.logits
            log_p = logits.float().log_softmax(-1)  # [B, C]
            entropy, loss = -(log_p.exp() * log_p).sum(-1).mean(), F.nll_loss(log_p, labels)
            accuracy = (log_p.argmax(-1) == labels).float().mean()
            self.history.loss.append(float(loss.detach()))
            self.history.accuracy.append(float(accuracy))
            self.history.entropy.append(float(entropy.detach()))
            self.stopped = self._guard()
            if self.stopped is not None:
                return
            optimizer.zero_grad(set_to_none=True)
            (-entropy - self.ascent * loss).backward()
            optimizer.step()

    def _guard(self) -> str | None:
        """Why the phase has to stop, judged by the last `_JUDGED` steps."""
        accuracy, loss = (float(np.mean(one[-_JUDGED:])) for one in (self.history.accuracy, self.history.loss))
        if self.least_accuracy is not None and accuracy < self.least_accuracy:
            return f"accuracy on the source fell to {accuracy:.3f}, below {self.least_accuracy:g}"
        if self.largest_loss is not None and loss > self.largest_loss:
            return f"loss on the source rose to {loss:.3f}, above {self.largest_loss:g}"
        return None

    def held(self, before: Timeline, after: Timeline) -> Expectation:
        """Whether the adaptation `after` the phase went as expected, against one `before` (without) it."""
        return held(before, after, self.history.loss)

    def _settings(self) -> dict:
        return {
            "steps": self.steps, "steps_done": len(self.history) - (self.stopped is not None), "lr": self.lr,
            "ascent": self.ascent, "least_accuracy": self.least_accuracy, "largest_loss": self.largest_loss,
            "stopped": self.stopped,
        }  # fmt: skip

    def _words(self) -> str:
        ends = f"stopped: {self.stopped}" if self.stopped else "all of them taken"
        first, last = (self.history.entropy[at] for at in (0, -1))
        return (
            f"Source debiasing for at most {self.steps} steps ({ends}); the entropy of class probabilities went from "
            f"{first:.3f} to {last:.3f} nats."
        )

    def _remove(self) -> None:
        raise RuntimeError(f"{self.name} is permanent")


_JUDGED = 4  # steps whose mean the guard judges: one batch says little


def debias_source(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    layers: Plan | Sequence[int] | int | None = None,
    *,
    steps: int = 50,
    lr: float = 1e-4,
    ascent: float = 0.0,
    least_accuracy: float | None = 0.5,
    largest_loss: float | None = None,
) -> Debiased:
    """Raise the entropy of a classifier's source-class probabilities for at most `steps` steps, before adaptation.

    Minimises -(mean entropy) - ascent * (cross entropy with the source labels) with AdamW. Permanent: keep a copy of
    the weights to go back to. The model is run in the mode it is in, and gradients and `requires_grad` are afterwards
    as they were.

    Args:
        model: a classifier with the head of its source task; returns `logits` [B, C].
        batches: of source texts with `labels` [B]; gone through again and again.
        layers: whose parameters move, of those that train; None: all that train.
        lr: learning rate.
        ascent: weight of gradient ascent on the source; 0: none.
        least_accuracy: the phase stops, without a further update, where the accuracy on the last 4 batches is below.
        largest_loss: the same for a loss above, in nats.

    Raises:
        ValueError: numbers out of range, no guard at all, batches without labels, or nothing that trains.
    """
    return Debiased(model, layers, batches, steps, lr, ascent, least_accuracy, largest_loss)


def held(before: Timeline, after: Timeline, phase_loss: Sequence[float] = ()) -> Expectation:
    """Whether "the loss rises, then falls; gradients below recover" holds of two adaptations of one model.

    The loss: that of the phase (`phase_loss`) rose, by its first and last third, and that of `after` fell, in the same
    way. The gradients: the geometric mean of the activation gradient norms of the lower half of the blocks, over the
    first third of the steps, is larger in `after` than in `before`. `ValueError` where the timelines are of other
    blocks; what has no values is None.
    """
    if before.layers != after.layers:
        raise ValueError("after: it was measured on other blocks than before; compare adaptations of one model")
    rose, fell = _change(phase_loss), _change(after.loss)
    loss = None if math.isnan(rose + fell) else rose > 0 > fell
    share = _lower_gradient(after) / _lower_gradient(before)
    gradients = None if math.isnan(share) else share > 1
    known = [one for one in (loss, gradients) if one is not None]
    verdict = False if False in known else None if len(known) < 2 else True
    words = [
        "The loss of the source or of the adaptation was not measured."
        if loss is None
        else f"The loss changed by {rose:+.3f} in the phase and by {fell:+.3f} in the adaptation: "
        + ("as expected." if loss else "not as expected."),
        "The activation gradient was not measured."
        if gradients is None
        else f"The activation gradient of the lower blocks is {share:.2f} times that without the phase: "
        + ("as expected." if gradients else "not as expected."),
        {True: "The expectation held.", False: "The expectation did not hold.", None: "Nothing can be said of it."}[
            verdict
        ],
    ]
    return Expectation(verdict, loss, gradients, " ".join(words))


def _change(values: Sequence[float] | np.ndarray) -> float:
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    third = max(1, len(numbers) // 3)
    return math.nan if len(numbers) < 2 else float(numbers[-third:].mean() - numbers[:third].mean())


def _lower_gradient(timeline: Timeline) -> float:
    steps = max(1, len(timeline.steps) // 3)
    values = timeline.activation_grad[:steps, : max(1, len(timeline.layers) // 2)]
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(values).mean())) if values.size else math.nan


def _endless(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(batches, Iterator):
        raise TypeError("batches: expected a list or a loader, which can be gone through again, got an iterator")
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches: there are none")
