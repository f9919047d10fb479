"""Columns of every measured step: loss, skipped steps, missing ranks, and times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..timeline.older import NOT_FINITE, RANK_LOST
from .quantity import Accumulator, Column, ModelOutput, Quantity, Sums

__all__ = ["Step"]


def _of_step(unit: str, label: str, explanation: str, **more) -> Column:
    return Column(unit=unit, axes=(), label=label, explanation=explanation, **more)


class Step(Quantity):
    """Always measured. What is no sum over ranks (`measure_ms`, `missing_ranks`) is filled in by the recorder."""

    name = "step"
    accumulators = {
        name: Accumulator(())
        for name in (
            *("forwards", "loss", "losses", "skipped", "scaled", "untold"),
            *("probe_ms", "probes", "step_ms", "steps", "probe_every", "probe_rows"),
        )
    }
    columns = {
        "loss": _of_step(
            "nats",
            "loss",
            "The loss that the training loop passed to the monitor, or that the model returned.",
            count="losses",
            alerts=(NOT_FINITE,),
        ),
        "skipped": _of_step(
            "0 or 1",
            "skipped steps",
            "1: a gradient scaler dropped the step, because its gradients were not finite.",
            count="scaled",
        ),
        "missing_ranks": _of_step(
            "processes",
            "missing ranks",
            "Processes whose share is in no value of the step, because they were lost.",
            alerts=(RANK_LOST,),
        ),
        "padded_rows": _of_step(
            "1",
            "padded rows included",
            "1 if means over attention rows include rows of padding, because no mask marks them; else 0.",
            count="forwards",
            drawn="none",
        ),
        "measure_ms": _of_step("ms", "time for measuring", "Host time of a measured step's measuring, probe included."),
        "probe_ms": _of_step("ms", "time for the probe", "Host time of the snapshot of the probe.", count="probes"),
        "step_ms": _of_step(
            "ms",
            "time of a step",
            "Time of a training step, mean over those since the run of the probe before, without what the probe took.",
            count="steps",
            drawn="none",
        ),
        "probe_rows": _of_step(
            "1",
            "rows of the probe",
            "Feature rows that were compared, of the layer with most of them.",
            count="probes",
            drawn="none",
        ),
        "probe_every": _of_step(
            "steps",
            "cadence of the probe",
            "Steps from this run of the probe to the next.",
            count="probes",
            drawn="none",
        ),
    }

    def on_model_output(self, sums: Sums, output: ModelOutput) -> None:
        """Add the loss of a micro-batch."""
        sums["forwards"] += 1
        if output.untold_padding:
            sums["untold"].fill_(1)
        if output.loss is not None:
            sums["loss"] += output.loss.detach().mean().to(sums["loss"].device, non_blocking=True)
            sums["losses"] += 1

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Means over micro-batches and ranks."""
        return {
            "loss": sums["loss"] / sums["losses"],
            "skipped": np.minimum(sums["skipped"], 1.0),
            "padded_rows": np.minimum(sums["untold"], 1.0),
            "probe_ms": sums["probe_ms"] / sums["probes"],
            "step_ms": sums["step_ms"] / sums["steps"],
            "probe_rows": sums["probe_rows"] / sums["probes"],
            "probe_every": sums["probe_every"] / sums["probes"],
        }
