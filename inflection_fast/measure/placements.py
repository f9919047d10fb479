"""DTensors: what of a tensor this rank holds, and which ranks hold the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch import distributed as dist

from ..blocks import is_named_attention

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Placement
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "BatchMesh",
    "full_of",
    "is_dtensor",
    "is_fully_sharded",
    "is_part",
    "local_of",
    "reshard",
    "sharded_over",
    "when_gathered",
]


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is one."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; a sum that is still pending over ranks is carried out first."""
    if not is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        tensor = tensor.redistribute(placements=_settled(tensor.placements))
    return tensor.to_local()


def full_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where ranks hold parts of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _settled(placements: tuple[Placement, ...]) -> list[Placement]:
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in placements]


def sharded_over(tensor: Tensor) -> int:
    """Into how many different parts the ranks have split a tensor; 1 for a plain one."""
    if not is_dtensor(tensor):
        return 1
    parts = 1
    for dim, placement in enumerate(tensor.placements):
        parts *= tensor.device_mesh.size(dim) if _is_shard(placement) else 1
    return parts


def is_part(gradient: Tensor, positions: int | None, ranks: int) -> bool:
    """Whether the `ranks` of one batch have split the output of a block, which has fewer positions than queries."""
    split = gradient.shape[:2].numel() * ranks == positions
    return sharded_over(gradient) > 1 or (gradient.dim() > 2 and split)


def _is_shard(placement: Placement) -> bool:
    return not placement.is_replicate() and not placement.is_partial()  # strided shards included


_EXPERTS = "ep"  # what Transformers and torchtitan call the dimension of a mesh along which experts are divided


class BatchMesh:
    """Which ranks compute on one batch with this one, from the device meshes of the parameters.

    Those are the ranks along the mesh dimensions that are tensor parallel: the ones on which parameters are sharded,
    except FSDP's own, which come first: (Shard, ...), or (Replicate, Shard, ...) where shards are replicated. Experts
    have meshes of their own, whose ranks may have batches of their own, and tell nothing.
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
            self._first = 1 if any(_is_shard(one[0]) for one in placements) else 2
        whole = [one for one in placements if len(one) == mesh.ndim]
        dims = [dim for dim in range(self._first, mesh.ndim) if any(_is_shard(one[dim]) for one in whole)]
        ranks, coordinate = mesh.mesh, mesh.get_coordinate() or ()
        for dim in reversed(range(mesh.ndim)):
            if dim not in dims:
                ranks = ranks.select(dim, coordinate[dim])
        self.peers = [int(rank) for rank in ranks.flatten()]

    def shards_attention(self, block: nn.Module) -> bool:
        """Whether the ranks of one batch hold different heads of a block: its attention's parameters are sharded."""
        attentions = [part for name, part in block.named_modules() if is_named_attention(part, name.split(".")[-1])]
        parameters = [parameter for part in attentions or [block] for parameter in part.parameters()]
        return any(
            map(_is_shard, (place for p in parameters if is_dtensor(p) for place in p.placements[self._first :]))
        )


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has parts of a model."""
    return next(_fsdp_modules(model), None) is not None


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    module = sys.modules.get("torch.distributed.fsdp")  # whoever shards a model has imported it
    if module is not None:
        yield from (part for part in model.modules() if isinstance(part, module.FSDPModule))


def when_gathered(model: nn.Module, tell: Callable[[nn.Parameter, nn.Parameter], None]) -> Iterator[RemovableHandle]:
    """Call `tell(parameter, gathered)` in every forward for each parameter that FSDP2 has gathered for it.

    What autograd sees is `gathered`, whole on this rank but for tensor parallelism; `parameter` is the shard that the
    model has outside of a forward.
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
        # FSDP2's own hook comes first: it was there before.
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
    """Give up the gathered parameters of an FSDP2 model after a forward without a backward.

    The root keeps its own until its backward pass, and takes them for current in the next forward even if the
    optimizer has changed the shards in between.
    """
    for module in _fsdp_modules(model):
        module.reshard()
