"""CKA distance of each block's features from a reference state of the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from .. import ops
from .quantity import Accumulator, Column, MeasuredModel, ProbeFeatures, Quantity, Sums

__all__ = ["DeltaCka"]


_drift = partial(Column, "1 - CKA", ("layer",))


class DeltaCka(Quantity):
    """1 - CKA between the features of now and those of the reference state, on the probe set.

    `MonitorConfig.cka_rank`, `cka_debiased`, `cka_reference` and `cka_se` say how. Memory: 32 bytes per layer in the
    packet; that of the probe's features is said at `MonitorConfig.cka_rows`.
    """

    name = "delta_cka"
    accumulators = {name: Accumulator(held="alike") for name in ("delta", "count", "error", "error_count")}
    columns = {
        "delta_cka": _drift(
            "representation drift",
            "How far a layer's view of fixed texts has moved from the reference state: 0 is unchanged.",
            count="count",
        ),
        "delta_cka_se": _drift(
            "standard error of the drift", "From leaving out each text of the probe in turn.", count="error_count"
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Take the settings of CKA; `ValueError` where there is no state to compare with."""
        if getattr(model.config, "cka_reference", "start") is None:
            raise ValueError("delta_cka: compares with a reference; give MonitorConfig a cka_reference other than None")
        self._config, self._device = model.config, model.device

    def on_probe(self, sums: Sums, probe: ProbeFeatures) -> None:
        """Write the values of all layers."""
        if probe.reference is None:
            return
        rank, debiased = self._config.cka_rank, self._config.cka_debiased
        for layers, index in zip(probe.stacks, probe.indices, strict=True):
            x, y = (torch.stack([features[i] for i in layers]) for features in (probe.reference, probe.features))
            if self._config.cka_se:
                result = ops.cka_jackknife(x, y, probe.sequences[layers[0]], rank=rank, debiased=debiased)
                delta = result.delta
                sums["error"].index_copy_(0, index, result.standard_error.double())
            else:
                delta = ops.delta_cka(x, y, rank=rank, debiased=debiased)
            sums["delta"].index_copy_(0, index, delta.double())
            sums["count"].index_fill_(0, index, 1)  # not all: other ranks may have other layers
            if self._config.cka_se:
                sums["error_count"].index_fill_(0, index, 1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What was written."""
        return {"delta_cka": sums["delta"] / sums["count"], "delta_cka_se": sums["error"] / sums["error_count"]}
