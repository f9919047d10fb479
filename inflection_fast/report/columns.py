"""What each column of a timeline is, for those that draw it."""

from __future__ import annotations

from dataclasses import replace

from inflection_fast.timeline import columns_in
from inflection_fast.timeline.columns import Column

__all__ = ["columns_of"]

_LOG = ("activation_grad", "parameter_grad", "probe_activation_grad")

_KNOWN = {
    "entropy": ("nats", "attention entropy", "attention",
                "How widely attention is spread: 0 is a single token, the log of their number all of them alike."),
    "entropy_se": ("nats", "standard error of the entropy", "attention",
                   "What the sampling of query rows leaves open; 0 where every row was measured."),
    "max_logit": ("logit", "largest attention logit", "attention",
                  "The largest score before the softmax. One that keeps growing often precedes unstable training."),
    "collision": ("probability", "attention collision", "attention",
                  "The chance that two draws from a token's attention hit the same token; 1 is a single token."),
    "sink": ("probability", "attention on the first token", "attention",
             "The share of attention on the first token, where models park attention that they do not need."),
    "probe_entropy": ("nats", "attention entropy on the probe", "attention",
                      "Entropy on a fixed set of texts, so that only the model changes from step to step."),
    "activation_grad": ("l2 norm", "activation gradient", "activation_grad",
                        "How strongly the loss pulls on the output of a layer. Compare layers of one step."),
    "parameter_grad": ("l2 norm", "parameter gradient", "parameter_grad",
                       "The gradient of a layer's own parameters before clipping. Frozen layers have none."),
    "delta_cka": ("1 - CKA", "representation drift", "delta_cka",
                  "How far a layer's view of a fixed set of texts has moved since the start: 0 is unchanged."),
    "delta_cka_se": ("1 - CKA", "standard error of the drift", "delta_cka",
                     "From leaving out each text of the probe in turn."),
    "probe_activation_grad": ("l2 norm", "activation gradient on the probe", "activation_grad",
                              "As the activation gradient, on a fixed set of texts."),
    "loss": ("nats", "loss", "training", "The loss that the training loop passed to the monitor."),
    "skipped": ("0 or 1", "skipped steps", "training",
                "1: a gradient scaler dropped the step, because its gradients were not finite."),
    "missing_ranks": ("processes", "missing ranks", "training",
                      "Processes whose share is in no value of the step, because they were lost."),
    "measure_ms": ("ms", "time for measuring", "training", "Host time of a measured step's measuring, probe included."),
    "probe_ms": ("ms", "time for the probe", "training", "Host time of the snapshot of the probe."),
}  # fmt: skip


def columns_of(meta: dict) -> dict[str, Column]:
    """The columns of the timeline whose metadata these are; those that everybody has, in the words of a page."""
    found = columns_in(meta)
    for name in found.keys() & _KNOWN.keys():
        unit, label, quantity, explanation = _KNOWN[name]
        scale = "log" if name in _LOG else "linear"
        said = {"unit": unit, "label": label, "quantity": quantity, "explanation": explanation}
        found[name] = replace(found[name], **said, drawn="lines", scale=scale)
    return found
