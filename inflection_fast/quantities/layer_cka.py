"""CKA of the features of all pairs of layers, now and with the reference state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .arguments import check_count
from .quantity import Accumulator, Column, MeasuredModel, ProbeFeatures, Quantity, Sums

__all__ = ["LayerCka"]

_PAIRS = ("layer", "other_layer")


class LayerCka(Quantity):
    """Linear CKA of all pairs of layers, on the probe set; pairs whose rows are not the same tokens have no value.

    * `layer_cka`: between the layers of the model as it is now (`ops.cka_matrix`);
    * `layer_delta_cka`: 1 - CKA between a layer now and another layer in the reference state, the diagonal being
      `delta_cka` in the full space; not with `cka_reference=None`.

    `MonitorConfig.cka_debiased` and `cka_reference` say how. Every 500 steps where `MonitorConfig.every` is one number.
    Cost: twice that of `cka_matrix`. Memory: 32 L^2 bytes in the packet; while it runs that of `cka_matrix` and the
    features of all layers once more.

    Args:
        every: cadence in steps; None: as `MonitorConfig.every`.
    """

    name = "layer_cka"
    accumulators = {name: Accumulator(_PAIRS, held="alike") for name in ("cka", "pairs", "delta", "delta_pairs")}
    columns = {
        "layer_cka": Column(
            unit="CKA",
            axes=_PAIRS,
            label="CKA of all pairs of layers",
            explanation="Linear CKA of the features of two layers on the probe: 1 is alike up to rotation and scale.",
            drawn="heatmap",
            count="pairs",
        ),
        "layer_delta_cka": Column(
            unit="1 - CKA",
            axes=_PAIRS,
            label="delta-CKA of all pairs of layers",
            explanation="1 - CKA of a layer now and another layer in the reference state, on the probe set.",
            drawn="heatmap",
            count="delta_pairs",
        ),
    }

    def __init__(self, every: int | None = 500):
        check_count("every", every, optional=True)
        self.every = every

    def prepare(self, model: MeasuredModel) -> None:
        """Take the settings of CKA and the number of layers."""
        self._debiased: bool = getattr(model.config, "cka_debiased", True)
        self.axes = {"other_layer": len(model.blocks)}

    def on_probe(self, sums: Sums, probe: ProbeFeatures) -> None:
        """Write the values of all pairs."""
        for layers, index in zip(probe.stacks, probe.indices, strict=True):
            now = torch.stack([probe.features[i] for i in layers])
            self._write(sums, "cka", "pairs", index, ops.cka_matrix(now, debiased=self._debiased))
            if probe.reference is not None:
                before = torch.stack([probe.reference[i] for i in layers])
                found = 1 - ops.cka_matrix(now, before, debiased=self._debiased)
                self._write(sums, "delta", "delta_pairs", index, found)

    @staticmethod
    def _write(sums: Sums, name: str, count: str, index: Tensor, values: Tensor) -> None:
        device = sums[name].device
        sums[name][index[:, None], index] = values.double().to(device, non_blocking=True)
        sums[count][index[:, None], index] = torch.ones_like(values, dtype=torch.float64, device=device)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What was written."""
        return {"layer_cka": sums["cka"] / sums["pairs"], "layer_delta_cka": sums["delta"] / sums["delta_pairs"]}
