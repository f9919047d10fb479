"""What an arm decides: which modules are adapted, how, and with which ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from inflection_fast.act.adapters import (
    KINDS,
    adapt,
    adapter_parameters,
    bottleneck,
    default_modules,
    head_parameters,
    train_only,
)
from inflection_fast.act.unfreeze import unfreeze
from inflection_fast.blocks import find_blocks

__all__ = ["Adaptation", "NoArm", "Spending", "gradient_of", "on_layers", "on_modules", "weight_of"]

PARTS = {"head": "head", "unfreeze": "top", "bitfit": "bias", "full": "all", "lisa": "all"}


class NoArm(ValueError):
    """This arm is not possible here: the model has no such modules, or the choice failed. The cell records it."""


@dataclass(frozen=True)
class Adaptation:
    """What is trained.

    Args:
        kind: lora, dora, adalora, ia3, vera, prefix, bottleneck; or head, unfreeze, blocks, bitfit, full, lisa
        ranks: full module name -> rank, for adapters
        layers: blocks that hold something trained beside the head
        options: of the kind, such as the number of blocks to unfreeze, and of an intervention
        note: how the choice was made, for the reader; it does not change the training
        scores: the number per block or module that the choice is based on
    """

    kind: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    def key(self, **more: Any) -> str:
        """A key for the training of this adaptation under the conditions in `more`. Equal trainings have equal keys."""
        what = {"kind": self.kind, "ranks": dict(sorted(self.ranks.items())), "options": dict(self.options), **more}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def apply(self, model: nn.Module, steps: int) -> nn.Module:
        """The model, ready to be trained; the same object where nothing is wrapped. NoArm where it cannot be."""
        try:
            if self.kind in PARTS:
                train_only(model, PARTS[self.kind], **self.options_for("top"))
                return model
            if self.kind == "blocks":
                unfreeze(model, self.options["layers"], also=head_parameters(model))
                return model
            if self.kind == "bottleneck":
                return bottleneck(model, self.layers, self.options["width"])
            return adapt(model, self.kind, self.ranks, steps=steps)
        except (ValueError, TypeError) as error:
            raise NoArm(" ".join(str(error).split())) from error

    def options_for(self, *names: str) -> dict[str, Any]:
        """Those of the options."""
        return {name: self.options[name] for name in names if name in self.options}

    def parameters(self, model: nn.Module) -> int:
        """Trainable parameters outside of the head."""
        if self.kind in KINDS:
            return adapter_parameters(model)
        backbone = getattr(model, "base_model_prefix", "")
        return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n.startswith(f"{backbone}."))


@dataclass(frozen=True)
class Spending:
    """How the ranks of LoRA are divided among the chosen blocks."""

    budget: int  # sum of the ranks over blocks

    def over(self, layers: Sequence[int]) -> dict[int, int]:
        """A rank for each block, as even as whole numbers allow; the first blocks take what is left over."""
        if not layers:
            raise NoArm("no block was chosen")
        if len(layers) > self.budget:
            raise NoArm(f"{len(layers)} blocks cannot share a rank of {self.budget}")
        each, more = divmod(self.budget, len(layers))
        return {layer: each + (i < more) for i, layer in enumerate(sorted(layers))}


def on_layers(
    model: nn.Module,
    layers: Sequence[int],
    rank_of: Callable[[Sequence[int]], Mapping[int, int]],
    *,
    kind: str = "lora",
    note: str = "",
    scores: Mapping[str, float] | None = None,
) -> Adaptation:
    """Adapters on the default modules of some blocks. NoArm where the model has no default modules."""
    layers = sorted(set(layers))
    outside = [layer for layer in layers if not 0 <= layer < len(find_blocks(model))]
    if outside:
        raise NoArm(f"blocks {outside} do not exist: the model has {len(find_blocks(model))}")
    ranks = rank_of(layers)
    try:
        modules = default_modules(model, layers)
    except ValueError as error:
        raise NoArm(" ".join(str(error).split())) from error
    return Adaptation(
        kind,
        {name: ranks[layer] for layer in layers for name in modules[layer]},
        tuple(layers),
        note=note,
        scores=scores or {},
    )


def on_modules(
    model: nn.Module, ranks: Mapping[str, int], *, note: str = "", scores: Mapping[str, float] | None = None
) -> Adaptation:
    """LoRA on single modules, each with a rank of its own."""
    blocks = find_blocks(model)
    layers = {block.index for block in blocks for name in ranks if name.startswith(f"{block.path}.")}
    return Adaptation("lora", dict(ranks), tuple(sorted(layers)), note=note, scores=scores or {})


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of a module. NoArm where it has none."""
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, Tensor):
        raise NoArm(f"{name} has no weight")
    return weight


def gradient_of(model: nn.Module, name: str) -> Tensor:
    """The gradient of a module's weight. NoArm where none arrived."""
    gradient = weight_of(model, name).grad
    if gradient is None:
        raise NoArm(f"the weight of {name} got no gradient")
    return gradient
