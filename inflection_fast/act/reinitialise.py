"""New weights for collapsed heads and for feed-forward layers.

Weights are drawn by the initialiser of the architecture (`_init_weights` of Transformers' models, `reset_parameters` of
others). Training continues from them, so both interventions are permanent; `undo()` restores the earlier weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks import Block, is_named_attention
from .handle import Handle, check_integer
from .heads import Heads, HeadWeights, Rows, as_setting, head_weights, heads_by_layer
from .planned import Layers
from .targets import is_linear, modules_of

__all__ = ["Reinitialised", "reinitialise_heads", "reset_feed_forward"]

# A parameter and the index of its new part.
_Part = tuple[nn.Parameter, tuple[slice, ...]]


class Reinitialised(Handle):
    """Parts of parameters that were drawn again."""

    permanent = True

    def __init__(self, model: nn.Module, where: Layers, seed: int):
        check_integer("seed", seed, 0)
        super().__init__(model, where)
        self.seed = seed
        self._parts: list[_Part] = []
        self._before: list[Tensor] = []

    @property
    def numbers(self) -> int:
        """The number of new parameters."""
        return sum(parameter[index].numel() for parameter, index in self._parts)

    @torch.no_grad()
    def _write(self, parts: list[tuple[nn.Parameter, tuple[slice, ...], Tensor]]) -> None:
        for parameter, index, fresh in parts:
            if not parameter.is_floating_point():
                raise ValueError("model: quantised integer weights cannot be drawn again; load it unquantised")
            if fresh[index].isnan().any():
                raise ValueError(
                    f"model: the initialiser of {type(self.model).__name__} does not initialise weights of these "
                    "layers, so they cannot be drawn again"
                )
        for parameter, index, fresh in parts:
            self._parts.append((parameter, index))
            self._before.append(parameter[index].clone())
            parameter[index] = fresh[index].to(parameter)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the earlier weights, to the bit. Other weights keep what was trained since."""
        self._check_parameters()
        for (parameter, index), before in zip(self._parts, self._before, strict=True):
            parameter[index] = before

    @torch.no_grad()
    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the optimizer state of the new weights (moments, momentum) to zero."""
        self._check_parameters()
        for parameter, index in self._parts:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[index] = 0

    def _check_parameters(self) -> None:
        current = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) not in current for parameter, _ in self._parts):
            raise RuntimeError(
                f"{self.name}: the model has other parameters now, because it was sharded or parametrised since; call "
                "this before"
            )


class ReinitialisedHeads(Reinitialised):
    """Give attention heads new weights: queries, keys, values and the columns of the output projection.

    With grouped queries, keys and values of a group get new weights only if all heads of the group do; the description
    says where they were kept. The draw depends only on `seed`, so ranks agree, and the state of torch's generators does
    not change. `forget(optimizer)` clears the optimizer state of the old weights.

    Args:
        layers: a plan (`SelectConfig("collapsed")` chooses heads) or indices of blocks.
        heads: indices for all of these blocks, or by block; None: those of the plan, or all.

    Raises:
        ValueError: a head or block that does not exist, or attention with an unknown layout of heads.
    """

    name = "re-initialised heads"

    def __init__(self, model: nn.Module, layers: Layers, *, heads: Heads = None, seed: int = 0):
        super().__init__(model, layers, seed)
        self.heads = heads_by_layer(self.blocks, layers, heads)
        self.kept_groups: dict[int, list[int]] = {}  # layer -> groups whose keys and values other heads use, too
        found = []
        for block in self.blocks:
            weights = head_weights(block)
            fresh = _fresh(model, block, seed)
            for rows in self._rows(block.index, weights):
                found += _parts_of(rows, fresh)
        self._write(found)

    def _rows(self, layer: int, weights: HeadWeights) -> list[Rows]:
        heads = self.heads[layer]
        heads = list(range(weights.heads)) if heads is None else heads
        rows = [one for head in heads for one in weights.of(head)]
        shared = weights.heads // weights.groups
        touched = sorted({head // shared for head in heads})
        whole = [group for group in touched if set(range(group * shared, (group + 1) * shared)) <= set(heads)]
        rest = [group for group in touched if group not in whole]
        if rest:
            self.kept_groups[layer] = rest
        return rows + [one for group in whole for one in weights.of_group(group)]

    def _settings(self) -> dict:
        return {"heads": as_setting(self.heads), "seed": self.seed, "numbers": self.numbers}

    def _words(self) -> str:
        words = f"Heads of blocks {', '.join(map(str, self.layers))} got new weights."
        if self.kept_groups:
            blocks = ", ".join(map(str, self.kept_groups))
            words += f" Keys and values that other heads use were kept in blocks {blocks}."
        return words


class ResetFeedForward(Reinitialised):
    """Give the feed-forward layers of blocks new weights: all linear layers outside attention.

    Draws as `reinitialise_heads`. `ValueError` for a block that does not exist or has no such layers.
    """

    name = "reset feed-forward layers"
    settings = ("modules", "seed", "numbers")

    def __init__(self, model: nn.Module, layers: Layers, *, seed: int = 0):
        super().__init__(model, layers, seed)
        found: list[tuple[nn.Parameter, tuple[slice, ...], Tensor]] = []
        self.modules: list[str] = []
        for block in self.blocks:
            fresh, names = _fresh(model, block, seed), _feed_forward(block)
            if not names:
                raise ValueError(f"model: {block.name} has no linear layers outside its attention")
            for name, module in names.items():
                self.modules.append(name)
                for part, parameter in module.named_parameters(recurse=False):
                    found.append((parameter, (slice(None),), getattr(fresh[module], part)))
        self._write(found)

    def _words(self) -> str:
        return f"The feed-forward layers of blocks {', '.join(map(str, self.layers))} got new weights."


reinitialise_heads = ReinitialisedHeads


reset_feed_forward = ResetFeedForward


def _feed_forward(block: Block) -> dict[str, nn.Module]:
    """Linear layers outside attention by name. `ValueError` for experts, because their router would not be reset."""
    modules = dict(modules_of(block))
    attentions = [name for name, module in modules.items() if is_named_attention(module, name.rpartition(".")[2])]
    if any("expert" in name[len(block.path) :].lower() for name in modules):
        raise ValueError(f"model: {block.name} has experts, which cannot be reset without their router")
    outside = {name: m for name, m in modules.items() if not any(f"{name}.".startswith(f"{a}.") for a in attentions)}
    return {name: module for name, module in outside.items() if is_linear(module)}


def _parts_of(rows: Rows, fresh: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Parameter, tuple[slice, ...], Tensor]]:
    twin = fresh[rows.module]
    found = [(rows.module.get_parameter("weight"), rows.index, twin.get_parameter("weight").data)]
    if rows.module._parameters.get("bias") is not None and not rows.of_inputs:
        index = (slice(rows.begin, rows.end),)
        found.append((rows.module.get_parameter("bias"), index, twin.get_parameter("bias").data))
    return found


@torch.no_grad()
def _fresh(model: nn.Module, block: Block, seed: int) -> dict[nn.Module, nn.Module]:
    """The modules of a block with twins that have new weights; NaN if the initialiser does not set them."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        twin = copy.copy(module)  # with the same settings; it is never called
        twin.__dict__["_is_hf_initialized"] = False
        twin._parameters = {
            name: None
            if p is None
            else nn.Parameter(torch.full_like(p, torch.nan), requires_grad=False)
            if p.is_floating_point()
            else p
            for name, p in module._parameters.items()
        }
        twin._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        twin._modules = {name: None if child is None else twin_of(child) for name, child in module._modules.items()}
        twins[module] = twin
        return twin

    root = twin_of(block.module)
    owner = _owner(model, block)
    devices = sorted({p.device.index for p in root.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed * 1_000_003 + block.index)
        _initialise(root, owner)
    return twins


def _initialise(module: nn.Module, owner: PreTrainedModel | None) -> None:
    for child in module.children():
        _initialise(child, owner)
    if owner is not None:
        owner._init_weights(module)
    else:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _owner(model: nn.Module, block: Block) -> PreTrainedModel | None:
    """The innermost model of Transformers that contains a block."""
    parts = block.path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        around = model.get_submodule(".".join(parts[:end]))
        if isinstance(around, PreTrainedModel):
            return around
    return None
