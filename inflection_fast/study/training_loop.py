"""The study's training loop. `transformers.Trainer` has more overhead than a short training takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from inflection_fast.run.evaluation import classification_metrics, log_probabilities, saturation
from inflection_fast.study.config import LoopConfig
from inflection_fast.study.texts import Tokens

__all__ = ["Clock", "Trained", "batch_of", "batches_of", "evaluate", "forward", "logits_of", "saturation_of", "train"]

SORTED_BATCHES = 8  # so many batches of a random order are sorted by length together, to pad less


@dataclass
class Clock:
    """Seconds on the wall and of the processor (of this process, all threads)."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time that the `with` block takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu

    def facts(self) -> dict[str, float]:
        """The entry in a cell."""
        return {"wall_s": round(self.wall, 3), "cpu_s": round(self.cpu, 3)}


@dataclass
class Trained:
    """Result of a training."""

    steps: int
    losses: list[float]  # mean of each tenth of the steps
    clock: Clock
    step_bytes: int  # tensors that a step keeps for the backward pass, gradients and optimizer states
    trainable: int

    def facts(self, learning_rate: float) -> dict[str, Any]:
        """The entries in the results of a study."""
        return {
            "learning_rate": learning_rate,
            "steps": self.steps,
            "training": self.clock.facts(),
            "trainable": self.trainable,
            "step_bytes": self.step_bytes,
            "losses": self.losses,
        }


def batch_of(tokens: Tokens, rows: np.ndarray, device: str) -> dict[str, Tensor]:
    """Model inputs of some texts, padded to the longest of them, with labels."""
    longest = int(tokens.lengths[rows].max())
    ids = torch.from_numpy(tokens.ids[rows, :longest].astype(np.int64))
    mask = torch.arange(longest)[None] < torch.from_numpy(tokens.lengths[rows].astype(np.int64))[:, None]
    labels = torch.from_numpy(tokens.labels[rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "labels": labels.to(device)}


def batches_of(tokens: Tokens, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches of row numbers: passes in random order, in which texts of similar length come together."""
    rng = np.random.default_rng([seed, 2])
    made = 0
    while made < steps:
        order = rng.permutation(len(tokens))
        order = order[: max(1, len(order) // size) * size]
        whole = []
        for begin in range(0, len(order), size * SORTED_BATCHES):
            some = order[begin : begin + size * SORTED_BATCHES]
            some = some[np.argsort(tokens.lengths[some], kind="stable")]
            whole += [some[i : i + size] for i in range(0, len(some), size)]
        for i in rng.permutation(len(whole)):
            if made == steps:
                return
            made += 1
            yield whole[i]


def forward(model: nn.Module, batch: dict[str, Tensor], config: LoopConfig) -> Any:
    """The model's outputs, computed in the precision of the study."""
    with torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.precision == "bfloat16"):
        return model(**batch)


class TrainingHooks(TypedDict, total=False):
    """Arguments of `train` that some kinds of adaptation need."""

    after_step: Callable[[int], None]
    parameters: list[nn.Parameter] | list[dict[str, Any]]


def train(
    model: nn.Module,
    tokens: Tokens,
    config: LoopConfig,
    *,
    learning_rate: float,
    seed: int,
    steps: int | None = None,
    after_backward: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
    parameters: list[nn.Parameter] | list[dict[str, Any]] | None = None,
) -> Trained:
    """Train the parameters that require gradients at the start, or `parameters`: a list, or groups with learning rates.

    `after_backward` is called with the number of the step, gradients unclipped, and `after_step` before they are
    cleared.
    """
    steps = config.steps if steps is None else steps
    clock = Clock()
    losses: list[Tensor] = []
    step_bytes = 0
    torch.manual_seed(seed)
    model.to(config.device).train()
    given = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    optimizer = torch.optim.AdamW(given, lr=learning_rate, weight_decay=config.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    warmup = max(1, round(config.warmup_share * steps))
    with clock.running():
        for step, rows in enumerate(batches_of(tokens, config.batch_size, steps, seed)):
            factor = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, factor)
            batch = batch_of(tokens, rows, config.device)
            with _counting(step == 0, model) as kept:
                loss = forward(model, batch, config).loss
            loss.backward()
            after_backward(step)
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            if step == 0:
                grown = sum(p.grad.nbytes for p in trained if p.grad is not None)
                grown += sum(v.nbytes for state in optimizer.state.values() for v in state.values())
                step_bytes = kept() + grown
            after_step(step)
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    values = torch.stack(losses).float().cpu().numpy()
    means = [round(float(part.mean()), 5) for part in np.array_split(values, min(10, len(values)))]
    trainable = sum(p.numel() for p in trained)
    return Trained(steps, means, clock, step_bytes, trainable)


@contextlib.contextmanager
def _counting(on: bool, model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the bytes of the tensors that autograd saves, each storage once, without the model's own parameters."""
    seen: dict[int, int] = {}
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks if on else contextlib.nullcontext():
        yield lambda: sum(seen.values())


def logits_of(model: nn.Module, tokens: Tokens, config: LoopConfig) -> np.ndarray:
    """Logits [N, C] of texts in float32, in their order."""
    model.to(config.device).eval()
    order = np.argsort(tokens.lengths, kind="stable")
    parts = []
    with torch.inference_mode():
        for begin in range(0, len(order), config.eval_batch_size):
            batch = batch_of(tokens, order[begin : begin + config.eval_batch_size], config.device)
            del batch["labels"]
            parts.append(forward(model, batch, config).logits.float())
    logits = torch.cat(parts).cpu().numpy()
    back = np.empty_like(logits)
    back[order] = logits
    return back


def evaluate(model: nn.Module, tokens: Tokens, config: LoopConfig) -> dict[str, Any]:
    """Accuracy, loss and a hexadecimal word in which a set bit says that the model was right about a text."""
    metrics = classification_metrics(logits_of(model, tokens, config), tokens.labels)
    right = int(metrics.right or "0", 2)
    return {
        "accuracy": metrics.accuracy,
        "loss": round(metrics.loss, 6),
        "n": metrics.n,
        "correct": metrics.correct,
        "right": f"{right:0{-(-metrics.n // 4)}x}",
    }


def saturation_of(logits: np.ndarray) -> dict[str, float]:
    """How sure a classifier is: mean largest probability, mean entropy in nats, share of texts above 0.99."""
    log_p = log_probabilities(logits)
    largest, share = saturation(log_p)
    return {
        "largest_probability": round(largest, 5),
        "entropy_nats": round(float(-(np.exp(log_p) * log_p).sum(axis=1).mean()), 5),
        "share_above_099": round(share, 5),
        "n": len(log_p),
    }
