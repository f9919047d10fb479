"""Norms and ranks of adapters, and which of them learn nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from .dtensors import full_of, is_dtensor, local_of, sharded_over
from .quantity import Accumulator, AlertRule, Column, MeasuredModel, Parameters, Quantity, Sums, Update

__all__ = ["LARGEST_PRODUCT", "Adapter"]

LARGEST_PRODUCT = 64  # rank up to which the products of an adapter's factors fit into what is copied every step
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


_of_adapter = partial(Column, "1", ("adapter",))


@dataclass(frozen=True)
class _Found:
    """One adapter on one module."""

    name: str  # "<module>" without wrappers, or "<module>:<adapter>" where a model has several
    layer: int | None  # the block that it is in
    parameters: tuple[nn.Parameter, ...]
    factors: tuple[nn.Parameter, nn.Parameter] | None  # A [r, in], B [out, r]; None: another kind than LoRA
    module: nn.Module  # what holds it, and knows which of its adapters are active
    adapter: str


class Adapter(Quantity):
    """Per adapter: ||BA||_F, its effective rank, the norm of its gradient, and whether it learns nothing.

    Adapters are those of peft, in any module of the model. With LoRA factors A [r, in] and B [out, r]:

    * `adapter_norm`: ||BA||_F = sqrt(tr(B^T B A A^T)), by r x r products and never B A, without the factor
      lora_alpha / r;
    * `adapter_rank`: exp of the entropy of s_i / sum s, s the singular values of BA (Roy & Vetterli 2007), from the
      eigenvalues of the r x r matrix B^T B A A^T; missing for r above 64;
    * `adapter_share`: a block's share of the sum of ||BA||_F^2 over all blocks;
    * `adapter_gradient`: norm of the gradient of all the adapter's parameters, missing where there is none;
    * `adapter_idle`: 1 where an active adapter has no gradient, its gradient is zero, or B is still zero; else 0. B is
      zero by design before the first update, so one measurement says little; three in a row raise the alert
      `idle_adapter`. Missing for adapters that are switched off.

    Adapters of other kinds have their gradient and `adapter_idle` alone. Factors that ranks have divided (FSDP2, tensor
    parallelism) are gathered in `Monitor.step`, one after the other, which all ranks call at the same steps.

    Cost: products of r x in and out x r in float64, and one read of the adapters' gradients. Memory: 8 r^2 + 56 bytes
    per adapter, r at most 64.
    """

    name = "adapter"

    columns = {
        "adapter_norm": _of_adapter(
            "norm of the adapter's product",
            "Frobenius norm of B A, what an adapter adds, without lora_alpha / r.",
            count="factored",
            alerts=(AlertRule("not_finite"),),
        ),
        "adapter_rank": _of_adapter(
            "effective rank of the adapter",
            "Exponential of the entropy of the normalised singular values of B A.",
            count="small",
        ),
        "adapter_gradient": _of_adapter(
            "gradient of the adapter",
            "Norm of the gradient of all parameters of an adapter.",
            count="reached",
            scale="log",
        ),
        "adapter_idle": _of_adapter(
            "adapter that learns nothing",
            "1 where an adapter has no gradient, a zero gradient, or a matrix B that is still zero.",
            count="active",
            drawn="none",
            alerts=(
                AlertRule(
                    "above",
                    0.5,
                    kind="idle_adapter",
                    words="{place} learns nothing: its gradient is missing or zero, or its B is still zero",
                    measurements=3,
                ),
            ),
        ),
        "adapter_share": Column(
            unit="1",
            axes=("layer",),
            label="share of the adapters' change",
            explanation="A block's share of the summed squares of B A over all blocks.",
        ),
    }

    def prepare(self, model: MeasuredModel) -> None:
        """Find the adapters; `ValueError` where there is none."""
        self._indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._found = adapters_of(model)
        if not self._found:
            raise ValueError(
                "adapter: this model has no adapters of peft; put them in before the Monitor is made, or leave the "
                "quantity 'adapter' out of MonitorConfig(quantities=...)"
            )
        ranks = [f.factors[0].shape[0] for f in self._found if f.factors and f.factors[0].shape[0] <= LARGEST_PRODUCT]
        self._rank, self._ranks = max(ranks, default=1), model.ranks
        self.axes = {
            "adapter": tuple(f.name for f in self._found),
            "adapter_row": self._rank,
            "adapter_column": self._rank,
        }
        one, alike = ("adapter",), partial(Accumulator, held="alike")
        self.accumulators = {
            "product": alike((*one, "adapter_row", "adapter_column")),
            "squares": alike(one),
            "of_b": alike(one),
            "factored": alike(one),
            "small": alike(one),
            "gradient": Accumulator(one, held="part", gradient_power=2),
            "reached": Accumulator(one, held="part"),
            "active": alike(one),
        }
        self._layers, self._blocks = [f.layer for f in self._found], len(model.blocks)

    def on_backward_end(self, sums: Sums, parameters: Parameters) -> None:
        """Write everything: factors change at updates only, and gradients are whole after the last backward pass."""
        gradients, places, shares = [], [], []
        device = sums["squares"].device
        for place, found in enumerate(self._found):
            active: Sequence[str] = getattr(found.module, "active_adapters", ())
            sums["active"][place].fill_(float(found.adapter in active))
            for parameter in found.parameters:
                if parameter.grad is not None:
                    gradient = parameter.grad
                    gradients.append(local_of(gradient.coalesce().values() if gradient.is_sparse else gradient))
                    places.append(place)
                    shares.append(sharded_over(parameter) / self._ranks)  # ranks add up: what several hold counts once
            if found.factors is not None and not any(map(is_dtensor, found.factors)):
                self._write_product(sums, place, *(p.detach() for p in found.factors))
        sums["gradient"].zero_()
        sums["reached"].zero_()
        if gradients:
            wide = [g for g in gradients if g.dtype == torch.float64]
            if wide:  # sum_of_squares takes no float64
                squares = torch.stack([g.double().square().sum() for g in gradients]).to(device)
            else:
                squares = ops.sum_of_squares(gradients, range(len(gradients))).double().to(device)
            key = tuple(places)
            if key not in self._indices:  # brought to the device once: a copy from the host takes its time
                scales = torch.tensor(shares, dtype=torch.float64)
                index = torch.tensor(places).to(device, non_blocking=True)
                self._indices = {key: (index, scales.to(device, non_blocking=True))}
            index, scales = self._indices[key]
            sums["gradient"].index_add_(0, index, squares * scales)
            sums["reached"].index_fill_(0, index, 1.0)

    def before_update(self, sums: Sums, update: Update) -> None:
        """Write what ranks have to come together for: the backward pass of some may have nothing to measure."""
        for place, found in enumerate(self._found):
            if found.factors is not None and any(map(is_dtensor, found.factors)):
                self._write_product(sums, place, *(full_of(p.detach()) for p in found.factors))

    def _write_product(self, sums: Sums, place: int, a: Tensor, b: Tensor) -> None:
        a, b = a.double().flatten(1), b.double()  # a convolution's A has its window behind the channels
        b = b.flatten(1) if b.shape[2:].numel() == 1 else b
        gram_b = b.mT @ b
        product = gram_b @ (a @ a.mT)
        sums["squares"][place] = product.trace()
        sums["of_b"][place] = gram_b.trace()
        sums["factored"][place].fill_(1)
        rank = a.shape[0]
        if rank <= LARGEST_PRODUCT:
            sums["product"][place, :rank, :rank] = product
            sums["small"][place].fill_(1)

    def values(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Norms and ranks; singular values from the eigenvalues of small matrices."""
        squares = np.maximum(sums["squares"], 0.0) + 0.0 * sums["squares"]  # a trace of rounding errors; NaN stays
        singular = np.sqrt(np.maximum(np.linalg.eigvals(np.nan_to_num(sums["product"])).real, 0.0))
        rank = effective_rank(singular)
        finite = np.isfinite(sums["product"]).all((-2, -1))
        layers = np.array([-1 if layer is None else layer for layer in self._layers])
        inside = (layers >= 0) & (sums["factored"] > 0)
        of_blocks = np.bincount(layers[inside], squares[inside], self._blocks)
        has_adapter = np.bincount(layers[inside], minlength=self._blocks) > 0
        share = np.where(has_adapter, of_blocks / of_blocks.sum(), np.nan)
        zero_b = (sums["factored"] > 0) & (sums["of_b"] == 0)
        return {
            "adapter_norm": np.sqrt(squares),
            "adapter_rank": np.where(finite, rank, np.nan),
            "adapter_gradient": np.sqrt(sums["gradient"]),
            "adapter_idle": ((sums["reached"] == 0) | (sums["gradient"] == 0) | zero_b).astype(np.float64),
            "adapter_share": share,
        }


