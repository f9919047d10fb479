"""Source debiasing: a classifier that is confident on its source classes becomes less confident before adaptation.

For a limited number of steps, training raises the mean entropy of the class probabilities on source texts, and
optionally the loss on them (gradient ascent). A guard stops the phase if accuracy or loss on the source pass a limit.
The expectation (arXiv 2511.00797, future work) is that the loss of the adaptation first rises and then falls, and that
activation gradients of the lower blocks recover. `held` tests this on two timelines.
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

from ..measure.hooks import gradients_set_aside
from ..timeline import Timeline
from .handle import Handle, check_integer, check_number
from .planned import Layers

__all__ = ["Debiased", "Expectation", "debias_source", "held"]


@dataclass(frozen=True)
class Expectation:
    """Whether the adaptation after a debiasing phase went as expected. None: the timelines do not show it."""

    held: bool | None  # both of the following
    loss: bool | None  # it rose in the phase, and fell in the adaptation
    gradients: bool | None  # those of the lower half of the blocks are larger than without the phase
    words: str


@dataclass
class _History:
    """Values of every step of the phase, before its update."""

    loss: list[float] = field(default_factory=list)  # nats
    accuracy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)  # nats

    def __len__(self) -> int:
        return len(self.loss)


class Debiased(Handle):
    """Raise the entropy of a classifier's source-class probabilities for at most `steps` steps, before adaptation.

    Minimises -(mean entropy) - ascent * (cross entropy with the source labels) with AdamW. Permanent: keep a copy of
    the weights to restore them. The model runs in its current mode. Gradients and `requires_grad` are restored.

    Args:
        model: a classifier with the head of its source task; returns `logits` [B, C].
        batches: source texts with `labels` [B]; iterated repeatedly.
        layers: blocks whose trainable parameters change; None: all trainable parameters change.
        lr: learning rate.
        ascent: weight of gradient ascent on the source; 0: none.
        least_accuracy: the phase stops, without a further update, if the accuracy on the last 4 batches is below.
        largest_loss: the phase stops if the loss on the last 4 batches is above, in nats.

    Raises:
        ValueError: numbers out of range, no limit of the guard, batches without labels, or nothing that trains.
    """

    name = "source debiasing"
    permanent = True

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        layers: Layers = None,
        *,
        steps: int = 50,
        lr: float = 1e-4,
        ascent: float = 0.0,
        least_accuracy: float | None = 0.5,
        largest_loss: float | None = None,
    ):
        check_integer("steps", steps)
        check_number("lr", lr, "> 0")
        check_number("ascent", ascent, ">= 0")
        if least_accuracy is None and largest_loss is None:
            raise ValueError("least_accuracy: give it or largest_loss, as a limit that stops the phase")
        if least_accuracy is not None:
            check_number("least_accuracy", least_accuracy, "in [0, 1]")
        super().__init__(model, layers)
        self.steps, self.lr, self.ascent = steps, lr, ascent
        self.least_accuracy, self.largest_loss = least_accuracy, largest_loss
        self.history = _History()
        self.stopped: str | None = None  # the reason, if the guard stopped the phase
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        parameters = [p for p in model.parameters() if p.requires_grad and (layers is None or id(p) in inside)]
        if not parameters:
            raise ValueError("model: none of the chosen parameters trains; unfreeze some first")
        chosen = {id(p) for p in parameters}
        with gradients_set_aside(model):
            for p in model.parameters():
                p.requires_grad_(id(p) in chosen)
            self._run(parameters, _repeated(batches), next(model.parameters()).device)
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
        """The reason to stop the phase, from means over the last `_GUARD_STEPS` steps; None: no reason."""
        accuracy, loss = (float(np.mean(one[-_GUARD_STEPS:])) for one in (self.history.accuracy, self.history.loss))
        if self.least_accuracy is not None and accuracy < self.least_accuracy:
            return f"accuracy on the source fell to {accuracy:.3f}, below {self.least_accuracy:g}"
        if self.largest_loss is not None and loss > self.largest_loss:
            return f"loss on the source rose to {loss:.3f}, above {self.largest_loss:g}"
        return None

    def held(self, before: Timeline, after: Timeline) -> Expectation:
        """Whether the adaptation `after` the phase went as expected, compared with one without it (`before`)."""
        return held(before, after, self.history.loss)

    def _settings(self) -> dict:
        return {
            "steps": self.steps, "steps_done": len(self.history) - (self.stopped is not None), "lr": self.lr,
            "ascent": self.ascent, "least_accuracy": self.least_accuracy, "largest_loss": self.largest_loss,
            "stopped": self.stopped,
        }  # fmt: skip

    def _words(self) -> str:
        ends = f"stopped: {self.stopped}" if self.stopped else "all done"
        first, last = (self.history.entropy[at] for at in (0, -1))
        return (
            f"Source debiasing for at most {self.steps} steps ({ends}); the entropy of class probabilities went from "
            f"{first:.3f} to {last:.3f} nats."
        )


_GUARD_STEPS = 4  # the guard uses means over steps, because single batches are noisy


debias_source = Debiased


def held(before: Timeline, after: Timeline, phase_loss: Sequence[float] = ()) -> Expectation:
    """Whether the loss rose and then fell, and lower gradients recovered, in two adaptations of one model.

    Loss: from its first to its last third, that of the phase (`phase_loss`) rose and that of `after` fell. Gradients:
    the geometric mean of the activation gradient norms of the lower half of the blocks, over the first third of the
    steps, is larger in `after` than in `before`. Without values a result is None. `ValueError` if the timelines have
    other blocks.
    """
    if before.layers != after.layers:
        raise ValueError("after: it was measured on other blocks than `before`; compare adaptations of one model")
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
        {True: "The expectation held.", False: "The expectation did not hold.", None: "No verdict is possible."}[
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


def _repeated(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(batches, Iterator):
        raise TypeError("batches: expected a list or a loader, which can be iterated repeatedly, got an iterator")
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches: expected at least one, got none")
