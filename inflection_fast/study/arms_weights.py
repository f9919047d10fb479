"""Arms that use the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inflection_fast.act.adapters import kappa_order
from inflection_fast.ops.spectrum import marchenko_pastur_median
from inflection_fast.study.adaptation import Adaptation, NoArm, on_modules, weight_of
from inflection_fast.study.arms import Seen

__all__ = ["Kappa", "Spectrum", "signal_ratio"]


@dataclass(frozen=True)
class Kappa:
    """LoRA on the best conditioned of the default modules (KappaTune), wherever they are."""

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        modules = seen.modules
        known = {name for names in modules.values() for name in names}
        order = [name for name in kappa_order(seen.model) if name in known]
        wanted = seen.config.blocks * len(known) // len(modules)
        if len(order) < wanted:
            raise NoArm(f"KappaTune ranks {len(order)} of the default modules, and {wanted} are needed")
        scores = {name: float(place) for place, name in enumerate(order)}
        return on_modules(seen.model, dict.fromkeys(order[:wanted], seen.config.rank), scores=scores)


@dataclass(frozen=True)
class Spectrum:
    """LoRA on the blocks whose weights hold the most signal: Spectrum's ratio with the edge of pure noise.

    Spectrum divides the sum of the singular values above a threshold by the sum of those below. Its threshold leaves
    out the size of the matrix; here it is the Marchenko-Pastur edge sigma (sqrt(m) + sqrt(n)), with sigma such that
    the median singular value is that of noise of this size (Gavish and Donoho 2014).
    """

    kind: str = "lora"
    draws: bool = False

    def choose(self, seen: Seen) -> Adaptation:
        """See `Arm`."""
        scores = {}
        for layer, names in seen.modules.items():
            ratios = [signal_ratio(weight_of(seen.model, name).detach()) for name in names]
            scores[layer] = float(np.mean(ratios))
        return seen.best(scores)


def signal_ratio(weight: Tensor) -> float:
    """Sum of the singular values above the edge of noise over the sum of those below; 0 for pure noise."""
    values = torch.linalg.svdvals(weight.double()).cpu().numpy()
    rows, columns = weight.shape
    edge = np.median(values) * (1 + np.sqrt(min(rows, columns) / max(rows, columns)))
    edge /= np.sqrt(marchenko_pastur_median(min(rows, columns) / max(rows, columns)))
    above = values > edge
    return float(values[above].sum() / values[~above].sum())
