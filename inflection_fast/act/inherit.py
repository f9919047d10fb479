"""Fewer blocks: a smaller model of the planned blocks (Inheritune, arXiv 2404.08634), or a model without them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..blocks import Block, find_blocks
from ..decide import Plan
from .handle import Handle, check_integer
from .planned import every_block, planned_blocks, unwrapped

__all__ = ["Dropped", "drop", "grow", "inherit", "inherited_blocks"]

_DEPTH = re.compile(r"(num_hidden_layers|num_layers|n_layers?|(num_)?(encoder|decoder)_layers)")
_PER_LAYER = re.compile(r"layer|block|type|pattern", re.IGNORECASE)
_KEPT = "inherited_blocks"  # in the configuration, so that it is saved with the model
_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number")


def inherit(model: nn.Module, plan: Plan | Sequence[int], *, share: bool = False) -> nn.Module:
    """A model of the planned blocks only, in their order, with all other parts of `model`.

    Its configuration has the new number of blocks, so `save_pretrained` and `from_pretrained` work. `model` is not
    changed; the other blocks are not copied. With `share` the parameters and buffers are those of `model` itself, else
    copies.

    `ValueError` if the blocks are not one list (encoder and decoder), if block 0 is left out and has something that the
    others lack (the position bias of T5), or if a model of the smaller configuration would have other blocks (as when
    the configuration defines by index which blocks have experts).
    """
    base, every, kept = _chosen(model, plan)
    _refuse_first(every, kept)
    container = _container(every)
    # Placeholders for the other blocks, so that these are not copied.
    memo: dict[int, object] = {id(b.module): nn.Identity() for b in every if b not in kept}
    if share:
        memo |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    small = copy.deepcopy(base, memo)
    _shorten(small, small.get_submodule(container), [block.index for block in kept], len(every))
    _refuse_other_shape(small)
    setattr(getattr(small, "config", small), _KEPT, [block.index for block in kept])
    return small


def inherited_blocks(model: nn.Module) -> list[int]:
    """The source blocks of a model from `inherit`, also after `from_pretrained`. `ValueError` for other models."""
    held = getattr(getattr(model, "config", model), _KEPT, None)
    if held is None:
        raise ValueError("model: its configuration has no inherited blocks; pass the result of inherit()")
    return list(held)


@torch.no_grad()
def grow(small: nn.Module, model: nn.Module, by: int = 1, *, blocks: Sequence[int] | None = None) -> nn.Module:
    """`small`, which `inherit` made from `model`, with the next `by` blocks of `model`, or `blocks`, after its last.

    Blocks, embeddings and head are copied from `small` as they are trained, the new blocks from `model`. A new model is
    returned, on the device of `small`; make a new optimizer for it. `ValueError` if `model` does not have enough
    blocks, or is not the source of `small`.
    """
    check_integer("by", by)
    kept, every = inherited_blocks(small), find_blocks(model)
    ours = find_blocks(small, None if len(kept) > 1 else [_only(small, every)])
    if len(ours) != len(kept) or max(kept) >= len(every):
        raise ValueError(
            f"model: it has no blocks {kept}, which the smaller model inherited; pass the source of the smaller model"
        )
    after = list(range(kept[-1] + 1, len(every)))
    more = after[:by] if blocks is None else list(blocks)
    if blocks is None and len(more) < by:
        raise ValueError(f"by: expected at most {len(more)}, the number of blocks after block {kept[-1]}, got {by}")
    if not more or not set(more) <= set(after) or more != sorted(set(more)):
        raise ValueError(f"blocks: expected increasing indices of blocks after block {kept[-1]}, got {more}")
    larger = inherit(model, [*kept, *more])
    container = _container(every)
    places = {f"{container}.{name}." for name in small.get_submodule(container)._modules}
    if len(places) != len(kept):
        raise ValueError("small: its list of blocks was changed since it was inherited")
    # The blocks of the smaller model are the first ones of the larger model, so all names are the same in both.
    target, source = larger.state_dict(), small.state_dict()
    differing = [name for name, value in source.items() if name not in target or target[name].shape != value.shape]
    if differing:
        raise ValueError(f"model: {differing[0]} is not the same there; pass the source of the smaller model")
    for name, value in source.items():
        target[name].copy_(value)
    for parameter, trains in ((larger.get_parameter(n), p.requires_grad) for n, p in small.named_parameters()):
        parameter.requires_grad_(trains)
    return larger.to(next(small.parameters()).device).train(small.training)


def _only(small: nn.Module, every: Sequence[Block]) -> str:
    """The path of the only block of a smaller model, because `find_blocks` does not find a list of one block."""
    container = _container(every)
    return f"{container}.{next(iter(small.get_submodule(container)._modules))}"


class Dropped(Handle):
    """Run `model` without the planned blocks, such as lazy ones: for inference, in place.

    The configuration is changed, too, so that caches have as many layers as blocks run. `remove()` of the handle
    restores the model to the bit. `ValueError` as in `inherit`, and if no block would remain.
    """

    name = "dropped blocks"

    def __init__(self, model: nn.Module, plan: Plan | Sequence[int]):
        base, every, gone = _chosen(model, plan)
        kept = [block for block in every if block not in gone]
        if not kept:
            raise ValueError("layers: all blocks would be dropped; keep at least one")
        _refuse_first(every, kept)
        container = base.get_submodule(_container(every))
        super().__init__(base, [block.index for block in gone])
        for undo in _shorten(base, container, [block.index for block in kept], len(every)):
            self._attached.callback(undo)
        self._hold()

    def _words(self) -> str:
        return f"Blocks {', '.join(map(str, self.layers))} are not run."


drop = Dropped


def _chosen(model: nn.Module, where: Plan | Sequence[int]) -> tuple[nn.Module, list[Block], list[Block]]:
    base = unwrapped(model)
    if base is not model:
        raise ValueError("model: it has adapters; merge them (merge_and_unload) or unload them first")
    if isinstance(where, Plan):
        return base, every_block(base, where), planned_blocks(base, where)
    every = find_blocks(base)
    layers = list(where)
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(len(every))):
        raise ValueError(f"layers: expected distinct indices from 0 to {len(every) - 1}, got {layers}")
    return base, every, [every[layer] for layer in sorted(layers)]


def _container(blocks: Sequence[Block]) -> str:
    """The path of the list that holds all blocks and nothing else."""
    parents = {block.path.rpartition(".")[0] for block in blocks}
    if len(parents) > 1:
        raise ValueError(
            f"model: its blocks are in {len(parents)} lists ({', '.join(sorted(parents)[:4])}); only blocks of "
            "one list can be left out"
        )
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise ValueError("model: its blocks share their weights, so single blocks cannot be left out")
    return parents.pop()


def _refuse_first(every: Sequence[Block], kept: Sequence[Block]) -> None:
    if kept[0].index == 0 or len(every) < 2:
        return
    first, second = ({name for name, _ in block.module.named_parameters()} for block in every[:2])
    if first - second:
        raise ValueError(f"plan: block 0 holds {sorted(first - second)[0]}, which the other blocks lack; keep block 0")


def _shorten(model: nn.Module, container: nn.Module, kept: list[int], depth: int) -> list[Callable[[], None]]:
    """Keep only the children `kept` of `depth` in `container`, and adapt indices and configurations.

    Returns functions that undo it, to be called in reverse order.
    """
    names = list(container._modules)
    if len(names) != depth:
        raise ValueError(f"model: the list of its {depth} blocks holds {len(names)} modules, so it cannot be shortened")
    before = dict(container._modules)
    undo: list[Callable[[], None]] = [partial(container._modules.update, before), container._modules.clear]
    numbered = all(name.isdigit() for name in names)
    container._modules.clear()
    for place, index in enumerate(kept):
        name = str(place) if numbered else names[index]
        container._modules[name] = before[names[index]]
        for module in container.get_submodule(name).modules():
            for attribute in _INDEX:
                if getattr(module, attribute, None) == index and attribute in vars(module):
                    setattr(module, attribute, place)
                    undo.append(partial(setattr, module, attribute, index))
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen and hasattr(config, "to_dict"):
            seen.add(id(config))
            undo += _shorten_config(config, kept, depth)
    return undo


def _shorten_config(config, kept: list[int], depth: int) -> list[Callable[[], None]]:
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        counts = isinstance(value, int) and not isinstance(value, bool) and value == depth
        if counts and _DEPTH.fullmatch(config.attribute_map.get(name, name)):
            changes[name] = len(kept)
        elif isinstance(value, (list, tuple)) and len(value) == depth and _PER_LAYER.search(name):
            changes[name] = type(value)(value[i] for i in kept)
    before = {name: vars(config)[name] for name in changes}
    vars(config).update(changes)
    return [partial(vars(config).update, before)]


def _refuse_other_shape(small: nn.Module) -> None:
    """`ValueError` unless a model made from the new configuration has the same parameters."""
    config = getattr(small, "config", None)
    if config is None or not isinstance(small, PreTrainedModel):
        return
    with torch.device("meta"):
        made = small._from_config(copy.deepcopy(config))
    ours, theirs = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (small, made))
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"plan: a {type(small).__name__} with these blocks would have other parameters ({differing[0]}), because "
            "its configuration defines the parts of blocks by index; keep other blocks"
        )
