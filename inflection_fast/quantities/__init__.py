"""One file per diagnostic: its taps, its sums, its columns and their alert rules."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from .activation_grad import ActivationGrad, ProbeActivationGrad
from .adapter import Adapter
from .attention import Attention, CrossAttention, ProbeEntropy
from .attention_detail import AttentionDetail
from .delta_cka import DeltaCka
from .first_order import FirstOrder
from .gradient_noise import GradientNoise
from .layer_cka import LayerCka
from .output import Output
from .parameter_grad import ParameterGrad
from .quantity import Accumulator, AlertRule, Column, Quantity
from .rank import Rank
from .residual import Residual
from .router import Router
from .spectrum import Spectrum
from .step import Step
from .trajectory import Trajectory
from .update import Update

__all__ = ["DEFAULT", "GROUP", "QUANTITIES", "Accumulator", "AlertRule", "Column", "Quantity", "Step", "known", "made"]

GROUP = "inflection_fast.quantities"  # entry point group of packages with quantities
DEFAULT = ("attention", "activation_grad", "parameter_grad", "delta_cka")
QUANTITIES: dict[str, type[Quantity]] = {
    cls.name: cls
    for cls in (
        *(Attention, CrossAttention, ActivationGrad, ParameterGrad, DeltaCka, ProbeEntropy, ProbeActivationGrad),
        *(AttentionDetail, Residual, Update, Adapter, GradientNoise, Rank, Output, Router, Spectrum, Trajectory),
        *(LayerCka, FirstOrder),
    )
}


def known() -> tuple[str, ...]:
    """Names that `MonitorConfig.quantities` takes: ours, then those of installed packages."""
    others = sorted({point.name for point in entry_points(group=GROUP)} - set(QUANTITIES))
    return (*QUANTITIES, *others)


def made(name: str) -> Quantity:
    """The quantity of that name, with its default settings.

    Raises:
        ValueError: there is none, or its entry point is not a quantity with that name.
    """
    if name in QUANTITIES:
        return QUANTITIES[name]()
    for point in entry_points(group=GROUP, name=name):
        quantity = point.load()
        quantity = quantity() if isinstance(quantity, type) else quantity
        if not isinstance(quantity, Quantity) or quantity.name != name:
            raise ValueError(
                f"quantities: the entry point {name!r} is {point.value!r}, which is not a Quantity with that name"
            )
        return quantity
    near = difflib.get_close_matches(name, known(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"quantities: there is none named {name!r}; expected some of {known()}, or instances{hint}")
