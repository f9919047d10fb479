"""Sharded models: which ranks share a batch, what FSDP2 gathers, and what can be measured under DeepSpeed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch import distributed as dist

from ..blocks import is_named_attention
from ..quantities import Quantity
from ..quantities.dtensors import is_dtensor, is_shard, sharded_over
from .panel import overrides

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "BatchMesh", "RemoteBlock", "is_fully_sharded", "is_part", "reachable", "reshard", "under_deepspeed",
    "when_gathered",
]  # fmt: skip


def is_part(gradient: Tensor, positions: int | None, ranks: int) -> bool:
    """Whether the `ranks` of a batch have split a block's output: it has fewer positions than attention has queries."""
    split = gradient.shape[:2].numel() * ranks == positions
    return sharded_over(gradient) > 1 or (gradient.dim() > 2 and split)


_EXPERTS = "ep"  # mesh dimension of expert parallelism in Transformers and torchtitan


class BatchMesh:
    """The ranks that compute on one batch with this rank, from the device meshes of the parameters.

    These are the ranks along the tensor parallel mesh dimensions: those that shard parameters, except the first ones of
    FSDP, (Shard, ...) or with replicated shards (Replicate, Shard, ...). Meshes of experts are ignored: their ranks may
    have different batches.
    """

    def __init__(self, model: nn.Module):
        sharded = [parameter for parameter in model.parameters() if is_dtensor(parameter)]
        parameters = [one for one in sharded if _EXPERTS not in (one.device_mesh.mesh_dim_names or ())]
        self.peers = [dist.get_rank()]
        self._first = 0  # mesh dimensions before are data parallel
        if not parameters:
            return
        mesh = max((parameter.device_mesh for parameter in parameters), key=lambda mesh: mesh.ndim)
        placements = [parameter.placements for parameter in parameters]
        if is_fully_sharded(model):
            self._first = 1 if any(is_shard(one[0]) for one in placements) else 2
        whole = [one for one in placements if len(one) == mesh.ndim]
        dims = [dim for dim in range(self._first, mesh.ndim) if any(is_shard(one[dim]) for one in whole)]
        ranks, coordinate = mesh.mesh, mesh.get_coordinate() or ()
        for dim in reversed(range(mesh.ndim)):
            if dim not in dims:
                ranks = ranks.select(dim, coordinate[dim])
        self.peers = [int(rank) for rank in ranks.flatten()]

    def shards_attention(self, block: nn.Module) -> bool:
        """Whether the ranks of one batch hold different heads of a block: parameters of its attention are sharded."""
        attentions = [part for name, part in block.named_modules() if is_named_attention(part, name.split(".")[-1])]
        parameters = [parameter for part in attentions or [block] for parameter in part.parameters()]
        return any(map(is_shard, (place for p in parameters if is_dtensor(p) for place in p.placements[self._first :])))


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a model or parts of it."""
    return next(_fsdp_modules(model), None) is not None


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    module = sys.modules.get("torch.distributed.fsdp")  # imported if a model is sharded
    if module is not None:
        yield from (part for part in model.modules() if isinstance(part, module.FSDPModule))


def when_gathered(model: nn.Module, tell: Callable[[nn.Parameter, nn.Parameter], None]) -> Iterator[RemovableHandle]:
    """Call `tell(parameter, gathered)` in every forward for each parameter that FSDP2 gathers.

    `gathered`, which autograd uses, is whole on this rank apart from tensor parallelism; `parameter` is the shard that
    the model has outside of a forward.
    """
    shards: set[object] = set(_fsdp_modules(model))
    for sharded in (part for part in model.modules() if part in shards):
        nested = [part for part in sharded.modules() if part in shards and part is not sharded]
        others = {inner for part in nested for inner in part.modules()}
        places = [
            (module, name, parameter)
            for module in sharded.modules()
            if module not in others
            for name, parameter in module.named_parameters(recurse=False)
        ]
        # FSDP2's own hook was registered first and runs first.
        yield sharded.register_forward_pre_hook(partial(_tell_gathered, places, tell))


def _tell_gathered(
    places: list[tuple[nn.Module, str, nn.Parameter]],
    tell: Callable[[nn.Parameter, nn.Parameter], None],
    sharded: nn.Module,
    args: tuple,
) -> None:
    for module, name, parameter in places:
        gathered = getattr(module, name)
        if gathered is not parameter:
            tell(parameter, gathered)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of an FSDP2 model after a forward without a backward pass.

    The root module keeps its gathered parameters until its backward pass, and would use them in the next forward even
    if the optimizer has changed the shards meanwhile.
    """
    for module in _fsdp_modules(model):
        module.reshard()


class RemoteBlock(nn.Module):
    """A block of another pipeline stage, without parameters here; it never runs.

    Args:
        parameters: number of its parameters on its own rank.
        trainable: how many of them train.
    """

    def __init__(self, parameters: int, trainable: int):
        super().__init__()
        self.held = parameters, trainable


logger = logging.getLogger(__name__)

# In ZeRO 3 every parameter is a shard with an id; in ZeRO 1 and 2 it refers to its shard in the optimizer.
_MARKS = ("ds_id", "_hp_mapping")
_TAPS = ("on_parameter_gradient", "on_backward_end", "before_update", "after_update")


def under_deepspeed(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine, or has parameters that ZeRO shards."""
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return True
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in _MARKS)


def reachable(quantities: Sequence[Quantity], model: nn.Module, *, deepspeed: bool = False) -> list[Quantity]:
    """The quantities that can be measured on `model`; under DeepSpeed those that read no gradients of parameters.

    At the end of a backward pass DeepSpeed leaves a rank its own gradients or none, not those of the batch. One warning
    names the quantities that are left out. `ValueError` if nothing is left.
    """
    if not (deepspeed or under_deepspeed(model)):
        return list(quantities)
    refused = [one for one in quantities if any(overrides(one, tap) for tap in _TAPS)]
    left = [one for one in quantities if one not in refused]
    if refused:
        names = ", ".join(one.name for one in refused)
        sentence = (
            f"{names}: not measured under DeepSpeed, which reduces the gradients of parameters by itself, so a rank"
            " does not see those of the batch; use DDP or FSDP2 to measure them"
        )
        if not left:
            raise ValueError(sentence)
        logger.warning("%s", sentence)
    return left
