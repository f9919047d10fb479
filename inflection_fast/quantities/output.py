"""Statistics of the model's softmax and logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .quantity import Accumulator, AlertRule, Column, MeasuredModel, ModelOutput, Quantity, Sums

__all__ = ["SATURATED", "Output"]

SATURATED = 0.99  # a largest probability above this is saturated
IGNORED = -100  # label of what no loss is computed for, as in torch.nn.functional.cross_entropy
_SUMS = ("rows", "confidence", "saturated", "entropy", "log_z", "log_z_squared")


def _of_step(unit: str, label: str, explanation: str, **more) -> Column:
    return Column(unit=unit, axes=(), label=label, explanation=explanation, count="rows", **more)


class Output(Quantity):
    """Statistics of the softmax over the model's logits, means over the rows that the loss is about.

    Rows are those with a label other than -100, shifted by one where the model predicts the next token; without labels
    those of tokens. With logits z of a row, p = softmax(z) and Z = sum e^z: the mean largest p and the share of rows
    where it is above 0.99 (saturation of the softmax: no gradient is left), the entropy of p in nats, log Z and its
    square (what the z-loss of PaLM, arXiv 2204.02311, punishes), and the largest z.

    Cost: one read of the logits (`ops.attention_stats`); memory: 52 bytes, and 24 per row while it runs. Logits are not
    copied.
    """

    name = "output"
    accumulators = {
        **{name: Accumulator(()) for name in _SUMS},
        "max_logit": Accumulator((), dtype="float32", join="max"),
    }
    columns = {
        "output_confidence": _of_step(
            "1", "mean largest probability", "Largest probability of the model's softmax, mean over predictions."
        ),
        "output_saturation": _of_step(
            "1",
            "share of saturated predictions",
            "Share of predictions whose largest probability is above 0.99.",
            alerts=(AlertRule("above", 0.999, kind="saturated_output"),),
        ),
        "output_entropy": _of_step("nats", "entropy of the output", "Entropy of the softmax, mean over predictions."),
        "output_log_z": _of_step(
            "1",
            "log Z of the output",
            "Log-sum-exp of the logits, mean over predictions.",
            alerts=(AlertRule("not_finite"),),
        ),
        "output_log_z_squared": _of_step(
            "1", "squared log Z", "Squared log-sum-exp of the logits, mean over predictions."
        ),
        "output_max_logit": _of_step("1", "largest output logit", "Largest logit of the output, over predictions."),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Know whether labels are those of the next token."""
        self._shifted = predicts_next(model.model)

    def on_model_output(self, sums: Sums, output: ModelOutput) -> None:
        """Add the rows of a micro-batch."""
        logits = output.logits
        if logits is None or logits.ndim < 2 or logits.numel() == 0:
            return
        logits = logits.detach()
        stats = ops.attention_stats(logits)
        counts = counted_rows(logits.shape[:-1], output.labels, output.tokens, self._shifted)
        device = sums["rows"].device
        confidence = (stats.max_logit - stats.lse).exp()
        log_z = stats.lse.double()
        fields = torch.stack(
            [
                torch.ones_like(log_z),
                confidence.double(),
                (confidence > SATURATED).double().masked_fill(confidence.isnan(), torch.nan),
                stats.entropy.double(),
                log_z,
                log_z.square(),
            ]
        )
        largest = stats.max_logit
        if counts is not None:
            counts = counts.to(logits.device, non_blocking=True)
            fields, largest = fields.masked_fill(~counts, 0.0), largest.masked_fill(~counts, -torch.inf)
        totals = fields.flatten(1).sum(1).to(device, non_blocking=True)
        for name, total in zip(_SUMS, totals, strict=True):
            sums[name] += total
        largest = largest.amax().to(device, non_blocking=True)
        torch.maximum(sums["max_logit"], largest, out=sums["max_logit"])

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over rows."""
        names = ("confidence", "saturation", "entropy", "log_z", "log_z_squared")
        means = {f"output_{name}": sums[of] / sums["rows"] for name, of in zip(names, _SUMS[1:], strict=True)}
        return means | {"output_max_logit": sums["max_logit"]}


def predicts_next(model: nn.Module) -> bool:
    """Whether labels of `model` are those of the next token: what Transformers names CausalLM or LMHeadModel shifts."""
    return any(type(module).__name__.endswith(("CausalLM", "LMHeadModel")) for module in model.modules())


def counted_rows(rows: torch.Size, labels: Tensor | None, tokens: Tensor | None, shifted: bool) -> Tensor | None:
    """Bool of shape `rows`, True where a row of logits counts; None: all do."""
    if labels is not None and not labels.is_floating_point() and labels.shape == rows:
        counts = labels != IGNORED
        if shifted and counts.ndim > 1:
            counts = torch.nn.functional.pad(counts[..., 1:], (0, 1), value=False)
        return counts
    return tokens if tokens is not None and tokens.shape == rows else None