def effective_rank(singular: np.ndarray) -> np.ndarray:
    """exp(entropy of the singular values [..., r], normalised to a sum of 1), Roy & Vetterli (2007); NaN for zeros."""
    p = singular / singular.sum(-1, keepdims=True)
    return np.exp(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


def adapters_of(measured: MeasuredModel) -> list[_Found]:
    """All adapters of peft in a model, those of its blocks with their layer."""
    layers: dict[int, tuple[int, str]] = {}
    for block in measured.blocks:
        for name, module in block.module.named_modules():
            layers.setdefault(id(module), (block.index, f"{block.name}.{name}" if name else block.name))
    found, seen = [], set()
    for path, module in measured.model.named_modules():
        if id(module) in seen or not hasattr(module, "adapter_layer_names"):
            continue
        seen.add(id(module))
        layer, name = layers.get(id(module), (None, path.removeprefix("base_model.model.")))
        held = (getattr(module, attribute, None) for attribute in module.adapter_layer_names)
        holders = [one for one in held if isinstance(one, (nn.ModuleDict, nn.ParameterDict))]
        for adapter in dict.fromkeys(key for holder in holders for key in holder.keys()):
            members = [holder[adapter] for holder in holders if adapter in holder]
            parameters = [
                p for member in members for p in ([member] if isinstance(member, nn.Parameter) else member.parameters())
            ]
            if parameters:
                factors = _factors_of(module, adapter)
                found.append(_Found(f"{name}:{adapter}", layer, tuple(parameters), factors, module, adapter))
    if len({f.adapter for f in found}) == 1:  # the module alone names it
        found = [replace(f, name=f.name.removesuffix(f":{f.adapter}")) for f in found]
    return found


def _factors_of(module: nn.Module, adapter: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    for names in _FACTORS:
        holders = [getattr(module, name, {}) for name in names]
        if all(adapter in holder for holder in holders):
            a, b = (holder[adapter] for holder in holders)
            a, b = (x if isinstance(x, nn.Parameter) else getattr(x, "weight", None) for x in (a, b))
            if a is None or b is None or b.shape[1] != a.shape[0]:
                return None
            return a, b
    return None
